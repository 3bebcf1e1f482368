"""The CPU kernels across every block and tile boundary, on 1, 2 and 3 threads, against the formula."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.kernels import choose, cpu
from batchnorm.kernels.cpu import groups, rows, slabs, team
from batchnorm.kernels.cpu.plan import (
    _COLUMNS_FOR_FOUR_ROWS,
    _GROUP_COLUMNS,
    _MANY_SAMPLES,
    _NEAR_BYTES,
    _SHORT_RUN,
    _SMALL_SAMPLE,
    _SMALL_SAMPLE_OF_SHORT_RUNS,
    _TILE_BYTES_OF_CACHED,
    _WIDE_ROW,
    plan,
)
from batchnorm.kernels.reference import ACTIVATIONS

# Largest error as a share of the largest term, for the same rounded inputs: order of sums, some roundings.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
DTYPES = tuple(TOLERANCE)
EPS = 1e-3
INPUTS = ("x", "weight", "bias", "residual")


@pytest.fixture(autouse=True)
def _small_tensors_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "pays", lambda *call: True)
    monkeypatch.setattr(team, "_WORTH_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def formula():
    """Batch norm written out in torch's operations, with the batch's statistics or the given ones."""

    def compute(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        *,
        eps: float,
        channel_dim: int,
        activation: str | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        dims = [dim for dim in range(x.ndim) if dim != channel_dim]
        shape = [1] * x.ndim
        shape[channel_dim] = -1
        if statistics is None:
            mean = x.mean(dims, keepdim=True)
            var = (x - mean).square().mean(dims, keepdim=True)
        else:
            mean, var = (values.reshape(shape) for values in statistics)
        y = (x - mean) / (var + eps).sqrt()
        if weight is not None:
            y = y * weight.reshape(shape)
        if bias is not None:
            y = y + bias.reshape(shape)
        if residual is not None:
            y = y + residual
        return y if activation is None else ACTIVATIONS[activation](y)

    return compute


@dataclass
class Case:
    """A normalisation by the kernels and by the formula, and what is to come out of both."""

    x: Tensor
    channel_dim: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    wanted: tuple[str, ...] = INPUTS
    eps: float = EPS
    grad: Tensor | None = None

    @property
    def options(self):
        return {"eps": self.eps, "channel_dim": self.channel_dim, "activation": self.activation}

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        found = {}
        for name in INPUTS:
            tensor = getattr(self, name)
            if tensor is not None:
                copy = torch.empty_like(tensor, dtype=dtype).copy_(tensor)
                tensor = copy.requires_grad_(name in self.wanted)
            found[name] = tensor
        return found

    def by_kernels(self):
        """The output, the moments (or None), and the gradients by name."""
        given_ = self.inputs(self.x.dtype)
        x, weight, bias, residual = given_.values()
        parameters = (weight, bias, *(self.statistics or ()))
        assert choose(x, self.channel_dim, parameters, residual) is cpu
        if self.statistics is None:
            y, moments = cpu.training(x, weight, bias, residual=residual, **self.options)
        else:
            y = cpu.inference(x, *self.statistics, weight, bias, residual=residual, **self.options)
            moments = None
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        return y, moments, self.gradients(y, given_)

    def by_formula(self, formula):
        given_ = self.inputs(torch.float64)
        statistics = None if self.statistics is None else tuple(s.double() for s in self.statistics)
        y = formula(*given_.values(), statistics=statistics, **self.options)
        return y, self.gradients(y, given_)

    def gradients(self, y, given_):
        asked = {
            name: tensor for name, tensor in given_.items() if tensor is not None and tensor.requires_grad
        }
        if not asked:
            assert not y.requires_grad
            return {}
        if self.grad is None:
            self.grad = torch.randn(y.shape).to(self.x.dtype)
        return dict(zip(asked, torch.autograd.grad(y, asked.values(), self.grad.to(y)), strict=True))

    def terms(self):
        """What the terms that make up each result may be as large as, in float64."""
        x, dim = self.x.double(), self.channel_dim
        dims = [d for d in range(x.ndim) if d != dim]
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        mean, var = (x.mean(dims), x.var(dims, correction=0)) if self.statistics is None else self.statistics
        invstd = (var.double() + self.eps).rsqrt()
        xhat = (x - mean.double().reshape(shape)) * invstd.reshape(shape)
        grad = 0 * x if self.grad is None else self.grad.double()
        scale = invstd if self.weight is None else invstd * self.weight.double()
        return {
            "x": (grad.abs() * scale.abs().reshape(shape)).max(),
            "weight": (grad * xhat).abs().sum(dims),
            "bias": grad.abs().sum(dims),
            "residual": grad.abs().max(),
        }

    def check(self, formula):
        tolerance = TOLERANCE[self.x.dtype]
        y, moments, gradients = self.by_kernels()
        expected, expected_gradients = self.by_formula(formula)
        size = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * size)
        if moments is not None:
            x = self.x.double()
            dims = [d for d in range(x.ndim) if d != self.channel_dim]
            mean, var = x.mean(dims), x.var(dims, correction=0)
            assert moments.count == x.numel() // x.shape[self.channel_dim]
            torch.testing.assert_close(
                moments.mean.double(), mean, rtol=tolerance, atol=tolerance * x.abs().max().item()
            )
            torch.testing.assert_close(moments.var().double(), var, rtol=tolerance, atol=tolerance * 1e-3)
        terms = self.terms()
        assert list(gradients) == list(expected_gradients)
        for name, gradient in gradients.items():
            assert gradient.dtype == self.x.dtype
            error = (gradient.double() - expected_gradients[name]).abs()
            bound = tolerance * torch.clamp(terms[name], min=1e-3)
            assert (error <= bound).all(), f"gradient of {name}: {(error / bound).max():.3} times the bound"


def normal(shape, dtype, channel_dim=1):
    """Normal numbers around another mean in each channel."""
    along = [-1 if dim == channel_dim else 1 for dim in range(len(shape))]
    return (torch.randn(shape) + torch.linspace(-1, 1, shape[channel_dim]).reshape(along)).to(dtype)


def affine(channels, dtype):
    return {"weight": torch.randn(channels).to(dtype), "bias": torch.randn(channels).to(dtype)}


def statistics(channels, dtype):
    return torch.randn(channels).to(dtype), (torch.rand(channels) + 0.1).to(dtype)


def kind(x, channel_dim):
    found = plan(x.shape, x.stride(), x.dtype, channel_dim, 1)
    return None if found is None else found.kind


# ------------------------------------------------------------------------- every block and tile boundary

B, G, W, T, M = slabs.BLOCK, _GROUP_COLUMNS, _WIDE_ROW, rows.TILE_COLUMNS, rows.MOST_ROWS
RUN, TILE = _SHORT_RUN, _TILE_BYTES_OF_CACHED // 4
N, S, SHORT = _MANY_SAMPLES, _SMALL_SAMPLE, _SMALL_SAMPLE_OF_SHORT_RUNS
F, FR = slabs.FIRST, rows.FIRST_ROWS
SHAPES = {
    "slabs": [
        (1, 2, RUN + 1), (2, 2, RUN + 1), (3, 5, 521), (3, 7, 49), (63, 3, RUN + 1),
        (N, 2, S // 2 + 1), (N - 1, 4, S // 4),
        *[(B // 64 + d, 5, 64) for d in (-1, 0, 1)], *[(2, TILE // 64 + d, 64) for d in (-1, 0, 1)],
        *[(2, 3, 2 * B + d) for d in (-1, 0, 1)],
        *[(1, 2, B + d) for d in (-1, 0, 1)], *[(3, 2, B + d) for d in (-1, 0, 1)],
        *[(2, 3, B // 2 + d) for d in (-1, 0, 1)], *[(B // 512 + d, 2, 512) for d in (-1, 0, 1)],
        (31, 2, 263), (2, 2, 2 * B + 1), (1, 3, 12289), (2, 2, TILE // 2 + 1), (1, 2, TILE), (1, 2, TILE + 1),
        *[(1, TILE // 1021 + d, 1021) for d in (-1, 0, 1)],
        *[(6, threads * _NEAR_BYTES // 256 + d, 64) for threads in (2, 3) for d in (-1, 0, 1)],
        (2, 3, TILE // 2 + 1), *[(1 + d, 2, F) for d in (0, 1, 2)],
        *[(3, 2, F + d) for d in (-1, 0, 1)],
    ],
    "groups": [
        (1, 2, 2), (2, 2, 2), (1, 2, 3), (2, 3, 2), (3, 2, 3), (1, 3, RUN), (2, 2, RUN - 1), (3, 7, 47),
        *[(3, G // 2 + d, 2) for d in (-1, 0, 1)], *[(2, G // RUN + d, RUN) for d in (-1, 0, 1)],
        (N - 1, 2, 2), (N, SHORT // 2 + 1, 2),
        *[(M + d, 23, 47) for d in (-1, 0, 1)], *[(rows.BLOCK // (43 * 47) + d, 43, 47) for d in (-1, 0, 1)],
        *[(groups.FIRST // 16 + d, 3, 16) for d in (-1, 0, 1)], (37, 211, 5), (4, 2 * G // 3 + 1, 3),
    ],
    "rows": [
        (1, 1, 2), (2, 1, B + 1),  # one channel is a column
        *itertools.product((2, 3), (1, 2, 3)),
        *[(n, c) for n in (2, 7) for c in (W // 2 - 1, W // 2, W // 2 + 1, W - 1, W, W + 1)],
        *[(5, T + d) for d in (-1, 0, 1)], (3, 2 * T), (2, 2 * T + 1), (2, 4099), (2 * M, 130),
        *[(rows.BLOCK // T + d, T + 1) for d in (-1, 0, 1)], *[(M + d, W) for d in (-1, 0, 1)],
        *[(M * W + d, 1) for d in (-1, 0, 1)], (M * W + W + 1, 1), (5477, 3), (1009, 31), (67, 127),
        *[(FR + d, W + 1) for d in range(-4, 5)], (3 * FR + 1, W), (3 * FR + 1, W + 1),
        # quarters and halves of the rows, and those left over
        *[(n, W + 1) for n in range(2, 10)],
        *[(n, _COLUMNS_FOR_FOUR_ROWS + d) for n in range(2, 10) for d in (-1, 0)],
        *[(W + d, 1) for d in (-1, 0, 1)], *[(2 * (W // 3) + d, 3) for d in (-1, 0, 1)],
        # many small samples, of short runs and of others
        (N, 2, 2), (N + 1, 3, 5), (N, 2, RUN + 1), (N + 3, 2, S // 2), (N, 4, 64), (5477, 3, 2),
        *[(N, SHORT // positions, positions) for positions in (2, 3, RUN)],
        *[(N + d, W // 4, 4) for d in range(3)], *[(8 * (W // 15) + d, 5, 3) for d in range(9)],
        *[(M + d, SHORT // 4, 4) for d in (-1, 0, 1)], *[(3 * FR + d, 13, 10) for d in (-1, 0, 1)],
    ],
}  # fmt: skip
GRID = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
# float32 on each number of threads, float64 on one of them in turn: every pair of the three occurs.
GRID_OF_THREADS = [
    (name, shape, dtype, threads)
    for i, (name, shape) in enumerate(GRID)
    for dtype in DTYPES
    for threads in ((1, 2, 3) if dtype == torch.float32 else (1 + i % 3,))
]


def test_the_grid_knows_the_sizes():
    # Should they change, so must the grid.
    assert (B, G, W, T, RUN, rows.BLOCK, M) == (4096, 2048, 128, 2048, 48, 262144, 256)
    assert (F, groups.FIRST, FR, _NEAR_BYTES) == (64, 512, 32, 32768)
    assert (N, S, SHORT) == (64, 256, 1024)
    # Among them are runs for which loops are compiled either way.
    plans = [plan(x.shape, x.stride(), x.dtype, 1, 1) for x in map(torch.empty, SHAPES["slabs"])]
    for avx512 in (True, False):
        assert {found.interleaves(avx512) for found in plans} == {True, False}


@pytest.mark.parametrize(("name", "shape", "dtype", "threads"), GRID_OF_THREADS, ids=str)
def test_every_boundary(name, shape, dtype, threads, formula):
    torch.set_num_threads(threads)
    assert team.size(2) == threads
    x = normal(shape, dtype)
    assert kind(x, 1) == name  # on one thread
    Case(x, **affine(shape[1], dtype)).check(formula)
    Case(x, **affine(shape[1], dtype), statistics=statistics(shape[1], dtype)).check(formula)


LAYOUTS = {
    "NC": lambda: (torch.randn(37, 5), 1),
    "NCL": lambda: (torch.randn(4, 5, 137), 1),
    "NCHW": lambda: (torch.randn(4, 5, 7, 9), 1),
    "NCDHW": lambda: (torch.randn(3, 5, 4, 7, 6), 1),
    "channels_last": lambda: (torch.randn(4, 5, 7, 9).to(memory_format=torch.channels_last), 1),
    "channels_last_3d": lambda: (torch.randn(2, 5, 3, 7, 2).to(memory_format=torch.channels_last_3d), 1),
    "NLC, channel_dim=-1": lambda: (torch.randn(4, 11, 5), 2),
    "NHWC, channel_dim=-1": lambda: (torch.randn(4, 3, 11, 5), 3),
    "CN, channel_dim=0": lambda: (torch.randn(5, 137), 0),
    "NHCW, channel_dim=2": lambda: (torch.randn(4, 3, 5, 11), 2),
    "one channel": lambda: (torch.randn(4, 1, 6, 7), 1),
    "one position": lambda: (torch.randn(11, 5, 1, 1), 1),
    "one sample": lambda: (torch.randn(1, 5, 6, 7), 1),
    "odd strides of size 1": lambda: (torch.randn(5 * 42).as_strided((1, 5, 6, 7), (7, 42, 7, 1)), 1),
    "rank 6": lambda: (torch.randn(2, 5, 2, 3, 2, 4), 1),
    "from the middle of memory": lambda: (torch.randn(7, 5, 9)[2:6], 1),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, training, formula):
    x, channel_dim = LAYOUTS[layout]()
    x = torch.empty_like(x, dtype=dtype).copy_(x) if layout != "odd strides of size 1" else x.to(dtype)
    channels = x.shape[channel_dim]
    given_ = None if training else statistics(channels, dtype)
    Case(x, channel_dim, **affine(channels, dtype), statistics=given_).check(formula)


# ------------------------------------------------------------------------------- what is there and wanted

SMALL = {"slabs": (3, 4, 263), "groups": (3, 4, 5), "rows": (37, 4), "rows of runs": (N, 4, 3)}
SUBSETS = [s for k in range(5) for s in itertools.combinations(INPUTS, k)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("present", [s for s in SUBSETS if "x" in s and "residual" not in s], ids=",".join)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_bias_are_optional(dtype, name, present, training, formula):
    shape = SMALL[name]
    parameters = {key: value for key, value in affine(shape[1], dtype).items() if key in present}
    given_ = None if training else statistics(shape[1], dtype)
    Case(normal(shape, dtype), **parameters, statistics=given_).check(formula)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", SMALL)
def test_only_what_requires_gradients_gets_them(name, activation, training, formula):
    shape = SMALL[name]
    x = normal(shape, torch.float32)
    for wanted in SUBSETS:
        for residual in (torch.randn(shape), None):
            given_ = None if training else statistics(shape[1], x.dtype)
            Case(
                x, **affine(shape[1], x.dtype), residual=residual, activation=activation, statistics=given_,
                wanted=wanted,
            ).check(formula)  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("asked", SUBSETS[1:], ids=",".join)
def test_gradients_of_some_inputs(asked, name, formula):
    shape = SMALL[name]
    tensors = dict(
        zip(
            INPUTS,
            (normal(shape, torch.float64), *affine(4, torch.float64).values(), torch.randn(shape)),
            strict=True,
        )
    )
    tensors = {key: value.double().requires_grad_() for key, value in tensors.items()}
    x, weight, bias, residual = tensors.values()
    options = {"eps": EPS, "channel_dim": 1, "activation": "silu"}
    y, _ = cpu.training(x, weight, bias, residual=residual, **options)
    expected = formula(x, weight, bias, residual, **options)
    grad = torch.randn_like(y)
    chosen = [tensors[key] for key in asked]
    found = torch.autograd.grad(y, chosen, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, chosen, grad), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------ running statistics


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_running_statistics_move_as_torchs(name, dtype, momentum):
    shape = SMALL[name]
    mean, var, counter = *statistics(shape[1], dtype), torch.tensor(7)
    exact_mean, exact_var = mean.double(), var.double()
    for step in range(1, 4):
        x = normal(shape, dtype)
        assert choose(x, 1, (mean, var), moving=True) is cpu
        y = cpu.training_and_moving(
            x, None, None, mean, var, counter, momentum=momentum, eps=EPS, channel_dim=1, activation="relu"
        )
        expected = torch.nn.functional.batch_norm(
            x.double(), exact_mean, exact_var, training=True, momentum=momentum, eps=EPS
        ).relu()
        assert counter == 7 + step
        for found, wanted in ((y, expected), (mean, exact_mean), (var, exact_var)):
            tolerance = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def test_statistics_that_are_not_there_do_not_move():
    x = normal((3, 4, 5), torch.float32)
    mean, var, counter = torch.zeros(4), torch.ones(4), torch.tensor(0)
    options = {"eps": EPS, "channel_dim": 1}
    y = cpu.training_and_moving(x, None, None, None, None, None, momentum=0.1, **options)
    moved = cpu.training_and_moving(x, None, None, mean, var, None, momentum=0.1, **options)
    still, _ = cpu.training(x, None, None, **options)
    assert torch.equal(y, moved)
    assert torch.equal(y, still)
    kept = mean.clone(), var.clone()
    cpu.inference(x, mean, var, None, None, **options)
    assert torch.equal(mean, kept[0])
    assert torch.equal(var, kept[1])
    assert counter == 0


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_a_layer_equals_torch_nn(shape):
    ours, theirs = bn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    for step, training in enumerate([True, True, False, True, False]):
        x = [normal(shape, torch.float32).requires_grad_()]
        x.append(x[0].detach().clone().requires_grad_())
        grad = torch.randn(shape)
        for layer, tensor in zip((ours, theirs), x, strict=True):
            layer.train(training).zero_grad()
            layer(tensor).backward(grad)
        torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-4, atol=1e-5)
        for (name, found), wanted in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=f"{name}, step {step}")
        for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [0.0, 1.0, 1.9, 2.1, 30.0, 1e4])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("slabs", (300, 5, 64)), ("groups", (1200, 34, 31)), ("rows", (5000, 64)), ("rows", (1200, 2, 31))],
)
def test_a_mean_that_moves_from_block_to_block(name, shape, step):
    """A block is centred at the mean so far only where that is near its own."""
    samples = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = torch.randn(shape) + step * (samples // 256) + 100.0
    assert kind(x, 1) == name
    _, moments = cpu.training(x, None, None, eps=EPS, channel_dim=1)
    others = [dim for dim in range(x.ndim) if dim != 1]
    torch.testing.assert_close(moments.mean, x.double().mean(others), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(moments.var(), x.double().var(others, correction=0), rtol=2e-6, atol=0.0)
