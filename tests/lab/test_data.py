"""Tests of the lab's data sets: reading, finding and downloading files, and the Dataset operations."""

import gzip
import hashlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest
import requests
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchnorm.lab import data
from batchnorm.lab.data import DATASETS, DataError, Dataset, load, read_idx

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("a test touched the network")

    monkeypatch.delenv("BATCHNORM_DATA", raising=False)
    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def contents(train: int = 12, test: int = 5, seed: int = 0) -> dict[str, bytes]:
    """The four IDX files of a small random data set, by name without .gz."""
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(0, 256, (train, 28, 28)),
        rng.integers(0, 10, train),
        rng.integers(0, 256, (test, 28, 28)),
        rng.integers(0, 10, test),
    ]
    return dict(zip(FILES, map(idx, arrays), strict=True))


def write(folder: Path, files: dict[str, bytes], packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (folder / name).write_bytes(content)
    return folder


def pixels(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content[16:]), dtype=torch.float32).reshape(-1, 1, 28, 28) / 255


def small(train: torch.Tensor, test: torch.Tensor) -> Dataset:
    return Dataset("small", train, torch.arange(len(train)), test, torch.arange(len(test)))


# Reading one IDX file


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), packed=st.booleans(), seed=st.integers(0, 99)
)
def test_idx_round_trip(tmp_path: Path, shape: list[int], packed: bool, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    tensor = read_idx(path)
    assert tensor.dtype == torch.uint8
    assert np.array_equal(tensor.numpy(), array)


def test_idx_path_may_be_a_string(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(np.arange(3)))
    assert read_idx(str(tmp_path / "a")).tolist() == [0, 1, 2]


GOOD = idx(np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated header, 0 of 4 magic bytes"),
        (GOOD[:3], "truncated header, 3 of 4 magic bytes"),
        (GOOD[:10], "truncated header, 6 of 8 dimension bytes"),
        (GOOD[:12], "truncated, 0 of 12 bytes"),
        (GOOD[:-1], "truncated, 11 of 12 bytes"),
        (GOOD + b"x", "trailing bytes after the 12"),
        (b"PNG!" + GOOD, "not an IDX file of 1 to 3 dimensions, it starts with 504e4721"),
        (b"\0\0\x08\0", "not an IDX file of 1 to 3 dimensions"),
        (b"\0\0\x08\4" + bytes(20), "not an IDX file of 1 to 3 dimensions"),
        (b"\0\0\x0d" + GOOD[3:], "expected unsigned bytes .* found type 0x0d"),
        (idx(np.zeros((0, 28, 28))), r"the header says \(0, 28, 28\); expected 1 to"),
        (b"\0\0\x08\3" + b"\xff" * 12, r"the header says \(4294967295, .*expected 1 to"),
    ],
)
def test_idx_rejects_malformed_content(tmp_path: Path, content: bytes, message: str, packed: bool) -> None:
    path = tmp_path / ("bad.gz" if packed else "bad")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def flip(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 0xFF
    return bytes(changed)


PACKED = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 500)))


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        PACKED[:5],
        PACKED[: len(PACKED) // 2],
        PACKED[:-4],
        flip(PACKED, 12),
        flip(PACKED, -6),
        PACKED + b"junk",
    ],
    ids=["not gzip", "cut header", "cut stream", "cut trailer", "bad deflate", "bad sum", "junk behind"],
)
def test_idx_rejects_corrupt_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_idx_reads_no_more_than_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(2**24)))
    with pytest.raises(DataError, match="trailing bytes"):
        read_idx(path)


def test_idx_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.gz: no such file"):
        read_idx(tmp_path / "absent.gz")


def test_idx_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file"):
        read_idx(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_idx_does_not_wait_for_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="expected a file"):
        read_idx(tmp_path / "pipe")


def test_idx_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_bytes(GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read_idx(tmp_path / "a")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40), packed=st.booleans())
def test_idx_raises_nothing_but_data_error(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / ("fuzz.gz" if packed else "fuzz")
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_idx(path)


# Loading the four files of a data set


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_load_values(tmp_path: Path, name: str, packed: bool) -> None:
    files = contents()
    write(tmp_path / name, files, packed)
    dataset = load(name, tmp_path)
    assert dataset.name == name
    assert dataset.num_classes == 10
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.float32
    assert torch.equal(dataset.train_images, pixels(files[FILES[0]]))
    assert torch.equal(dataset.test_images, pixels(files[FILES[2]]))
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert dataset.train_labels.tolist() == list(files[FILES[1]][8:])
    assert dataset.test_labels.tolist() == list(files[FILES[3]][8:])


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (FILES[0], np.zeros((12, 28, 27)), r"expected shape \(N, 28, 28\), found \(12, 28, 27\)"),
        (FILES[2], np.zeros(5), r"expected shape \(N, 28, 28\), found \(5,\)"),
        (FILES[1], np.zeros((12, 1)), r"expected 12 labels.* found shape \(12, 1\)"),
        (FILES[1], np.zeros(11), r"expected 12 labels.* found shape \(11,\)"),
        (FILES[2], np.zeros((6, 28, 28)), r"expected 6 labels.* found shape \(5,\)"),
        (FILES[3], np.array([0, 9, 10, 3, 4]), "expected labels 0 to 9, found 10"),
        (FILES[0], np.zeros((0, 28, 28)), r"the header says \(0, 28, 28\)"),
    ],
)
def test_load_rejects_wrong_contents(tmp_path: Path, file: str, array: np.ndarray, message: str) -> None:
    write(tmp_path / "mnist", contents() | {file: idx(array)})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / "mnist") in str(caught.value)


def test_load_names_the_folder_that_stands_for_a_file(tmp_path: Path) -> None:
    write(tmp_path / "mnist", contents())
    path = tmp_path / "mnist" / f"{FILES[1]}.gz"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="expected a file"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["MNIST", "cifar10", ""])
def test_load_unknown_name(name: str) -> None:
    with pytest.raises(
        DataError, match=f"unknown data set '{name}'; expected one of digits, fashion-mnist, mnist"
    ):
        load(name)


def test_data_error_is_a_value_error() -> None:
    assert issubclass(DataError, ValueError)


# Finding the folder


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("mnist", ""),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", ""),
    ],
)
def test_layouts(tmp_path: Path, name: str, below: str) -> None:
    write(tmp_path / below, contents())
    assert len(load(name, tmp_path).train_images) == 12
    assert len(load(name, str(tmp_path)).test_images) == 5


def test_gzip_is_preferred_to_plain(tmp_path: Path) -> None:
    write(tmp_path / "mnist", contents(train=3), packed=False)
    write(tmp_path / "mnist", contents(train=4), packed=True)
    assert len(load("mnist", tmp_path).train_images) == 4


def test_own_subfolder_is_preferred_to_direct_files(tmp_path: Path) -> None:
    write(tmp_path, contents(train=3))
    write(tmp_path / "mnist", contents(train=4))
    assert len(load("mnist", tmp_path).train_images) == 4


def test_each_data_set_gets_its_own_subfolder(tmp_path: Path) -> None:
    write(tmp_path / "mnist", contents(train=3))
    write(tmp_path / "fashion-mnist", contents(train=4))
    assert len(load("mnist", tmp_path).train_images) == 3
    assert len(load("fashion-mnist", tmp_path).train_images) == 4


@pytest.mark.parametrize("subfolder", ["mnist", "fashion-mnist", "MNIST", "FashionMNIST"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_direct_files_beside_a_subfolder_are_ambiguous(tmp_path: Path, name: str, subfolder: str) -> None:
    write(tmp_path, contents())
    (tmp_path / subfolder).mkdir()
    with pytest.raises(DataError, match=f"lacks {name}: .* missing from .* put all four into .*{name}"):
        load(name, tmp_path)


@pytest.mark.parametrize("folder", ["mnist", "MNIST", "MNIST/raw"])
def test_direct_files_in_the_other_data_sets_folder_are_refused(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, contents())
    with pytest.raises(DataError, match="lacks fashion-mnist"):
        load("fashion-mnist", tmp_path / folder)
    assert len(load("mnist", tmp_path / folder).train_images) == 12


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "mnist", contents())
    (tmp_path / "mnist" / f"{FILES[1]}.gz").unlink()
    (tmp_path / "mnist" / f"{FILES[2]}.gz").unlink()
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert f"{FILES[1]}.gz, {FILES[2]}.gz missing from {tmp_path / 'mnist'};" in message
    assert FILES[0] not in message
    assert "put all four into" in message


def test_named_folder_is_never_downloaded_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **kwargs: pytest.fail("downloaded"))
    with pytest.raises(DataError, match=f"data folder {tmp_path} lacks mnist"):
        load("mnist", tmp_path)
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"data folder {tmp_path} lacks mnist"):
        load("mnist")


def test_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        load("mnist", tmp_path / "absent")


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: no such folder"):
        load("mnist", tmp_path / "file")


def test_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "env" / "mnist", contents(train=3))
    write(tmp_path / "argument" / "mnist", contents(train=4))
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path / "env"))
    assert len(load("mnist", download=False).train_images) == 3
    assert len(load("mnist", tmp_path / "argument").train_images) == 4


def test_home_in_the_folder_name_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data" / "mnist", contents(train=3))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(load("mnist", "~/data").train_images) == 3


@pytest.mark.parametrize("variable", [None, ""])
def test_no_folder_and_no_download(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv("BATCHNORM_DATA", variable)
    with pytest.raises(DataError, match="give --data-dir or BATCHNORM_DATA"):
        load("mnist", download=False)


# Downloading: pooch.retrieve is real except where replaced, the HTTP transfer never is


def serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], bytes]) -> list[str]:
    """Let pooch get answer(url) instead of using HTTP; returns the list the URLs are recorded in."""
    urls = []

    def transfer(self: object, url: str, output_file: str, *args: object, **kwargs: object) -> None:
        urls.append(url)
        Path(output_file).write_bytes(answer(url))

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", transfer)
    return urls


def packed_files(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, bytes]:
    """Four small gzip files by name, whose sums take the place of the official ones."""
    packed = {f"{file}.gz": gzip.compress(content, mtime=0) for file, content in contents().items()}
    sums = {file: hashlib.md5(content).hexdigest() for file, content in packed.items()}
    monkeypatch.setitem(data._MD5, name, sums)
    return packed


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_download_goes_to_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    packed = packed_files(monkeypatch, name)
    urls = serve(monkeypatch, lambda url: packed[url.rsplit("/")[-1]])
    assert torch.equal(load(name).train_images, pixels(contents()[FILES[0]]))
    assert urls == [data._MIRRORS[name][0] + file for file in packed]
    assert sorted(os.listdir(tmp_path / "cache" / "batchnorm" / name)) == sorted(packed)
    load(name)
    assert len(urls) == 4


def test_download_falls_back_to_the_second_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_files(monkeypatch, "mnist")
    retrieve = pooch.retrieve
    first, second = data._MIRRORS["mnist"]
    tried = []

    def flaky(url: str, *args: object, **kwargs: object) -> str:
        tried.append(url)
        if url.startswith(first):
            raise requests.ConnectionError("first mirror is down")
        return retrieve(url, *args, **kwargs)

    serve(monkeypatch, lambda url: packed[url.rsplit("/")[-1]])
    monkeypatch.setattr(pooch, "retrieve", flaky)
    assert len(load("mnist").train_images) == 12
    assert tried == [mirror + file for file in packed for mirror in (first, second)]


def test_download_fails_on_all_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(url: str, *args: object, **kwargs: object) -> str:
        raise requests.ConnectionError("no route\nto host")

    monkeypatch.setattr(pooch, "retrieve", down)
    with pytest.raises(DataError) as caught:
        load("fashion-mnist")
    message = str(caught.value)
    for mirror in data._MIRRORS["fashion-mnist"]:
        assert f"{mirror}{FILES[0]}.gz: no route to host" in message
    assert "FOLDER/fashion-mnist and give --data-dir FOLDER" in message
    assert all(file in message for file in FILES)
    assert "\n" not in message


def test_download_with_a_wrong_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = serve(monkeypatch, lambda url: b"a login page")
    with pytest.raises(DataError, match=r"could not download mnist .*does not match"):
        load("mnist")
    assert urls == [mirror + f"{FILES[0]}.gz" for mirror in data._MIRRORS["mnist"]]
    assert os.listdir(tmp_path / "cache" / "batchnorm" / "mnist") == []


def test_broken_file_in_the_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_files(monkeypatch, "mnist")
    folder = tmp_path / "cache" / "batchnorm" / "mnist"
    folder.mkdir(parents=True)
    (folder / f"{FILES[0]}.gz").write_bytes(b"broken")
    serve(monkeypatch, lambda url: packed[url.rsplit("/")[-1]])
    assert len(load("mnist").train_images) == 12


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.raises(DataError, match="could not download mnist"):
        load("mnist")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("mnist", "pooch")])
def test_missing_library(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{module} cannot be imported .* pip install 'batchnorm\[lab\]'"):
        load(name)


# The digits


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_digits_shapes_and_types(digits: Dataset) -> None:
    assert digits.train_images.shape == (1437, 1, 28, 28)
    assert digits.test_images.shape == (360, 1, 28, 28)
    assert digits.train_labels.shape == (1437,)
    assert digits.test_labels.shape == (360,)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64


def test_digits_range(digits: Dataset) -> None:
    images = torch.cat([digits.train_images, digits.test_images])
    assert images.min() == 0
    assert images.max() == 1


def test_digits_are_stratified(digits: Dataset) -> None:
    train, test = digits.train_labels.bincount(minlength=10), digits.test_labels.bincount(minlength=10)
    assert ((test - (train + test) / 5).abs() < 1).all()


def test_digits_are_deterministic(digits: Dataset) -> None:
    again = load("digits", download=False)
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_labels, again.test_labels)


def test_digits_are_the_enlarged_originals_with_their_labels(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    enlarged = torch.nn.functional.interpolate(
        torch.tensor(originals).reshape(-1, 1, 8, 8).float() / 16, size=(28, 28), mode="bilinear"
    )

    def samples(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[bytes, int]]:
        return sorted(zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True))

    images = torch.cat([digits.train_images, digits.test_images])
    together = samples(images, torch.cat([digits.train_labels, digits.test_labels]))
    assert together == samples(enlarged, torch.tensor(labels))


def test_digits_ignore_the_data_folder(tmp_path: Path) -> None:
    assert len(load("digits", tmp_path / "absent").train_images) == 1437


# Dataset operations


def test_standardized_train_has_mean_0_and_std_1(digits: Dataset) -> None:
    images = digits.standardized().train_images.double()
    assert abs(images.mean()) < 1e-5
    assert abs(images.std(correction=0) - 1) < 1e-5
    assert digits.standardized().train_images.dtype == torch.float32


def test_standardized_test_uses_the_train_statistics() -> None:
    dataset = small(torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0))
    result = dataset.standardized()
    assert result.train_images.flatten().tolist() == [-1, 1]
    assert result.test_images.flatten().tolist() == [4]
    assert result.train_labels is dataset.train_labels
    assert dataset.train_images.flatten().tolist() == [0, 2]


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_standardized_refuses_constant_images(value: float) -> None:
    images = torch.full((50, 1, 28, 28), value)
    with pytest.raises(DataError, match=f"all training pixels are {value:g}"):
        small(images, torch.rand(2, 1, 28, 28)).standardized()


def test_to_changes_images_and_keeps_int64_labels(digits: Dataset) -> None:
    result = digits.to("cpu", torch.float64)
    assert result.train_images.dtype == result.test_images.dtype == torch.float64
    assert result.train_labels.dtype == result.test_labels.dtype == torch.int64
    assert torch.equal(result.test_images, digits.test_images.double())


def test_to_moves_every_tensor(digits: Dataset) -> None:
    result = digits.head(3, 2).to(torch.device("meta"))
    tensors = (result.train_images, result.train_labels, result.test_images, result.test_labels)
    assert all(tensor.is_meta for tensor in tensors)
    assert result.train_images.dtype == torch.float32


def test_head(digits: Dataset) -> None:
    result = digits.head(3, 2)
    assert torch.equal(result.train_images, digits.train_images[:3])
    assert torch.equal(result.train_labels, digits.train_labels[:3])
    assert torch.equal(result.test_images, digits.test_images[:2])
    assert torch.equal(result.test_labels, digits.test_labels[:2])


def test_head_of_more_than_there_is(digits: Dataset) -> None:
    assert len(digits.head(10**6, 10**6).train_images) == 1437


@pytest.mark.parametrize(("train", "test"), [(0, 1), (1, 0), (-1, 5)])
def test_head_below_one(digits: Dataset, train: int, test: int) -> None:
    with pytest.raises(DataError, match=f"got {train} and {test}"):
        digits.head(train, test)


# The real files, where a checkout has them

REAL = Path(os.environ.get("BATCHNORM_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_real_files(name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} files below {REAL}; set BATCHNORM_DATA to the folder that holds them")
    dataset = load(name, REAL)
    assert dataset.train_images.shape == (60000, 1, 28, 28)
    assert dataset.test_images.shape == (10000, 1, 28, 28)
    assert dataset.train_images.aminmax() == (0, 1)
    train, test = dataset.train_labels.bincount(), dataset.test_labels.bincount()
    if name == "fashion-mnist":
        assert train.tolist() == [6000] * 10
        assert test.tolist() == [1000] * 10
    else:
        assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert test.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_official_sums_are_those_of_the_real_files(name: str) -> None:
    if not (REAL / name / "MD5SUMS").is_file():
        pytest.skip(f"no MD5SUMS of {name} below {REAL}; set BATCHNORM_DATA to the folder that holds them")
    lines = (REAL / name / "MD5SUMS").read_text().split()
    assert dict(zip(lines[1::2], lines[::2], strict=True)) == data._MD5[name]
