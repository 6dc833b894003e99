"""Compiling the pretend device, once for its source and the installed torch. Imports no torch."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
# The source uses what torch does not promise to keep: with another version it has to be looked at again.
TORCH = "2.13."


def torch_folder() -> Path:
    """Where torch is installed."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def why_not() -> str | None:
    """The reason why the device can't be had here; None where it can."""
    if platform.system() != "Linux":
        return "the pretend CUDA device needs Linux"
    if shutil.which("g++") is None:
        return "the pretend CUDA device needs g++, which is not installed"
    if not (version := importlib.metadata.version("torch")).startswith(TORCH):
        return f"the pretend CUDA device is written for torch {TORCH}x, and {version} is installed"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "the pretend CUDA device needs a CPU build of torch"
    return None


def compiled(cache: Path) -> Path:
    """The library in a folder, compiled into it if it is not there yet; takes a quarter of a minute."""
    torch = torch_folder()
    command = [
        *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS", f"-I{torch / 'include'}"),
        *(str(SOURCE), f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    what = [importlib.metadata.version("torch"), *command, SOURCE.read_text(encoding="utf-8")]
    library = cache / f"device-{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:16]}.so"
    with (cache / "lock").open("w") as lock:  # of several test processes one compiles, and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            unfinished.rename(library)
    return library
