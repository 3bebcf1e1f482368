"""Compiles every Triton kernel to machine code for three GPUs, and prints how many; run by the tests.

Ampere, Hopper and Blackwell. Triton needs no GPU for it, only that nothing is interpreted.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm.kernels.cuda import backward, forward

_TYPES = {
    "table": "*fp64", "partials": "*fp64", "coefficients": "*fp64", "num_batches_tracked": "*i64",
    "momentum": "fp32", "momentum_rest": "fp32", "eps": "fp32", "eps_rest": "fp32",
}  # fmt: skip
_OF_DATA = ("x", "y", "residual", "extra", "grad_y", "grad_x", "grad_z")
_OF_CHANNELS = (
    "weight", "bias", "running_mean", "running_var", "mean_given", "var_given", "grad_weight", "grad_bias",
)  # fmt: skip


def binary(kernel, capability, data, parameters, absent=(), warps=4, **constants):
    """The machine code of a kernel for these dtypes, with some of its tensors absent."""
    constants |= dict.fromkeys(absent)
    types = _TYPES | dict.fromkeys(_OF_DATA, f"*{data}") | dict.fromkeys(_OF_CHANNELS, f"*{parameters}")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return compile_kernel(source, target=target, options=options).asm["cubin"]


def main():
    """Each kernel, over runs and over rows; the dtypes and what is absent in turn."""
    count = 0
    for rows, capability, data, parameters in [
        (False, 80, "fp32", "fp32"),
        (True, 90, "bf16", "bf16"),
        (True, 100, "bf16", "fp32"),
    ]:
        shape = {"ROWS": rows, "HEIGHT": 16, "WIDTH": 32, "WIDE": tl.float32}
        dtypes = (capability, data, parameters)
        for activation, slope_from in [
            ("gelu", "x"),
            ("mish", "residual"),
            ("relu6", "output"),
            ("elu", "x"),
        ]:
            applied = shape | {"ACTIVATION": activation}
            sliding = applied | {"SLOPE_FROM": slope_from}
            no_extra = ("extra",) if slope_from == "x" else ()
            given = ("mean_given", "var_given") if slope_from == "x" else ()
            compiled = [
                binary(forward.apply, *dtypes, ("weight", "bias", *given), **applied),
                binary(backward.take_sums, *dtypes, ("grad_z", *no_extra) if no_extra else (), **sliding),
                binary(backward.grad, *dtypes, ("grad_z", *no_extra), **sliding),
            ]
            count += len([code for code in compiled if len(code) > 0])
        all_of_it = shape | {"ACTIVATION": "tanh"}
        compiled = [
            binary(forward.take_moments, *dtypes, **shape),
            binary(forward.normalise, *dtypes, ("residual",), **all_of_it),
            binary(forward.merge_moments, *dtypes, PARTS=8, WIDTH=4),
            binary(backward.merge_sums, *dtypes, PARTS=8, WIDTH=4, WIDE=tl.float32),
            binary(
                backward.differentiate_whole, *dtypes, ("grad_weight",), **all_of_it, SLOPE_FROM="residual",
                BY_BATCH=True,
            ),
        ]  # fmt: skip
        count += len([code for code in compiled if len(code) > 0])
    # Sizes of 1 are constants to Triton: one channel, and one position.
    single = {"WIDE": tl.float32, "channels": 1, "positions": 1, "HEIGHT": 16, "WIDTH": 1}
    for rows in (False, True):
        shape = single | {"ROWS": rows}
        applied, dtypes = shape | {"ACTIVATION": "relu"}, (90, "fp16", "fp32")
        compiled = [
            binary(forward.take_moments, *dtypes, **shape),
            binary(forward.apply, *dtypes, **applied),
            binary(forward.normalise, *dtypes, **applied),
            binary(backward.take_sums, *dtypes, ("extra",), **applied, SLOPE_FROM="x"),
            binary(backward.grad, *dtypes, ("extra",), **applied, SLOPE_FROM="x"),
            binary(
                backward.differentiate_whole, *dtypes, ("extra",), **applied, SLOPE_FROM="x", BY_BATCH=True
            ),
        ]  # fmt: skip
        count += len([code for code in compiled if len(code) > 0])
    merging = {"PARTS": 1, "WIDTH": 1, "channels": 1}
    count += len(binary(forward.merge_moments, 90, "fp16", "fp32", **merging)) > 0
    count += len(binary(backward.merge_sums, 90, "fp16", "fp32", **merging, WIDE=tl.float32)) > 0
    double = {"ROWS": True, "HEIGHT": 8, "WIDTH": 8, "WIDE": tl.float64, "ACTIVATION": "silu"}
    count += len(binary(forward.normalise, 90, "fp64", "fp64", **double)) > 0
    print(count, "kernels compiled")


if __name__ == "__main__":
    main()
