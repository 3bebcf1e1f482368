"""A folded model as a file that runs without its code: an exported program, or ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim


def exported_program(model: nn.Module, example: Tensor) -> bytes:
    """The model as `torch.export.load` reads it (.pt2), for any batch size."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
        program = torch.export.export(model, (_batch(example),), dynamic_shapes=({0: Dim.AUTO},))
        torch.export.save(program, file)
    return file.getvalue()


def onnx_model(model: nn.Module, example: Tensor) -> bytes:
    """The model in ONNX, for any batch size.

    Raises:
        ValueError: the packages that write it are not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("to write .onnx: pip install onnx onnxscript") from None
    # Of torchvision, which a model without its operators does not need.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            model, (_batch(example),), dynamo=True, dynamic_shapes=({0: Dim.AUTO},), verbose=False
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


# How a folded model is written, by the suffix of the file.
WRITERS: dict[str, Callable[[nn.Module, Tensor], bytes]] = {".pt2": exported_program, ".onnx": onnx_model}


def _batch(example: Tensor) -> Tensor:
    """At least two samples: of one, the exporter takes the batch size for a constant."""
    return example if example.shape[0] > 1 else torch.cat([example, example])
