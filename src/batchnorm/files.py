"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the process dies, it is the old one or the new one, whole.

    Whoever could read the old one can read the new one; of no old one, whoever may read new files here.
    """
    with _written_beside(path, content) as temporary:
        os.replace(temporary, path)


def check_new_file(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """ValueError unless the path has one of the suffixes, is free, and its folder can be written to."""
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{option} {path} is there already: give a new file, nothing is overwritten")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: give a file in a folder that can be written to")


def write_new_file(path: Path, content: bytes) -> None:
    """As `write_atomically`, but never over another file.

    Raises:
        ValueError: in the meantime there is one.
    """
    with _written_beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise ValueError(f"{path} is there already: nothing is overwritten") from None


@contextmanager
def _written_beside(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file with the content in the folder of `path`, which is gone at the end."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_mode_of(path))  # temporary files are the user's alone
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _mode_of(path: Path) -> int:
    """The permissions of a file, or of a new one."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0o077)
        os.umask(umask)
        return 0o666 & ~umask
