"""Types of settings with their bounds, and the sentence about a value outside of them."""

import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo

# A larger number becomes infinite in float32, in which networks compute.
_FLOAT32_MAX = 3.4028234663852886e38
_WORDS = {2: "two", 3: "three"}


class Settings(BaseModel):
    """Settings of one station: they cannot change, and an unknown name is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def _integer(value: Any) -> Any:
    """Refuse what pydantic would turn into an integer: True, "5" and 5.0."""
    if isinstance(value, bool | str | float):
        raise ValueError("not an integer")
    try:
        return operator.index(value)  # numpy's integers have one
    except TypeError:
        return value  # None, where it is allowed


def _torch_name(value: Any) -> Any:
    """Name a dtype or device of torch, which these modules must not import."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _short_name(value: Any) -> Any:
    """Accept the names of precisions of earlier versions."""
    return {"float32": "fp32", "bfloat16": "bf16"}.get(value, value)


def _openable(path: Path, info: ValidationInfo) -> Path:
    """Refuse a path that no file system can open, before a run has begun."""
    if "\0" in str(path):
        raise ValueError(f"the path {info.field_name} holds a null character")
    return path


Integer = Annotated[int, BeforeValidator(_integer)]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
# Rows, epochs and seeds are int64 in every array and kernel.
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]
# More is a slip of the keyboard, and would end in a MemoryError or a system without threads.
Pixels = Annotated[Integer, Field(ge=1, le=8192)]
Threads = Annotated[Integer, Field(ge=1, le=1024)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=_FLOAT32_MAX)]
Weight = Annotated[float, Field(ge=0, le=_FLOAT32_MAX)]
Means = tuple[float, float, float]
Deviations = tuple[Positive, Positive, Positive]
File = Annotated[Path, AfterValidator(_openable)]
Device = Annotated[str, BeforeValidator(_torch_name)]
Augment = Literal["rrc", "pad_crop", "center", "none"]
Backend = Literal["auto", "cpu", "dali"]
Precision = Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(_short_name)]
CacheDtype = Literal["float16", "float32", "uint8"]
ImageDtype = Annotated[
    Literal["float32", "float16", "bfloat16", "uint8"], BeforeValidator(_torch_name)
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Domain:
    """The values that a setting may have.

    Attributes:
        kind: int, float, bool, str or Path; of a tuple, its entries'.
        choices: the words it may be, if it is one of several.
        low: the least number; None without one.
        high: the greatest number; None without one.
        is_low_open: whether `low` itself is outside.
        is_high_open: whether `high` itself is outside.
        length: entries of a tuple, 0 for any number of them; None if it is not a tuple.
    """

    kind: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    is_high_open: bool = False
    length: int | None = None

    def __str__(self) -> str:
        """`an integer >= 1`, `three finite numbers`, `one of 'kd', 'dkd'`."""
        if self.choices:
            names = ", ".join(map(repr, self.choices))
            if self.length is not None:
                return f"a list of names among {names}"
            return f"one of {names}" if len(self.choices) > 1 else names
        noun, bounds = self.noun, self.bounds
        if self.length is None:
            return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}{bounds}"
        return f"{_WORDS.get(self.length, 'a list of')} {noun}s{bounds}"

    @property
    def noun(self) -> str:
        """The kind of value, such as `integer`."""
        if self.kind is float and (self.low is None or self.high is None):
            return "finite number"
        if self.kind is float:
            return "float32 number" if self.high == _FLOAT32_MAX else "number"
        return {int: "integer", str: "text", Path: "path", bool: "boolean"}.get(self.kind, "value")

    @property
    def bounds(self) -> str:
        """Where a number must lie, such as ` >= 1`; empty for other kinds."""
        low, high = self.low, None if self.high == _FLOAT32_MAX else self.high
        if low is None:
            return ""
        least = f" {'>' if self.is_low_open else '>='} {low:g}"
        # An integer below 2**31 or 2**63 is meant by "integer" alone.
        if high is None or (self.kind is int and self.is_high_open):
            return least
        if self.kind is float:
            left, right = "(" if self.is_low_open else "[", ")" if self.is_high_open else "]"
            return f" in {left}{low:g}, {high:g}{right}"
        return f" from {low:,} to {high:,}"


def domain_of(field: FieldInfo) -> Domain:
    """Read a field's type and bounds."""
    kind, metadata, length = field.annotation, list(field.metadata), None
    while (origin := get_origin(kind)) not in (None, Literal):
        arguments = get_args(kind)
        if origin is Annotated:
            metadata += _constraints(arguments[1:])
        elif origin is tuple:
            length = 0 if arguments[-1] is Ellipsis else len(arguments)
        elif origin not in (Union, types.UnionType):
            break
        kind = arguments[0]
    bounds: dict[str, Any] = {}
    for constraint in metadata:
        match constraint:
            case Ge(ge=low):
                bounds |= {"low": low}
            case Gt(gt=low):
                bounds |= {"low": low, "is_low_open": True}
            case Le(le=high):
                bounds |= {"high": high}
            case Lt(lt=high):
                bounds |= {"high": high, "is_high_open": True}
    if get_origin(kind) is Literal:
        return Domain(str, choices=get_args(kind), length=length)
    return Domain(kind, length=length, **bounds)


def _constraints(metadata: tuple[Any, ...]) -> Iterator[Any]:
    """Unpack the constraints of `Annotated[..., Field(...)]`."""
    for entry in metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else (entry,)
