"""Build and load guard.cpp. Nothing here imports PyTorch: the guard comes first."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """Find a C++ compiler; None: there is none."""
    found = map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    return next(filter(None, found), None)


def build(folder: Path) -> Path:
    """Compile the guard against the installed PyTorch."""
    spec, program = importlib.util.find_spec("torch"), compiler()
    assert spec is not None
    assert spec.origin is not None
    assert program is not None, "no C++ compiler"
    home, built = Path(spec.origin).parent, folder / "guard.so"
    command = [program, "-shared", "-fPIC", "-std=c++20", "-O1", str(SOURCE), "-o", str(built)]
    command += [f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{home / 'lib'}"], check=True)
    return built


def load(path: Path) -> None:
    """Load the built guard, which stays to the end of this process."""
    assert "torch" not in sys.modules, "the guard is loaded before PyTorch"
    ctypes.CDLL(str(path))
