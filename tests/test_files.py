"""Files are written whole or not at all, and new ones over nothing."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import batchnorm
from batchnorm import files
from batchnorm.files import check_new_file, write_atomically, write_new_file


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_write_atomically_keeps_the_old_file_when_it_fails(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_atomically, write_new_file])
def test_a_new_file_is_whole_and_readable(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.pt"
    check_new_file("--output", path, (".pt",))
    write(path, b"new")
    assert path.read_bytes() == b"new"
    umask = os.umask(0o077)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_written_again_is_readable_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    old = tmp_path / "old.pt"
    old.write_bytes(b"precious")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        check_new_file("--output", old, (".pt",))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        write_new_file(old, b"new")
    assert old.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [old]


def test_a_path_that_cannot_become_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.pt or \.onnx"):
        check_new_file("--output", tmp_path / "new.bin", (".pt", ".onnx"))
    with pytest.raises(ValueError, match="cannot be written"):
        check_new_file("--output", tmp_path / "nowhere" / "new.pt", (".pt",))


def imported(path: Path) -> set[str]:
    """The modules that a file names in its imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_library_never_imports_the_lab() -> None:
    root = Path(batchnorm.__file__).parent
    library = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("lab", "cli")]
    assert len(library) > 50
    for path in library:
        assert not [name for name in imported(path) if name.startswith("batchnorm.lab")], path
