"""The data sets the lab trains on, held in memory as tensors."""

import gzip
import importlib
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DATASETS = ("digits", "fashion-mnist", "mnist")

_SIDE = 28
_NUM_CLASSES = 10
_UINT8 = 0x08
# A header is a claim by an untrusted file; 1 GiB is twenty times the largest file read here.
_MAX_BYTES = 2**30

# The official sums of the gzip files.
_MD5 = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}
_FILES = tuple(_MD5["mnist"])

_MIRRORS = {
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
}

# Ours first, then torchvision's.
_FOLDERS = {"fashion-mnist": ("fashion-mnist", "FashionMNIST"), "mnist": ("mnist", "MNIST")}


class DataError(ValueError):
    """A data set that is unknown, cannot be found, or whose files are not what they should be."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Ten-class 28x28 grey images, split into a train and a test set.

    Images are floating point of shape (N, 1, 28, 28), as loaded float32 in [0, 1]; labels are int64
    of shape (N,) in 0..9.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes, 10 in every data set here."""
        return _NUM_CLASSES

    def standardized(self) -> "Dataset":
        """Shift and scale all images so that the training pixels have mean 0 and standard deviation 1.

        The mean and the (population) standard deviation are those of all training pixels together;
        the test images get the same shift and scale. Returns a new Dataset. Raises DataError if all
        training pixels are equal.
        """
        std, mean = torch.std_mean(self.train_images, correction=0)
        if std == 0:
            raise DataError(
                f"{self.name}: cannot standardize, all training pixels are {mean.item():g}; "
                "give training images that differ"
            )
        return replace(
            self,
            train_images=(self.train_images - mean) / std,
            test_images=(self.test_images - mean) / std,
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "Dataset":
        """Move all tensors to a device and, if a dtype is given, convert the images to it.

        Returns a new Dataset; labels stay int64.
        """
        return replace(
            self,
            train_images=self.train_images.to(device, dtype),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device, dtype),
            test_labels=self.test_labels.to(device),
        )

    def head(self, train: int, test: int) -> "Dataset":
        """Keep the first `train` training and the first `test` test samples, or all if there are fewer.

        Returns a new Dataset that shares memory with this one. Raises DataError if a count is below 1.
        """
        if train < 1 or test < 1:
            raise DataError(f"head needs at least 1 train and 1 test sample, got {train} and {test}")
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


def load(name: str, data_dir: str | Path | None = None, *, download: bool = True) -> Dataset:
    """Load one of DATASETS into memory.

    The MNIST kinds are read from `data_dir`, else from the folder in the environment variable
    BATCHNORM_DATA, else from the user's cache, into which they are downloaded unless `download` is
    false. A folder may hold the four IDX files, gzipped or not, in a subfolder of the data set's name,
    in torchvision's layout (FashionMNIST/raw, MNIST/raw), or directly if nothing shows that they could
    belong to the other data set. "digits" comes with scikit-learn and needs no folder.

    Returns a Dataset of float32 images in [0, 1]. Raises DataError if the name is unknown, or the
    files are missing, broken or cannot be downloaded.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    if name == "digits":
        return _load_digits()
    folder = _folder(name, data_dir, download)
    return Dataset(name, *_read_split(folder, "train"), *_read_split(folder, "t10k"))


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Returns a uint8 tensor of the 1 to 3 dimensions in the file's header. Raises DataError if the file
    is missing, unreadable, empty, not IDX, or longer or shorter than its header says.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file")
    # Opening a named pipe would wait for ever.
    if not os.path.isfile(path):
        raise DataError(f"{path}: expected a file, found a folder or a device")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(path, file)
    # BadGzipFile is an OSError.
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get a fresh copy of the file") from error


def _parse_idx(path: Path, file: BinaryIO | gzip.GzipFile) -> Tensor:
    shape = _parse_header(path, file)
    size = math.prod(shape)
    if not 0 < size <= _MAX_BYTES:
        raise DataError(f"{path}: the header says {shape}; expected 1 to {_MAX_BYTES} bytes")
    # The one byte more shows trailing bytes, and makes gzip check its sum.
    payload = file.read(size + 1)
    if len(payload) < size:
        raise DataError(f"{path}: truncated, {len(payload)} of {size} bytes; get a fresh copy of the file")
    if len(payload) > size:
        raise DataError(f"{path}: trailing bytes after the {size} of {shape}; get a fresh copy of the file")
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).reshape(shape)


def _parse_header(path: Path, file: BinaryIO | gzip.GzipFile) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4:
        raise DataError(f"{path}: truncated header, {len(magic)} of 4 magic bytes")
    if magic[:2] != b"\0\0" or not 1 <= magic[3] <= 3:
        raise DataError(f"{path}: not an IDX file of 1 to 3 dimensions, it starts with {magic.hex()}")
    if magic[2] != _UINT8:
        raise DataError(f"{path}: expected unsigned bytes (IDX type 0x08), found type {magic[2]:#04x}")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: truncated header, {len(header)} of {4 * magic[3]} dimension bytes")
    return tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4))


def _read_split(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    images_path = _file(folder, f"{prefix}-images-idx3-ubyte.gz")
    labels_path = _file(folder, f"{prefix}-labels-idx1-ubyte.gz")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE):
        raise DataError(f"{images_path}: expected shape (N, {_SIDE}, {_SIDE}), found {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{labels_path}: expected {len(images)} labels, one for each image in {images_path.name}, "
            f"found shape {tuple(labels.shape)}"
        )
    largest = int(labels.max())
    if largest >= _NUM_CLASSES:
        raise DataError(f"{labels_path}: expected labels 0 to {_NUM_CLASSES - 1}, found {largest}")
    return images.unsqueeze(1).float().div_(255), labels.long()


def _load_digits() -> Dataset:
    images, labels = _require("sklearn.datasets").load_digits(return_X_y=True)
    split = _require("sklearn.model_selection").train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return Dataset(
        "digits",
        _enlarge_digits(train_images),
        train_labels.long(),
        _enlarge_digits(test_images),
        test_labels.long(),
    )


def _enlarge_digits(images: Tensor) -> Tensor:
    images = images.reshape(-1, 1, 8, 8).float() / 16
    return torch.nn.functional.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)


def _folder(name: str, data_dir: str | Path | None, download: bool) -> Path:
    given = os.environ.get("BATCHNORM_DATA") or None if data_dir is None else data_dir
    if given is not None:
        return _find(name, Path(os.path.expanduser(given)))
    if download:
        return _download(name)
    raise DataError(f"{name}: no data folder given and download is off; give --data-dir or BATCHNORM_DATA")


def _find(name: str, base: Path) -> Path:
    if not os.path.isdir(base):
        raise DataError(f"data folder {base}: no such folder; give the one that holds the {name} files")
    best = min(_candidates(name, base), key=lambda folder: len(_missing(folder)))
    if missing := _missing(best):
        raise DataError(
            f"data folder {base} lacks {name}: {', '.join(missing)} missing from {best}; "
            f"get them from {_MIRRORS[name][-1]} and put all four into {base / name}"
        )
    return best


def _candidates(name: str, base: Path) -> list[Path]:
    ours, torchvision = _FOLDERS[name]
    folders = [base / ours, base / torchvision / "raw"]
    return folders if _is_ambiguous(name, base) else [*folders, base]


def _is_ambiguous(name: str, base: Path) -> bool:
    # All MNIST kinds use the same file names, so only the folders tell whose the files in base are.
    base = base.resolve()
    own_name = base.parent.name if base.name == "raw" else base.name
    subfolders = [folder for pair in _FOLDERS.values() for folder in pair]
    others = [folder for other, pair in _FOLDERS.items() if other != name for folder in pair]
    return own_name in others or any(os.path.isdir(base / folder) for folder in subfolders)


def _missing(folder: Path) -> list[str]:
    return [file for file in _FILES if not os.path.exists(_file(folder, file))]


def _file(folder: Path, file: str) -> Path:
    # The gzip file goes first: it is the one whose sum a download checks.
    packed = folder / file
    return packed if os.path.exists(packed) else folder / file.removesuffix(".gz")


def _download(name: str) -> Path:
    folder = Path(_require("pooch").os_cache("batchnorm")) / name
    for file in _FILES:
        _retrieve(name, file, folder)
    return folder


def _retrieve(name: str, file: str, folder: Path) -> None:
    pooch = _require("pooch")
    failures = []
    for mirror in _MIRRORS[name]:
        try:
            pooch.retrieve(mirror + file, f"md5:{_MD5[name][file]}", file, folder, progressbar=True)
            return
        # A failed request is an OSError, a wrong sum a ValueError.
        except (OSError, ValueError) as error:
            failures.append(f"{mirror}{file}: {' '.join(str(error).split())}")
    raise DataError(
        f"could not download {name} ({'; '.join(failures)}); "
        f"get the files {', '.join(_FILES)} by hand, put them into FOLDER/{name} and give --data-dir FOLDER"
    )


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} cannot be imported ({error}); run pip install 'batchnorm[lab]'") from error
