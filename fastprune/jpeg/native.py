"""Shared by all stages of the decoder: status codes, compilation, a little vector IR.

An inner function is compiled without Numba's reference counting, which would otherwise stay in the
hot loops; so it may allocate nothing and return no array. Stages that LLVM does not vectorize by
itself are written as vector IR; each has a twin of plain loops that gives the same bytes, for
machines without AVX2 and for runs under Numba's bounds checking, which cannot see into IR.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit
from numba.core import config as numba_settings

from fastprune.base.compiled import cached

BOUNDS_CHECKED = bool(getattr(numba_settings, "BOUNDSCHECK", False))
VECTORS: bool = not BOUNDS_CHECKED and bool(
    llvmlite.binding.get_host_cpu_features().get("avx2", False)
)

# What became of a decode, as a number that compiled code can return.
OK = 0
UNSUPPORTED = 1
DAMAGED = 2
TRUNCATED = 3
LACKS_ROOM = 4
BAD_BOX = 5
OTHER_SIZE = 6

MEANINGS = {
    UNSUPPORTED: "the view decoder does not know its kind of JPEG",
    DAMAGED: "its entropy-coded data is damaged",
    TRUNCATED: "its entropy-coded data ends too early",
    LACKS_ROOM: "it is larger than the decoder's workspace",
    BAD_BOX: "the box does not lie inside it",
    OTHER_SIZE: "its JPEG is not of the size in the beton",
}

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.py")))

kernel: Callable[..., Any] = functools.partial(njit, _nrt=False, error_model="numpy")
inlined: Callable[..., Any] = functools.partial(kernel, forceinline=True)


def entry(*sources: Path) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function that Python calls, from the disk cache where that has it.

    Args:
        sources: files beyond this folder of which functions or constants are compiled in.
    """
    return cached(*_SOURCES, *sources, nogil=True, error_model="numpy")


def pointer(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    """Address of an array's item, from the arguments of an intrinsic's code generator."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def vector_type(bits: int, lanes: int) -> ir.VectorType:
    """A vector of integers."""
    return ir.VectorType(ir.IntType(bits), lanes)


def load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> ir.Instruction:
    """Load from any address, aligned or not."""
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)


def store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    """Store to any address, aligned or not."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def filled(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector with the same number in each lane."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def clamped(builder: ir.IRBuilder, vector: Any, lowest: int, highest: int) -> ir.Instruction:
    """Each signed lane moved into [lowest, highest]."""
    low, high = filled(vector.type, lowest), filled(vector.type, highest)
    raised = builder.select(builder.icmp_signed("<", vector, low), low, vector)
    return builder.select(builder.icmp_signed(">", raised, high), high, raised)


def shuffled(builder: ir.IRBuilder, first: Any, second: Any, lanes: list[int]) -> ir.Instruction:
    """Pick lanes out of two vectors laid end to end."""
    indices = vector_type(32, len(lanes))
    mask = ir.Constant(indices, [ir.Constant(indices.element, lane) for lane in lanes])
    return builder.shuffle_vector(first, second, mask)


class Lanes:
    """A vector of integers with Python's operators, so that one formula serves IR and scalars."""

    def __init__(self, builder: ir.IRBuilder, value: Any):
        self.builder = builder
        self.value = value

    def _operand(self, other: Any) -> Any:
        return other.value if isinstance(other, Lanes) else filled(self.value.type, other)

    def __add__(self, other: Any) -> "Lanes":
        return Lanes(self.builder, self.builder.add(self.value, self._operand(other)))

    def __sub__(self, other: Any) -> "Lanes":
        return Lanes(self.builder, self.builder.sub(self.value, self._operand(other)))

    def __mul__(self, other: Any) -> "Lanes":
        return Lanes(self.builder, self.builder.mul(self.value, self._operand(other)))

    def __lshift__(self, bits: int) -> "Lanes":
        return Lanes(self.builder, self.builder.shl(self.value, self._operand(bits)))

    def __rshift__(self, bits: int) -> "Lanes":
        return Lanes(self.builder, self.builder.ashr(self.value, self._operand(bits)))
