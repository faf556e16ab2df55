"""The Triton kernels' numbers, through Triton's interpreter on CPU tensors.

Run them with TRITON_INTERPRET=1 pytest tests/kernels_interpreted. Triton reads the variable when it decorates a kernel,
so these tests have a process of their own.
"""

import importlib.util
import os
import pathlib
import sys

import pytest
import triton.language as tl
from triton.runtime import interpreter

from tritium.kernels.site import interpreting

if not interpreting():
    raise pytest.UsageError(
        "tests/kernels_interpreted needs TRITON_INTERPRET=1 in the environment and a process of its own; "
        "run it by itself with the variable set, and the other tests with --ignore=tests/kernels_interpreted"
    )


# on CPU tensors alone; and a process in which autograd has seen a GPU cannot be forked, as far.py does
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load("interpreter_bf16").install()
_load("mutation")
_load("far")
products = _load("products")
_tally = products.Tally()


@pytest.fixture(scope="session")
def tally():
    """Counts the reports of the full product; what it holds at the end is written to build/tally.json."""
    return _tally


def pytest_sessionfinish(session):
    if _tally.rows:
        _tally.write()


def patch_the_language_once_per_launch() -> None:
    """The interpreter replaces Triton's builtins at a launch, and again at every call of a device function inside it,
    which is most of its time for kernels made of many functions. Once per launch and module does the same."""
    launch, patched = interpreter.GridExecutor.__call__, set()

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_device_function(self, *args, **kwargs):
        modules = frozenset(m.__name__ for m in self.fn.__globals__.values() if m is tl or m is tl.core)
        if modules not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call_device_function


patch_the_language_once_per_launch()
