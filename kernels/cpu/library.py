"""Compile the C kernels for this very CPU, once, and load them.

The result lies in the cache folder under a name made of everything it depends on, so that another
machine, another compiler or another version of the sources never meets it.  Without a C compiler, or
on a CPU without AVX-512, there is no library and `unavailable` says why; torch computes then.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("gcc", "cc")  # GNU's OpenMP is torch's: another one would have threads of its own
_TIMEOUT_S = 120


class LibraryUnavailable(RuntimeError):
    """There is no library; the message says why and what would change that."""


def unavailable() -> str | None:
    """Say why the C kernels cannot be used here; None when they can.  Compiles them if need be."""
    try:
        load()
    except LibraryUnavailable as error:
        return str(error)
    return None


def load() -> ctypes.CDLL:
    """Return the library of this machine.

    Raises:
        LibraryUnavailable: it cannot be had here.
    """
    loaded = _load()
    if isinstance(loaded, LibraryUnavailable):
        raise loaded
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | LibraryUnavailable:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return LibraryUnavailable("this CPU has no AVX-512")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *_COMPILERS))), None)
    if compiler is None:
        return LibraryUnavailable("no C compiler was found; install gcc or name one in CC")
    try:
        with _folder() as folder:
            path = folder / f"kernels-{_identity(compiler)}.so"
            with suppress(OSError):  # not there yet, or no library
                return _declare(ctypes.CDLL(str(path)))
            _compile(compiler, path)
            return _declare(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip() or type(error).__name__
        return LibraryUnavailable(f"{compiler} could not build the C kernels: {said.splitlines()[-1]}")


@contextmanager
def _folder() -> Iterator[Path]:
    """The cache folder; where nothing can be kept, one that is gone after loading, so every process builds its own."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftsmith" / "kernels"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home has a RuntimeError
        cache = None
    if cache is not None and os.access(cache, os.W_OK):
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="draftsmith-kernels-") as folder:
        yield Path(folder)


def _identity(compiler: str) -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    digest.update(version.stdout.encode())
    digest.update(b"".join(_cpu_lines()))
    return digest.hexdigest()[:16]


def _cpu_lines() -> list[bytes]:
    """What tells one kind of CPU from another, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return []
    return [line for line in lines if line.split(b"\t")[0].strip() in (b"model name", b"flags")]


def _compile(compiler: str, path: Path) -> None:
    """Build beside the place and move there, so that nobody loads half a file."""
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", unfinished, "-lm"]
        subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        os.chmod(unfinished, 0o755)
        with open(unfinished, "rb") as file:  # a file cut short by a power failure would kill whoever loads it
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.draft.argtypes = [pointer, pointer, pointer, pointer, number, number]
    library.draft.restype = number
    library.draft_scratch.argtypes = [pointer, pointer, pointer, number]
    library.draft_scratch.restype = ctypes.c_size_t
    library.linear.argtypes = [pointer, pointer, pointer, number, number]
    library.linear.restype = None
    library.llama_scratch.argtypes = [pointer, pointer, number]
    library.llama_scratch.restype = ctypes.c_size_t
    library.llama_states.argtypes = [pointer, pointer, pointer, pointer, number]
    library.llama_states.restype = None
    library.rows_largest.argtypes = [pointer, number, wide, pointer, pointer, number]
    library.rows_largest.restype = None
    library.rows_scratch.argtypes = [wide, number, number]
    library.rows_scratch.restype = ctypes.c_size_t
    library.rows_top.argtypes = [pointer, number, wide, number, pointer, pointer, pointer, number]
    library.rows_top.restype = None
    return library
