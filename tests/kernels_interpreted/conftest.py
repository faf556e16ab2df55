"""The Triton kernels' numbers, through Triton's interpreter on CPU tensors.

Run them with TRITON_INTERPRET=1 pytest tests/kernels_interpreted. Triton reads the variable when it decorates a kernel,
so these tests have a process of their own.
"""

import importlib.util
import pathlib
import sys

import pytest

from tritium.kernels.site import interpreting

if not interpreting():
    raise pytest.UsageError(
        "tests/kernels_interpreted needs TRITON_INTERPRET=1 in the environment and a process of its own; "
        "run it by itself with the variable set, and the other tests with --ignore=tests/kernels_interpreted"
    )


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load("interpreter_bf16").install()
