"""Pointers, words of bits and C calls for kernels in Numba: what its arrays do, without building them.

A small layer's sums take less time than handing its tensors over as arrays would.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def pointer(typing_context: Any, address: Any, real: Any) -> Any:
    """The address as a pointer to numbers of the type `real`."""
    result = types.CPointer(real.dtype)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, real), codegen


@intrinsic
def fields_of(typing_context: Any, raw: Any, real: Any) -> Any:
    """The struct that a kernel is given, as a pointer to its fields of one type."""
    result = types.CPointer(real.dtype)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(result))

    return result(types.voidptr, real), codegen


@intrinsic
def at(typing_context: Any, start: Any, offset: Any) -> Any:
    """The pointer `offset` numbers after `start`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return start(start, types.int64), codegen


@intrinsic
def call(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Calls the C function at an address, which returns nothing, with a tuple of arguments."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        unpacked = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(ir.VoidType(), [value.type for value in unpacked])
        builder.call(builder.inttoptr(values[0], function.as_pointer()), unpacked)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def get(typing_context: Any, start: Any, i: Any) -> Any:
    """Number i after a pointer, of memory that no `put` or `add_to` of the same loop writes at another index.

    Without the promise, LLVM compares every pair of pointers before each loop, which takes as long as a short
    loop itself, and gives up on vectors where there are many pairs.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], arguments[1], not_of=_WRITTEN)

    return start.dtype(start, types.int64), codegen


@intrinsic
def put(typing_context: Any, start: Any, i: Any, value: Any) -> Any:
    """Write number i after a pointer: see `get`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, *arguments, of="output")
        return context.get_dummy_value()

    return types.void(start, types.int64, start.dtype), codegen


@intrinsic
def with_bit(typing_context: Any, word: Any, j: Any, condition: Any) -> Any:
    """The word of 32 bits with bit j set where the condition holds."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, j, condition = arguments
        bit = builder.shl(builder.zext(condition, word.type), builder.trunc(j, word.type))
        return builder.or_(word, bit)

    return types.int32(types.int32, types.int64, types.boolean), codegen


@intrinsic
def has_bit(typing_context: Any, word: Any, j: Any) -> Any:
    """Whether bit j of the word is set."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, j = arguments
        return builder.trunc(builder.lshr(word, builder.trunc(j, word.type)), ir.IntType(1))

    return types.boolean(types.int32, types.int64), codegen


def _adder(name: str) -> Any:
    @intrinsic
    def add_to(typing_context: Any, start: Any, i: Any, value: Any) -> Any:
        """Add to number i after a pointer: see `get`."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start, i, value = arguments
            before = _load(builder, start, i, not_of=[other for other in _WRITTEN if other != name])
            _store(builder, start, i, builder.fadd(before, value, flags=("contract", "nsz")), of=name)
            return context.get_dummy_value()

        return types.void(start, types.int64, start.dtype), codegen

    return add_to


# What a loop may write, each of it apart from the others.
_WRITTEN = ["output", "first", "second"]
add_to_first, add_to_second = _adder("first"), _adder("second")


def _load(builder: Any, start: Any, i: Any, not_of: list[str]) -> Any:
    loaded = builder.load(builder.gep(start, [i]))
    loaded.set_metadata("noalias", _scopes(builder.module, not_of))
    return loaded


def _store(builder: Any, start: Any, i: Any, value: Any, of: str) -> None:
    stored = builder.store(value, builder.gep(start, [i]))
    stored.set_metadata("alias.scope", _scopes(builder.module, [of]))
    stored.set_metadata("noalias", _scopes(builder.module, [other for other in _WRITTEN if other != of]))


def _scopes(module: Any, names: list[str]) -> Any:
    """LLVM's metadata for things that do not overlap with each other."""
    domain = module.add_metadata([ir.MetaDataString(module, "batchnorm")])
    return module.add_metadata(
        [module.add_metadata([ir.MetaDataString(module, name), domain]) for name in names]
    )
