"""Machine code of the CPU kernels on disk: kept, damaged, of somebody else, and where it cannot be."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import pytest

from batchnorm.kernels.cpu import machine_code
from tests.kernels.cpu_checks import CPU, in_process

pytestmark = CPU


STEP = (
    "x = torch.randn(16, 8, 50, 50, requires_grad=True);"
    " bn.BatchNorm2d(8, activation='relu')(x).sum().backward();"
)


def test_a_warm_cache_does_without_numba(tmp_path):
    code = f"import sys, torch, batchnorm as bn; {STEP} print('numba' in sys.modules)"
    assert in_process(code, BATCHNORM_CACHE=str(tmp_path)).strip() == "True"
    assert in_process(code, BATCHNORM_CACHE=str(tmp_path)).strip() == "False"
    files = sorted(tmp_path.iterdir())
    assert files
    assert {file.suffix for file in files} == {".o"}


def small_function(name):
    def build():
        import numpy as np

        from batchnorm.kernels.cpu import runs

        return runs.apply_runs(np.float32, None, False, False)

    return machine_code.load(name, build, {})


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:-7], lambda c: c[:-1] + b"x", lambda c: b"y" + c[1:]]
)
def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert small_function("small")
    again = file.read_bytes()
    assert again[:32] == hashlib.sha256(again[32:]).digest()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_can_write_is_not_run(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    file.chmod(mode)
    assert small_function("small")
    assert file.stat().st_mode & 0o777 == 0o600  # compiled and written again


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_file_of_somebody_else_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    written, status = file.stat().st_mtime_ns, os.fstat
    assert small_function("small")
    assert file.stat().st_mtime_ns == written

    def of_a_stranger(descriptor):
        found = list(status(descriptor))
        found[stat.ST_UID] = os.getuid() + 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", of_a_stranger)
    assert small_function("small")
    assert file.stat().st_mtime_ns > written


def test_no_home_to_keep_machine_code_in(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BATCHNORM_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert machine_code.cache_folder() is None
    assert small_function("small")


def test_a_cache_that_is_read_only(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o555)
    if os.access(tmp_path / "cache", os.W_OK):  # root writes wherever it likes
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    assert small_function("small")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "some" / "where"))
    assert small_function("small")
    assert [file.suffix for file in (tmp_path / "some" / "where").iterdir()] == [".o"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("BATCHNORM_CACHE", str(blocked / "below"))
    assert small_function("small")
    assert blocked.read_text() == "not a folder"
