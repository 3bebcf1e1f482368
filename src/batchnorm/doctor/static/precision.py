"""Parameters and statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject

HALF = (torch.float16, torch.bfloat16)


@check(
    "BN113",
    "half precision",
    severity="warning",
    why="A running average moves by less than a half-precision number can show and stands still; "
    "variances above 65504 become inf in float16.",
    fix="Keep batch norms in float32 (autocast instead of model.half()); report.fix('BN113') does, also "
    "for the optimizer's state.",
    needs_data=False,
)
def half(check: Check, subject: Subject) -> Iterator[Finding]:
    """Parameters or buffers in `HALF`: a warning for the running variance in training mode, else a note."""
    for name, layer in subject.batch_norms.items():
        tensors = chain(layer.named_buffers(recurse=False), layer.named_parameters(recurse=False))
        low = {own: tensor.dtype for own, tensor in tensors if tensor.dtype in HALF}
        if low:
            dtype = str(next(iter(low.values()))).removeprefix("torch.")
            yield check.finding(
                name,
                f"{', '.join(low)} in {dtype}",
                severity="warning" if layer.training and "running_var" in low else "note",
                dtype=dtype,
                tensors=len(low),
                training=layer.training,
            )
