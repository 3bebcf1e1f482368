"""Corruption: which statistics to test with where the images are not like those of training.

Claim: on corrupted images batch norm's statistics of those images give a smaller error than those of
training, training gamma and beta to lower the entropy of the output a smaller one still, and of 8 images
statistics mixed with the source's a smaller one than their own.
Source: Schneider et al. 2020, Improving robustness against common corruptions by covariate shift adaptation,
figures 2 and 3; Wang et al. 2021, Tent, table 2 (CIFAR-10-C, severity 5: 43.5, 20.4 and 18.6 % error).
Refuted by: one of those three differences not above 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lab.data import Dataset
from batchnorm.lab.why.classifiers import ConvNet, error, fit, images
from batchnorm.lab.why.corruptions import CORRUPTIONS, SEVERITIES
from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult
from batchnorm.lab.why.theme import Theme, label_ends, panels

_TRAIN, _EPOCHS = {"quick": 8000, "full": 60000}, {"quick": 4, "full": 10}
_TEST = {"quick": 1000, "full": 10000}
_SEVERITIES: dict[Scale, tuple[int, ...]] = {"quick": (1, 3, 5), "full": SEVERITIES}
_BATCH, _LR = 64, 0.1
# The target's batches, as in Tent's CIFAR experiments; its rate is Adam's in `bn.adapt`.
_TARGET_BATCH = 200
FEW: dict[Scale, tuple[int, ...]] = {"quick": (2, 8, 32, 128), "full": (2, 4, 8, 16, 32, 64, 128, 256)}
_FEW_IMAGES = 8
_PRIOR = 16

Adapted = Callable[[nn.Module, list[Tensor]], nn.Module]

_WAYS: dict[str, Adapted] = {
    "source": lambda model, batches: model,
    "batch": lambda model, batches: bn.adapt(model, batches),
    "entropy": lambda model, batches: bn.adapt(model, batches, entropy_epochs=1),
}
