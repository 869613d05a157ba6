"""Functions that take the fields of a record of settings as their keywords."""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError
from fastprune.settings.domains import Domain, Settings, domain_of

_S = TypeVar("_S", bound=Settings)
_R = TypeVar("_R")
_Decorator = Callable[[Callable[..., _R]], Callable[..., _R]]

_MOST_SHOWN = 200
_DOC_WIDTH = 100
# The line of a docstring that the fields replace.
_PLACE = re.compile(r"^( *)(?:\*\*)?settings: .*\n", re.MULTILINE)


def takes_settings(record: type[Settings]) -> _Decorator[Any]:
    """Let a function with a parameter `settings: record` be called with its fields as keywords.

    The signature shows the fields, and so does the docstring, in place of a line such as
    "settings: the fields of `SelectSettings`, as keywords."

    >>> from fastprune.settings import SelectSettings
    >>> @takes_settings(SelectSettings)
    ... def select(scores, *, settings):
    ...     return settings.strategy
    >>> select([], keep_ratio=0.5)
    'medium'
    >>> select([], keep_ratio=0)
    Traceback (most recent call last):
    fastprune.base.errors.InvalidValueError: keep_ratio must be a number in (0, 1], not 0.
    """

    def decorate(function: Callable[..., _R]) -> Callable[..., _R]:
        signature = inspect.signature(function)
        own = [p for name, p in signature.parameters.items() if name != "settings"]
        fields = record.model_fields

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> _R:
            chosen = {name: given.pop(name) for name in fields if name in given}
            known = {p.name: None for p in own if p.kind is not p.POSITIONAL_ONLY}
            for name in given:
                if name not in known:
                    hint = did_you_mean(name, [*known, *fields])
                    raise TypeError(f"{function.__qualname__}() has no argument {name!r}.{hint}")
            return function(*args, **given, settings=validated(record, chosen))

        extra = [_parameter(name, field) for name, field in fields.items()]
        call.__signature__ = signature.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
        call.__doc__ = _PLACE.sub(lambda m: _described(record, m[1]), function.__doc__ or "")
        return call

    return decorate


def validated(record: type[_S], given: Mapping[str, Any]) -> _S:
    """Make a record of these values.

    Raises:
        InvalidValueError: one lies outside its domain; argument, domain and value are named.
    """
    try:
        return record.model_validate(dict(given))
    except ValidationError as error:
        raise InvalidValueError(next(faults(record, given, error))) from error


def faults(
    record: type[BaseModel], given: Mapping[str, Any], error: ValidationError
) -> Iterator[str]:
    """Describe each fault: `data.batch_size must be an integer >= 1, not 0.` and so on."""
    seen = set()
    for fault in error.errors():
        where, model, value, field = _find(record, given, fault["loc"])
        # One value can have several faults, such as each channel of three.
        if where and where in seen:
            continue
        seen.add(where)
        if fault["type"] == "extra_forbidden":
            name = where.rpartition(".")[2]
            yield f"{where} is unknown.{did_you_mean(name, model.model_fields)}"
        elif fault["type"] == "missing" and value is None:
            yield f"{where} is missing."
        elif fault["type"] == "value_error" and "not an integer" not in fault["msg"]:
            yield f"{fault['msg'].removeprefix('Value error, ')}."
        elif field is None or isinstance(value, BaseModel):
            yield f"{where or 'recipe'} = {_shown(value)} is not a section."
        else:
            yield outside(where, value, domain_of(field))


def outside(name: str, value: Any, domain: Domain) -> str:
    """Say which values a setting may have, and what was probably meant."""
    # The limit of an integer type is named only where it is the reason.
    limit = domain.high if domain.kind is int and domain.is_high_open else None
    if limit is not None and isinstance(value, int) and value >= limit:
        return f"{name} must be below 2**{int(limit).bit_length() - 1}, not {value}."
    hint = ""
    if len(domain.choices) > 1 and isinstance(value, str):
        hint = did_you_mean(value, domain.choices, list_known=False)
    # 50 where 0.5 is meant is the commonest wrong share.
    if domain.kind is float and domain.high == 1 and isinstance(value, int | float):
        hint = f" {value:g}% is {value / 100:g}." if 1 < value <= 100 else ""
    return f"{name} must be {domain}, not {_shown(value)}.{hint}"


def _find(
    model: type[BaseModel], given: Any, location: tuple[int | str, ...]
) -> tuple[str, type[BaseModel], Any, FieldInfo | None]:
    """Follow a fault's location to the section's model, the field and its whole value."""
    names: list[str] = []
    field = None
    for part in location:
        given = given.get(part) if isinstance(given, Mapping) else None
        names.append(str(part))
        field = model.model_fields.get(str(part))
        section = None if field is None else section_of(field)
        if section is None:
            break
        model = section
    is_section = field is not None and section_of(field) is not None
    return ".".join(names), model, given, None if is_section else field


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section of a recipe, optional or not."""
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation
    )


def _described(record: type[BaseModel], indent: str) -> str:
    """Write the fields as lines of a docstring's section Args."""
    lines = []
    for name, field in record.model_fields.items():
        lines += textwrap.wrap(
            f"{name}: {field.description}",
            _DOC_WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + " " * 4,
        )
    return "\n".join(lines) + "\n"
