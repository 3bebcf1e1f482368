"""Real models of six libraries through every verb; `python -m benchmarks.zoo` tries all of them."""

import importlib.util
import subprocess
import sys

import pytest

from benchmarks.zoo.examine import examine
from benchmarks.zoo.libraries import LIBRARIES

# One of each pattern: what carries its activation, branches, frozen ones, shapes, code that computes.
MODELS = {
    "timm": [
        "resnet10t", "regnety_002", "mobilenetv4_conv_small_035", "mobilenetv3_small_050", "ghostnet_050",
        "repvgg_a0", "levit_128s", "lcnet_035", "test_byobnet", "test_efficientnet", "test_resnet",
        "shvit_s1",
    ],
    "torchvision": ["mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5"],
    "transformers": [
        "mobilenet_v1", "mobilenet_v2", "efficientnet", "levit", "rt_detr", "detr", "segformer", "speecht5",
        "wav2vec2_conformer", "patchtst", "cvt",
    ],
    "smp": ["segformer_resnet18", "unet_tu-resnet10t"],
    "monai": ["unet_3d", "segresnet_2d", "densenet_2d", "resnet_3d"],
    "ultralytics": ["yolov8n-cls", "yolov3-tiny"],
}  # fmt: skip
# What the doctor rightly says of models as they are built, see docs/zoo.md.
RIGHT = {
    "BN106": {"mobilenet_v1", "mobilenet_v2", "efficientnet"},  # TensorFlow's momentum
    "BN203": None,  # four samples are few
}
_MODULES = {"smp": "segmentation_models_pytorch"}


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library, names in MODELS.items() for name in names]
)
def test_every_verb(library: str, name: str) -> None:
    module = _MODULES.get(library, library)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'batchnorm[zoo]'")
    entries = LIBRARIES[library]()
    if name not in entries:
        pytest.skip(f"this {library} has no {name}")
    result = examine(entries[name], quick=True)
    assert result.failures == {}
    assert result.taken == result.norms
    assert result.missed == []
    unseen = [entry for entry in result.left if entry.endswith("the example does not run it")]
    assert result.folded + result.multiply_adds + len(unseen) == result.norms + result.frozen
    assert all(error <= 1e-8 for error in result.errors.values()), result.errors
    assert result.fold_error <= 1e-5
    wrong = [f for f in result.findings if not _is_right(f.split(": ")[1].split()[0], name)]
    assert wrong == []


def _is_right(code: str, name: str) -> bool:
    return code in RIGHT and (RIGHT[code] is None or name in RIGHT[code])  # type: ignore[operator]


def test_there_are_thirty_of_them() -> None:
    assert sum(map(len, MODELS.values())) >= 30
    assert set(MODELS) == set(LIBRARIES)


def test_an_import_of_the_package_imports_none_of_them() -> None:
    names = ("timm", "torchvision", "transformers", "monai", "ultralytics", "lightning")
    code = f"import batchnorm, sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
