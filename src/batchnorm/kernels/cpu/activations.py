"""Activations as the CPU kernels apply and differentiate them, while a value is in a register.

The formulas have no branches and call no library, so that LLVM turns them into vector instructions. (Python's
`a if condition else b` would be a branch, which LLVM may or may not take out.) Every constant is of the
values' own dtype: one float64 among float32 would halve the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# Products may be fused with sums; nothing may be assumed of NaN and inf.
inline = njit(
    fastmath={"contract", "nsz"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
Real = type[np.float32] | type[np.float64]
_Pair = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


@intrinsic
def select(typing_context: Any, condition: Any, chosen: Any, other: Any) -> Any:
    """`chosen if condition else other`, of one type, both of them computed."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return chosen(types.boolean, chosen, chosen), codegen


def value_of(name: str | None, real: Real) -> Callable[[Any], Any]:
    """The activation of one number of the type `real`, compiled into the loops that call it."""
    return inline(_FUNCTIONS[name](real)[0])


def gradient_of(name: str | None, real: Real) -> Callable[[Any, Any], Any]:
    """The gradient of the activation's input, a function of that of its output and of the input z, likewise.

    Where the slope is 0 on a whole side, the upstream gradient is not looked at, as in torch: it may be NaN.
    """
    return inline(_FUNCTIONS[name](real)[1])


def _identity(real: Real) -> _Pair:
    return lambda z: z, lambda grad, z: grad


def _relu(real: Real) -> _Pair:
    zero = real(0)

    # "Not at or below 0" rather than "above 0", so that NaN stays NaN, as in torch.
    def value(z: Any) -> Any:
        return select(z <= zero, zero, z)

    def gradient(grad: Any, z: Any) -> Any:
        return select(z <= zero, zero, grad)

    return value, gradient


def _leaky_relu(real: Real) -> _Pair:
    zero, leak = real(0), real(0.01)

    def value(z: Any) -> Any:
        return select(z > zero, z, z * leak)

    def gradient(grad: Any, z: Any) -> Any:
        return select(z > zero, grad, grad * leak)

    return value, gradient


def _relu6(real: Real) -> _Pair:
    zero, six = real(0), real(6)

    def value(z: Any) -> Any:
        return select(z < zero, zero, select(z > six, six, z))

    def gradient(grad: Any, z: Any) -> Any:
        return select(z <= zero, zero, select(z >= six, zero, grad))

    return value, gradient


def _elu(real: Real) -> _Pair:
    zero, one = real(0), real(1)
    exp, expm1 = _exponentials(real)

    def value(z: Any) -> Any:
        return select(z > zero, z, expm1(z))

    def gradient(grad: Any, z: Any) -> Any:
        return grad * select(z > zero, one, exp(z))

    return value, gradient


def _hardsigmoid(real: Real) -> _Pair:
    zero, three, six = real(0), real(3), real(6)
    sixth = real(1 / 6)

    def value(z: Any) -> Any:
        shifted = z + three
        # Not a division, which takes longer than memory in float64. 6 times this sixth is 1.
        return select(shifted < zero, zero, select(shifted > six, six, shifted)) * sixth

    def gradient(grad: Any, z: Any) -> Any:
        return select(z <= -three, zero, select(z >= three, zero, grad * sixth))

    return value, gradient


def _hardswish(real: Real) -> _Pair:
    zero, three = real(0), real(3)
    half, third = real(0.5), real(1 / 3)
    share = inline(_hardsigmoid(real)[0])

    def value(z: Any) -> Any:
        return z * share(z)

    def gradient(grad: Any, z: Any) -> Any:
        return select(z <= -three, zero, select(z >= three, grad, grad * (z * third + half)))

    return value, gradient


def _sigmoid(real: Real) -> _Pair:
    one = real(1)
    exp, _ = _exponentials(real)

    def value(z: Any) -> Any:
        return one / (one + exp(-z))

    def gradient(grad: Any, z: Any) -> Any:
        y = one / (one + exp(-z))
        return grad * (y * (one - y))

    return value, gradient


def _silu(real: Real) -> _Pair:
    one = real(1)
    exp, _ = _exponentials(real)

    def value(z: Any) -> Any:
        return z / (one + exp(-z))

    def gradient(grad: Any, z: Any) -> Any:
        share = one / (one + exp(-z))
        return grad * (share * (one + z * (one - share)))

    return value, gradient


def _tanh(real: Real) -> _Pair:
    zero, one, two, far = real(0), real(1), real(2), real(20)
    _, expm1 = _exponentials(real)

    @inline
    def tanh(z: Any) -> Any:
        size = abs(z)
        e = expm1(two * select(size > far, far, size))
        y = e / (e + two)
        return select(z < zero, -y, y)

    def value(z: Any) -> Any:
        return tanh(z)

    def gradient(grad: Any, z: Any) -> Any:
        y = tanh(z)
        return grad * (one - y * y)

    return value, gradient


def _mish(real: Real) -> _Pair:
    """`z * tanh(log(1 + e**z))`, where `tanh(log(1 + e)) = (e**2 + 2e) / (e**2 + 2e + 2)`."""
    one, two, far = real(1), real(2), real(20)
    exp, _ = _exponentials(real)

    def value(z: Any) -> Any:
        e = exp(select(z > far, far, z))
        w = e * (e + two)
        return z * (w / (w + two))

    def gradient(grad: Any, z: Any) -> Any:
        e = exp(select(z > far, far, z))
        w = e * (e + two)
        share = w / (w + two)
        return grad * (share + z * (one - share * share) * (e / (one + e)))

    return value, gradient


def _gelu(real: Real) -> _Pair:
    density_at_0 = real(0.3989422804014327)
    normal = _normal(real)

    def value(z: Any) -> Any:
        share, _ = normal(z)
        return z * share

    def gradient(grad: Any, z: Any) -> Any:
        share, density = normal(z)
        return grad * (share + z * (density_at_0 * density))

    return value, gradient


_FUNCTIONS: dict[str | None, Callable[[Real], _Pair]] = {
    None: _identity,
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "tanh": _tanh,
    "mish": _mish,
    "gelu": _gelu,
}


def _exponentials(real: Real) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """`e**z`, and `e**z - 1` right to the last digits near 0; `e**z` is 0 where it is subnormal.

    `e**z = e**r * 2**k` with whole k and |r| <= ln(2) / 2, and `e**r` by its Taylor series.
    """
    single = real is np.float32
    zero, one, two, near = real(0), real(1), real(2), real(0.34)
    smallest, largest = (real(-86.6), real(88.8)) if single else (real(-707.0), real(709.9))
    log2_of_e = real(1.4426950408889634)
    # Added it rounds to a whole number, and subtracted it leaves that number.
    rounding = real(1.5 * 2**23) if single else real(1.5 * 2**52)
    # ln(2) in two parts, the first of so few bits that its multiples are exact.
    ln2 = real(0.693359375) if single else real(6.93145751953125e-1)
    ln2_rest = real(-2.12194440e-4) if single else real(1.42860682030941723212e-6)
    c = tuple(real(1 / factorial) for factorial in np.cumprod(np.arange(1.0, 14.0)))

    @inline
    def after_term_3_single(r: Any) -> Any:
        return c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * c[6])))

    @inline
    def after_term_3_double(r: Any) -> Any:
        p = c[7] + r * (c[8] + r * (c[9] + r * (c[10] + r * (c[11] + r * c[12]))))
        return c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * (c[6] + r * p))))

    after_term_3 = after_term_3_single if single else after_term_3_double

    @inline
    def split(z: Any) -> Any:
        """`e**r - 1` and `2**(k - 1)`: `2**k` itself may be past the largest number."""
        bounded = select(z > smallest, z, smallest)  # NaN too: it has no whole number
        k = select(bounded < largest, bounded, largest) * log2_of_e + rounding - rounding
        r = z - k * ln2 - k * ln2_rest
        return r * (one + r * (c[1] + r * after_term_3(r))), _two_to_the(k - one)

    @inline
    def exp(z: Any) -> Any:
        less_one, half_power = split(z)
        return select(z < smallest, zero, (less_one + one) * half_power * two)

    @inline
    def expm1(z: Any) -> Any:
        less_one, _ = split(z)
        return select(abs(z) < near, less_one, exp(z) - one)

    return exp, expm1


def _normal(real: Real) -> Callable[[Any], tuple[Any, Any]]:
    """The share of a standard normal distribution below z, `erfc(-z / sqrt(2)) / 2`, and `e**(-z**2 / 2)`.

    `erfc(x) = exp(-x**2) * P((x - 3) / (x + 3)) / (1 + 2x)` for x >= 0, the form of Shepherd & Laframboise
    (1981); P is a Chebyshev fit made for this file, right to 2e-7 (float32) and 2e-15 (float64).
    """
    zero, one, half, two, three, far = real(0), real(1), real(0.5), real(2), real(3), real(100)
    root_half = real(0.7071067811865476)
    exp, _ = _exponentials(real)
    c = tuple(real(coefficient) for coefficient in (_ERFC_8 if real is np.float32 else _ERFC_20))

    @inline
    def degree_8(t: Any) -> Any:
        p = c[4] + t * (c[5] + t * (c[6] + t * (c[7] + t * c[8])))
        return c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * p)))

    @inline
    def degree_20(t: Any) -> Any:
        p = c[15] + t * (c[16] + t * (c[17] + t * (c[18] + t * (c[19] + t * c[20]))))
        p = c[10] + t * (c[11] + t * (c[12] + t * (c[13] + t * (c[14] + t * p))))
        p = c[5] + t * (c[6] + t * (c[7] + t * (c[8] + t * (c[9] + t * p))))
        return c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * p))))

    polynomial = degree_8 if real is np.float32 else degree_20

    @inline
    def normal(z: Any) -> tuple[Any, Any]:
        x = abs(z) * root_half
        x = select(x > far, far, x)
        e = exp(-x * x)
        tail = half * e * polynomial((x - three) / (x + three)) / (one + two * x)
        return select(z < zero, tail, one - tail), e

    return normal


_ERFC_8 = (
    1.25300812, -0.135621752, -0.0475677586, 0.129658995, -0.11919009, 0.0682655104, -0.0242016646,
    0.00232340614, 0.0025775349,
)  # fmt: skip
_ERFC_20 = (
    1.2530080582697305, -0.13562110612457662, -0.04756229435347104, 0.12964515870232854, -0.11927366341419639,
    0.06830802735697071, -0.023770514939733253, 0.002529391632149955, 0.0018886905489491632,
    -0.0007798308144824024, -0.00010516069452877499, 0.0001250922908861799, 4.9515628629081924e-06,
    -2.007876929895485e-05, -7.323600541984191e-07, 3.4291696920858064e-06, 3.4947620005221795e-07,
    -5.628892323366954e-07, -1.2305147322484172e-07, 6.307918750062723e-08, 2.2589340056242346e-08,
)  # fmt: skip


@intrinsic
def _two_to_the(typing_context: Any, exponent: Any) -> Any:
    """`2**exponent` for a whole number in a floating point type, by writing its exponent bits."""
    single = exponent == types.float32
    bits, fraction_bits, bias = (types.int32, 23, 127) if single else (types.int64, 52, 1023)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # By int32 for both types: before AVX-512 no vector instruction turns float64 into int64.
        whole = builder.fptosi(arguments[0], context.get_value_type(types.int32))
        if not single:
            whole = builder.sext(whole, context.get_value_type(bits))
        biased = builder.add(whole, context.get_constant(bits, bias))
        shifted = builder.shl(biased, context.get_constant(bits, fraction_bits))
        return builder.bitcast(shifted, context.get_value_type(exponent))

    return exponent(exponent), codegen
