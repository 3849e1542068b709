"""Compiles the C++ kernels, once per machine, and loads them.

The compiler is $CXX, c++, g++ or clang++, whichever is found first. The library lies in $XDG_CACHE_HOME/dense-prediction-cell
(by default ~/.cache) under a name made of the sources, the compiler and the processor. Without a compiler PyTorch's own
operations are used, and one warning says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FOLDER = Path(__file__).parent  # of the sources
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
_VECTORS, _THREADS = ["-march=native", "-ffp-contract=fast"], ["-fopenmp"]  # not every compiler and system has them
_OPTIONAL_FLAGS = [[*_VECTORS, *_THREADS], _VECTORS, _THREADS, []]  # the first that compile are used


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, compiled at the first call, which takes some ten seconds; or, after a warning, why there are none."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        reason = "no C++ compiler found (install g++, or set CXX)"
    else:
        try:
            return ctypes.CDLL(str(compiled(compiler)))
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
            reason = f"the C++ kernels do not work here: {getattr(error, 'stderr', '') or str(error)}"
    warnings.warn(f"PyTorch's slower operations are used: {reason}", stacklevel=2)
    return reason


def compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not there yet."""
    version = subprocess.run([*compiler.split(), "--version"], check=True, capture_output=True, text=True).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])]
    identity = "\n".join([version, _processor(), str(FLAGS), str(_OPTIONAL_FLAGS), *sources])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-prediction-cell"
    path = folder / f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            compile_to(Path(aside) / "cpu.so", compiler)
            os.replace(Path(aside) / "cpu.so", path)
    return path


def compile_to(path: Path, compiler: str) -> None:
    """With as many of the optional flags as the compiler accepts; a warning names those that it does not."""
    command = [*compiler.split(), *FLAGS, str(FOLDER / "kernels.cpp"), "-o", str(path)]
    for flags in _OPTIONAL_FLAGS:
        run = subprocess.run([*command, *flags], check=not flags, capture_output=True, text=True)
        if run.returncode == 0:
            break
    missing = [flag for flag in _OPTIONAL_FLAGS[0] if flag not in flags]
    if missing:
        warnings.warn(f"{compiler} compiles the C++ kernels only without {' '.join(missing)}: they are slower", stacklevel=2)


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
