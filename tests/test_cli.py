"""The command line from end to end: results on disk, one clear line for bad input, kill and resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm as bn
from batchnorm.cli import bench, run
from batchnorm.lab.nets import LeNet
from batchnorm.lab.references import load_weights, make_loader, weights_as_bytes

SHARED_DATA = Path(os.environ.get("BATCHNORM_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"no Fashion-MNIST at {SHARED_DATA}; set BATCHNORM_DATA to its folder"
)
SMALL = ["--train-samples", "96", "--test-samples", "48", "--epochs", "2"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHNORM_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the only field that may differ between equal runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_train_writes_its_results_and_prints_a_line_per_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *SMALL, "--output", "run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"epoch 2, batch size 16, train loss \d\.\d{6}, time \d+\.\d\d s, accuracy [01]\.\d{4}", printed[-2]
    )
    assert printed[-1].startswith("2 epochs of training in ")
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["config"]["norm"] == "batchnorm"
    assert (tmp_path / "run" / "curves.png").exists()
    assert "model" in torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)


def test_train_writes_under_runs_by_default(tmp_path: Path) -> None:
    assert run(["train", *SMALL, "--norm", "none"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("train-digits-tutorial-none")


def test_tutorial_protocol_prints_both_accuracies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["train", *SMALL, "--tutorial-protocol", "--output", "run"]) == 0
    assert "(test-batch statistics)" in capsys.readouterr().out
    first, _ = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(first["mean_loss"] / 16, rel=0.1)
    assert "accuracy_eval" in first


@pytest.mark.parametrize("norm", ["none", "handwritten", "torch"])
def test_every_norm_and_option_runs(norm: str, tmp_path: Path) -> None:
    options = [
        "--recipe",
        "fast",
        "--batch-size",
        "32",
        "--lr",
        "0.02",
        "--activation",
        "silu",
        "--seed",
        "3",
    ]
    options += ["--device", "cpu", "--dtype", "bfloat16", "--threads", "1", "--norm", norm]
    assert run(["train", *SMALL, *options, "--output", "run"]) == 0
    config = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert config["norm"] == norm
    assert (config["lr"], config["activation"], config["seed"], config["dtype"]) == (
        0.02,
        "silu",
        3,
        "bfloat16",
    )


def test_compare_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--norms", "torch,batchnorm", "--seeds", "2", *SMALL, "--output", "out"]) == 0
    printed = capsys.readouterr().out
    rows = [
        line.split() for line in printed.splitlines() if line.strip().startswith(("torch ", "batchnorm "))
    ]
    assert [row[0] for row in rows] == ["torch", "batchnorm"]
    assert rows[0][7] == "1.00"  # torch relative to torch
    assert rows[0][1:7] == rows[1][1:7]  # the same accuracies
    assert max(len(line) for line in printed.splitlines() if "results in" not in line) <= 80
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]) == 2


BENCH = ["bench", "--seconds", "0.0001", "--threads", "1", "--shapes"]


def test_bench_prints_tables_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", "bench.json", "--plot", "bench.png"]
    assert run([*BENCH, "2x3x4x4,500x100", "--no-nets", *files]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    rows = [line.split() for line in lines if line.startswith(("  2x3x4x4 ", "  500x100 "))]
    assert [row[0] for row in rows] == ["2x3x4x4", "500x100"] * 4 + ["2x3x4x4"] * 2
    assert all(float(number.replace(",", "")) > 0 for row in rows for number in row[1:])
    assert {len(row) for row in rows} == {9}
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["nets"] is None
    assert report["threads"] == 1
    for row, result in zip(rows, report["results"], strict=True):
        milliseconds = [result["timings"][name]["ms"] for name in ("torch.nn", "batchnorm", "floor")]
        assert [float(number) for number in row[1:4]] == pytest.approx(milliseconds, rel=0.05, abs=1e-4)
        assert row[4] == f"{milliseconds[0] / milliseconds[1]:.2f}"
        assert row[5] == f"{milliseconds[1] / milliseconds[2]:.2f}"
        saved = result["saved_bytes"]
        assert float(row[6]) == pytest.approx(saved["torch.nn"] / 1024, abs=0.51)
    summary = next(line.split() for line in lines if line.startswith("  forward+backward residual relu  "))
    means = report["speedups"]["forward+backward residual relu"]
    assert summary[3:6] == [f"{means['mean']:.2f}", "1", f"{means['worst']:.2f}"]
    assert max(len(line) for line in lines if not line.startswith(("floor", "no ", "medians"))) <= 80
    assert "cores" in lines[-1]
    assert lines[-1].endswith("1 thread")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_ctrl_c_in_a_bench_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.lab.bench.bench", interrupted)
    assert run(["bench", "--json", "bench.json"]) == 130
    assert capsys.readouterr().err == "batchnorm: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_bench_of_nets_and_without_a_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(bench.measure_nets, stack_size=4, batch=2, image_size=32, width=2)
    monkeypatch.setattr(bench, "measure_nets", small)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run([*BENCH, "4x6", "--cases", "forward", "--compile", "--json", "bench.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "torch.compile is left out: there is no C++ compiler (CXX, g++ or clang++)"
    nets = json.loads((tmp_path / "bench.json").read_text())["nets"]
    saved = next(line.split() for line in lines if line.startswith("  torch.nn "))
    assert float(saved[1]) == pytest.approx(nets["saved_bytes"]["torch.nn"] / 1024, abs=0.51)
    assert any(line.split()[:3] == ["without", "batch", "norm"] for line in lines)
    assert any(line.startswith("no forward+backward of a shape of 1,000,000 elements") for line in lines)


@needs_shared_data
def test_trains_on_a_slice_of_fashion_mnist(tmp_path: Path) -> None:
    options = [
        "--data",
        "fashion-mnist",
        "--data-dir",
        str(SHARED_DATA),
        "--recipe",
        "fast",
        "--batch-size",
        "32",
    ]
    options += ["--train-samples", "2000", "--test-samples", "1000", "--epochs", "3"]
    assert run(["train", *options, "--output", "run"]) == 0
    assert metrics(tmp_path / "run")[-1]["accuracy"] > 0.75
    assert run(["train", "--resume", "--output", "run"]) == 0  # the data folder is remembered


@needs_shared_data
def test_finds_the_data_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_DATA", str(SHARED_DATA))
    assert run(["train", "--data", "mnist", *SMALL, "--output", "run"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["config"]["data"] == "mnist"


def wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, see exit code 2, one line on stderr and nothing else; return the line."""
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err + printed.out
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--recipe", "slow"], "unknown recipe 'slow': expected one of tutorial, fast"),
        (["train", "--activation", "swish"], "unknown activation 'swish': expected one of relu"),
        (["train", "--norm", "x"], "unknown norm 'x'"),
        (["train", "--data", "x"], "unknown data 'x': expected one of digits, fashion-mnist, mnist"),
        (["train", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["train", "--device", "abacus"], "unknown device 'abacus'"),
        (["train", "--batch-size", "1"], "batch size 1 must be 2 or more"),
        (["train", "--batch-size", "many"], "--batch-size"),
        (["train", "--lr", "0"], "lr=0.0 must be above 0"),
        (["train", "--epochs", "-3"], "epochs -3 must be 1 or more"),
        (["train", "--train-samples", "1"], "train samples 1 must be 2 or more"),
        (["train", "--test-samples", "0"], "test samples 0 must be 1 or more"),
        (["train", "--no-such-option"], "--no-such-option"),
        (["train", "surplus"], "surplus"),
        (["no-such-command"], "no-such-command"),
        (["train", "--resume"], "--resume needs --output"),
        (["train", "--resume", "--output", "absent"], "there is no folder absent to resume from"),
        (["train", "--data", "mnist", "--data-dir", "absent"], "absent"),
        (["compare", "--norms", "torch,x"], "unknown norm 'x'"),
        (["compare", "--norms", ","], "one norm or more"),
        (["compare", "--norms", "torch,torch"], "each once"),
        (["compare", "--seeds", "0"], "1 seed or more"),
        (["bench", "--shapes", "4x6,vgg"], "unknown shape 'vgg': expected one of resnet50, lenet"),
        (["bench", "--shapes", "1x6"], "no more than one value per channel"),
        (["bench", "--cases", "backward"], "unknown case 'backward': expected one of forward"),
        (["bench", "--cases", ""], "--cases is empty"),
        (["bench", "--shapes", "4x6", "--cases", "forward+backward channels_last"], "needs a 4D or 5D"),
        (["bench", "--seconds", "0"], "seconds 0.0 must be above 0"),
        (["bench", "--seconds", "nan"], "seconds nan must be above 0"),
        (["bench", "--seconds", "soon"], "--seconds"),
        (["bench", "--threads", "0"], "threads 0 must be from 1 to 1024"),
        (["bench", "--json", "absent/bench.json"], "--json absent/bench.json cannot be written"),
        (["bench", "--plot", "."], "--plot . cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in wrong(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for command in ("train", "compare"):
        assert "out is not empty" in wrong([command, *SMALL, "--output", "out"], capsys)
    assert "holds no checkpoint.pt" in wrong(["train", "--resume", "--output", "out"], capsys)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_damaged_checkpoint_and_a_damaged_data_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *SMALL, "--output", "run"]) == 0
    capsys.readouterr()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 not really")
    assert "is damaged, or no checkpoint" in wrong(["train", "--resume", "--output", "run"], capsys)
    (tmp_path / "data").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "data" / f"{name}-ubyte.gz").write_bytes(b"not gzip")
    assert "train-images" in wrong(["train", "--data", "mnist", "--data-dir", "data"], capsys)


def test_resume_refuses_other_options_and_repeats_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *SMALL, "--output", "run"]) == 0
    capsys.readouterr()
    line = wrong(["train", "--resume", "--output", "run", "--batch-size", "8"], capsys)
    assert "has batch_size 16, not 8" in line
    before = metrics(tmp_path / "run")
    assert run(["train", "--resume", *SMALL, "--output", "run"]) == 0
    assert metrics(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


LONG = ["--data", "digits", "--epochs", "6", "--train-samples", "1400", "--test-samples", "100"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(["train", *LONG, "--output", str(folder)]) == 0
    return metrics(folder)


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run in a process of its own, which is not left behind where the test fails."""
    command = [sys.executable, "-m", "batchnorm", "train", *LONG, "--output", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["made", "checkpoint", "3"])
def test_a_killed_run_resumes_to_the_bit(
    moment: str, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL as soon as the folder is there, its first checkpoint is, or so many epochs are done."""
    folder = tmp_path / "run"

    def reached() -> bool:
        if moment == "made":
            return folder.exists()
        if moment == "checkpoint":
            return (folder / "checkpoint.pt").exists()
        return (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= int(moment)

    with started(folder) as process:
        wait_for(reached, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run(["train", *LONG, "--resume", "--output", str(folder)]) == 0
    assert metrics(folder) == uninterrupted
    assert not list(folder.glob(".*"))


def test_ctrl_c_leaves_a_checkpoint_that_resumes(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as process:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 1, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"go on with: batchnorm train --resume --output {folder}" in errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert run(["train", "--resume", "--output", str(folder)]) == 0
    assert metrics(folder) == uninterrupted


def test_help_names_every_command_and_choice() -> None:
    command = [sys.executable, "-m", "batchnorm"]
    printed = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "train" in printed
    assert "compare" in printed
    assert "bench" in printed
    printed = subprocess.run([*command, "train", "--help"], check=True, capture_output=True, text=True).stdout
    for name in ("fashion-mnist", "handwritten", "fast", "--tutorial-protocol", "--resume", "bfloat16"):
        assert name in printed


def test_without_the_lab_extra_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['typer'] = None; from batchnorm.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "batchnorm: typer is missing: pip install 'batchnorm[lab]'"


def test_a_folder_named_like_markup_and_a_baseline_that_is_not_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *SMALL, "--output", "a[b]"]) == 0
    assert "output in a[b]" in capsys.readouterr().out
    assert run(["compare", "--norms", "none,batchnorm", "--seeds", "1", *SMALL, "--output", "c[d]"]) == 0
    printed = capsys.readouterr().out
    assert "±" not in printed
    assert "torch" not in printed.splitlines()[4]
    assert "1 seed; results in c[d]" in printed


def test_recalibrate_a_model_that_is_a_batch_norm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone.py").write_text(
        "import torch, batchnorm\n"
        "def make(): return batchnorm.BatchNorm1d(3)\n"
        "def loader(): return [torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(["recalibrate", "alone:make", "--data", "alone:loader", "--output", "new.pt"]) == 0
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    torch.testing.assert_close(state["running_mean"], torch.tensor([2.0, 2.0, 4.0]))
    torch.testing.assert_close(state["running_var"], torch.tensor([2.0, 0.0, 2.0]))


def test_recalibrate_writes_a_new_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *SMALL, "--output", "run"]) == 0
    capsys.readouterr()
    arguments = ["recalibrate", "batchnorm.lab.nets:LeNet", "--weights", "run/checkpoint.pt"]
    assert run([*arguments, "--data", "digits", "--sequential", "--output", "new.safetensors"]) == 0
    printed = capsys.readouterr().out
    for layer in ("conv.1", "conv.5", "fc.1", "fc.4"):
        assert layer in printed
    found, wanted = LeNet(), LeNet()
    load_weights(found, tmp_path / "new.safetensors")
    load_weights(wanted, tmp_path / "run" / "checkpoint.pt")
    bn.recalibrate(wanted, make_loader("digits"), sequential=True)
    for (name, got), value in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(got, value), name
    content = (tmp_path / "new.safetensors").read_bytes()
    message = wrong([*arguments, "--data", "digits", "--output", "new.safetensors"], capsys)
    assert "nothing is overwritten" in message
    assert (tmp_path / "new.safetensors").read_bytes() == content


@pytest.mark.parametrize("output", ["folded.pt2", "folded.onnx"])
def test_fold_writes_a_model_that_runs_by_itself(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if output.endswith(".onnx"):
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = LeNet()
    net(torch.randn(64, 1, 28, 28))  # running statistics of some data
    (tmp_path / "net.pt").write_bytes(weights_as_bytes(net, ".pt"))
    arguments = ["fold", "batchnorm.lab.nets:LeNet", "--weights", "net.pt", "--example", "1x1x28x28"]
    assert run([*arguments, "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "BatchNorm2d 'conv.1'" in printed
    x = torch.randn(5, 1, 28, 28)
    if output.endswith(".onnx"):
        import onnx
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load(tmp_path / output))
        got = torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])
    else:
        got = torch.export.load(tmp_path / output).module()(x)
    torch.testing.assert_close(got, net.eval()(x), rtol=1e-4, atol=1e-4)
    assert "nothing is overwritten" in wrong([*arguments, "--output", output], capsys)


LENET = "batchnorm.lab.nets:LeNet"


@pytest.mark.parametrize(
    "command",
    [
        ["fold", LENET, "--example", "1x1x28x28", "--output", "a.pt2"],
        ["recalibrate", LENET, "--data", "digits", "--max-batches", "1", "--output", "a.pt"],
        ["doctor", LENET, "--json"],
    ],
    ids=lambda command: command[0],
)
def test_the_names_of_weights_may_have_a_wrappers_prefix(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in LeNet().state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, "ddp.pt")
    assert run([*command, "--weights", "ddp.pt"]) in (0, 1)
    printed = capsys.readouterr()
    assert "ddp.pt: took _orig_mod. and module. off the names of the weights" in printed.err
    assert "took" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recalibrate", "LeNet", "--data", "digits", "--output", "a.pt"], "package.module:function"),
        (["recalibrate", LENET, "--data", "x", "--output", "a.pt"], "unknown data 'x'"),
        (["recalibrate", LENET, "--data", "digits", "--output", "a.txt"], "must end in"),
        (["recalibrate", LENET, "--data", "digits", "--output", "a.pt", "--weights", "b.pt"], "no file b.pt"),
        (
            ["recalibrate", LENET, "--data", "digits", "--output", "a.pt", "--max-batches", "0"],
            "max_batches=0",
        ),
        (["recalibrate", "torch.nn:Identity", "--data", "digits", "--output", "a.pt"], "no batch norm"),
        (["fold", LENET, "--output", "a.pt2"], "either --example or --data"),
        (["fold", LENET, "--example", "1x1x28", "--output", "a.pt2"], "Conv2d 'conv.0'"),
        (["fold", LENET, "--example", "1x0x28", "--output", "a.pt2"], "must be the sizes of an input"),
        (["fold", LENET, "--example", "1x1x28x28", "--output", "a.bin"], "must end in .pt2 or .onnx"),
    ],
)
def test_wrong_models_weights_and_data(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in wrong(arguments, capsys)
    assert list(tmp_path.iterdir()) == []
