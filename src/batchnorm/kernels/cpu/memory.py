"""Pointers and C calls for kernels in Numba: what its arrays do, without building them.

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
