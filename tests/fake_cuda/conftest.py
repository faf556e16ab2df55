"""Training steps on FakeTensor(device="cuda"): shapes, graphs, FLOPs and bytes of a GPU that this machine lacks.

Run them with ``pytest tests/fake_cuda``, a process of their own: a small C++ library makes torch believe in a GPU, and
autograd runs on one thread. Nothing is computed.
"""

import ctypes
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a GPU that is there must not be seen
import torch

from tritium.kernels.site import interpreting

if interpreting():
    raise pytest.UsageError("tests/fake_cuda traces Triton kernels as a GPU's; run it without TRITON_INTERPRET")
if torch.cuda.is_available():
    raise pytest.UsageError(
        "tests/fake_cuda puts a fake GPU in place of none, and torch had found one; run it by itself"
    )

SOURCE = pathlib.Path(__file__).with_name("fake_cuda.cpp")


def library() -> pathlib.Path:
    """The compiled library, kept between runs in a folder of this user's; its name says what it was made from."""
    root = pathlib.Path(torch.__file__).parent
    made_from = SOURCE.read_bytes() + f"{torch.__version__} {root}".encode()
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "tritium")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = pathlib.Path(tempfile.mkdtemp())
    path = folder / f"fake_cuda-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [os.environ.get("CXX") or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}",
             str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(unfinished)],
            check=True,
        )  # fmt: skip
        unfinished.replace(path)
    return path


torch._C._ensureCUDADeviceGuardSet = lambda: None  # FakeTensor's, for the guard that the library brings
if not ctypes.CDLL(str(library())).install():
    raise pytest.UsageError("torch does not see the fake GPU; its CUDAHooksInterface has changed")
torch.autograd.set_multithreading_enabled(False)  # the device's own thread would ask CUDA for its number

_spec = importlib.util.spec_from_file_location("fake_gpu", pathlib.Path(__file__).with_name("fake_gpu.py"))
sys.modules["fake_gpu"] = _module = importlib.util.module_from_spec(_spec)  # what the tests share
_spec.loader.exec_module(_module)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-memory", action="store_true", help="write docs/memory.md")
