"""Machine code of the kernels: compiled by Numba once, kept on disk, and loaded without Numba ever after.

Numba's own cache has to import Numba and set up its types first, a second in every process; what is kept
here is object code, which loads in milliseconds. A file carries a digest of its content, and its name says
everything that the code depends on, so one that is cut short, altered or out of date is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import llvmlite.binding as llvm

_ENTRY = "batchnorm_entry"
_lock = Lock()
_engines: list[Any] = []  # code lives as long as the engine that loaded it


def load(
    name: str,
    build: Callable[[], tuple[Any, Callable[..., None]]],
    symbols: dict[str, int],
    interleaved: bool = True,
    avx512: bool = True,
) -> int:
    """The address of a C function, compiled now if the cache folder does not have it.

    Args:
        name: what tells this function from the others.
        build: makes its Numba signature and the function to compile.
        symbols: addresses of the outside functions that it calls, by name.
        interleaved: let loops take several vectors at a time.
        avx512: use it where the processor has it. Its masks make "0 where z <= 0, else the gradient" a load
            that waits for z, and with it what writes as much as it reads is a little slower.
    """
    with _lock:
        folder = cache_folder()
        path = None if folder is None else folder / f"{name}-{_fingerprint()}.o"
        code = None if path is None else _read(path)
        if code is None:
            code = _compile(*build(), interleaved, avx512)
            if path is not None:
                _write(path, code)
        for symbol, address in symbols.items():
            llvm.add_symbol(symbol, address)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        return int(engine.get_function_address(_ENTRY))


def cache_folder() -> Path | None:
    """Where machine code is kept: $BATCHNORM_CACHE, or a folder in the user's cache, if there is a home."""
    chosen = os.environ.get("BATCHNORM_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "batchnorm" / "kernels"
    except RuntimeError:  # a user without a home
        return None


@cache
def _fingerprint() -> str:
    """A digest of the kernels' sources, the compiler and the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for part in (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), _features()):
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def _compile(signature: Any, function: Callable[..., None], interleaved: bool, avx512: bool) -> bytes:
    """Object code of the function, under the name `batchnorm_entry`."""
    return bytes(target_machine(avx512).emit_object(optimised(signature, function, interleaved, avx512)))


def optimised(signature: Any, function: Callable[..., None], interleaved: bool, avx512: bool) -> Any:
    """LLVM's module of what `_compile` makes object code of."""
    from numba import cfunc  # only here: importing it takes a third of a second

    with _numba_not_optimising():
        compile_ = cfunc(signature, error_model="numpy", fastmath={"contract", "nsz"})
        compiled = compile_(getattr(function, "py_func", function))
        inner = compiled.native_name.removeprefix("cfunc.")
        module = llvm.parse_assembly(compiled.inspect_llvm() + _entry(signature, inner))
    module.verify()
    for other in module.functions:
        if not other.is_declaration and other.name != _ENTRY:
            # Numba's own wrapper, which needs Numba's runtime, goes then.
            other.linkage = "internal"
            # LLVM makes no vectors of a loop that calls a function, and large activations it left as such.
            other.add_function_attribute("alwaysinline")
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_interleaving = interleaved
    passes = llvm.create_pass_builder(target_machine(avx512), options)
    passes.getModulePassManager().run(module, passes)
    return module


@contextlib.contextmanager
def _numba_not_optimising() -> Iterator[None]:
    """Numba optimises each function by itself, a third of the time that a kernel takes to compile, before
    everything is optimised here once more. The lock keeps its other users from noticing."""
    from numba.core import config
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    with global_compiler_lock:
        _ = cpu_target.target_context  # made once, with the level of that moment
        level = vars(config)["OPT"]
        vars(config)["OPT"] = type(level)(0)
        try:
            yield
        finally:
            vars(config)["OPT"] = level


def _entry(signature: Any, inner: str) -> str:
    """A C function around the one that Numba makes, which returns a status and takes places for results."""
    kinds = [_LLVM_TYPES.get(str(argument), "ptr") for argument in signature.args]
    parameters = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(kinds))
    return f"""
define void @{_ENTRY}({parameters}) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %exception, {parameters})
  ret void
}}
"""


_LLVM_TYPES = {"int64": "i64", "float32": "float", "float64": "double"}


@cache
def target_machine(avx512: bool = True) -> Any:
    """This processor, as LLVM is to see it."""
    features = _features()
    if platform.machine() in ("x86_64", "AMD64") and not avx512:
        features += ",-avx512f"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="default", jit=True
    )


def _features() -> str:
    return str(llvm.get_host_cpu_features().flatten())


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            if not _is_ours(file.fileno()):
                return None
            content = file.read()
        digest, code = content[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def _is_ours(file: int) -> bool:
    """Whether nobody else can have written the file: what it holds is going to be run."""
    if not hasattr(os, "getuid"):
        return True
    status = os.fstat(file)
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _write(path: Path, code: bytes) -> None:
    # A folder that cannot be written costs time in the next process, nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        try:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
