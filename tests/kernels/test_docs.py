"""docs/kernels.md and docs/numerics.md: the examples run, the bounds are the code's."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import tritium.kernels
from tritium.kernels import contract, ops
from tritium.kernels.op import CallSite, Op, bind
from tritium.kernels.site import Machine

DOCS = pathlib.Path(__file__).parents[2] / "docs"
KERNELS = (DOCS / "kernels.md").read_text()


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Every Python block of the page, written where its first line says."""
    names = []
    for block in re.findall(r"```python\n(.*?)```", KERNELS, flags=re.DOTALL):
        name = re.match(r"# (\S+\.py)\n", block)
        assert name, f"a Python block begins with its file name: {block[:60]}"
        path = tmp_path / name.group(1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
        names.append(name.group(1))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path, names
    for op in ops.OPS.values():
        op._loaded.clear()
    for name in ("my_package.my_norm", "my_package", "my_package.impl_mine"):
        sys.modules.pop(name, None)


def test_the_page_has_the_examples_it_should(examples):
    _, names = examples
    assert names == [
        "my_package/my_norm.py", "check_mine.py", "my_package/my_relu2.py", "my_package/impl_mine.py",
        "check_backend.py", "mish/reference.py", "mish/cases.py",
    ]  # fmt: skip


def test_bring_your_own(examples, capsys):
    folder, _ = examples
    exec(compile((folder / "check_mine.py").read_text(), "check_mine.py", "exec"), {})
    assert "refused rms_norm.my_package.my_norm" in capsys.readouterr().out
    model = torch.nn.Module()
    model.norm = CallSite(ops.rms_norm, shape={"C": 8})
    (row,) = bind(model, {"rms_norm": "my_package.my_norm"}, machine=Machine("cpu", "x86_64"), phases=("train",))
    assert row.backend == "my_package.my_norm"
    assert model.norm(torch.ones(2, 8), torch.ones(8)).shape == (2, 8)


def verdict(folder, module, *flags):
    """What `tritium kernels check` says of a Triton backend of relu2 on a machine without a GPU: the page's command."""
    assert "TRITON_INTERPRET=1 tritium kernels check my_package.my_relu2 --op relu2 --no-bench\n" in KERNELS
    command = [sys.executable, "-P", "-m", "tritium.engine.cli", "kernels", "check", module, "--op", "relu2", *flags]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        timeout=110,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_triton_kernel_of_ones_own(examples):
    """The contract in Triton's interpreter, the resources compiled: right; one gradient 2 % off: wrong."""
    folder, _ = examples
    status, out = verdict(folder, "my_package.my_relu2", "--no-bench", "--device", "cpu", "--arch", "sm_90")
    assert status == 0, out
    assert "relu2.my_package.my_relu2 on cpu holds the contract" in out
    for kernel in ("_forward_kernel", "_backward_kernel"):
        assert re.search(rf"^relu2 +{kernel} +sm_90 .* bfloat16 +BLOCK=1024 .* 128, 128$", out, re.M), out
    assert out.splitlines()[-1] == "verdict: right"
    text = (folder / "my_package" / "my_relu2.py").read_text()
    assert text.count("2.0 * x * dy") == 1
    (folder / "my_package" / "planted.py").write_text(text.replace("2.0 * x * dy", "2.04 * x * dy"))
    status, out = verdict(folder, "my_package.planted", "--no-resources", "--device", "cpu")
    assert status == 1, out
    assert "no speed is shown of a backend that is wrong" in out
    assert out.splitlines()[-1].startswith("verdict: wrong: breaks the contract (")


def test_a_triton_kernel_that_spills_is_wrong(examples):
    """The example's tile on one warp, with every element in registers at once."""
    folder, _ = examples
    text = (folder / "my_package" / "my_relu2.py").read_text().replace("BLOCK = 1024", "BLOCK = 8192")
    (folder / "my_package" / "spills.py").write_text(text.replace("num_warps=4", "num_warps=1"))
    flags = ("--device", "cpu", "--arch", "sm_90", "--dtypes", "fp32", "--cases", "many")
    status, out = verdict(folder, "my_package.spills", *flags)
    assert status == 1, out
    assert "holds the contract" in out and "spills: " in out
    assert "kernels over the limits of the GPU" in out.splitlines()[-1] or "1 kernel over" in out.splitlines()[-1]


def test_a_backend_with_its_own_backward(examples):
    folder, _ = examples
    exec(compile((folder / "check_backend.py").read_text(), "check_backend.py", "exec"), {"__name__": "check"})


def test_an_op(examples, monkeypatch):
    folder, _ = examples
    (folder / "mish" / "__init__.py").touch()
    monkeypatch.setattr(tritium.kernels, "__path__", [*tritium.kernels.__path__, str(folder)])
    op = Op("mish")
    op.folder = folder / "mish"
    try:
        assert op.backends() == ["reference"]
        reports = contract.check_all(op, "reference")
        assert len(reports) == 6
        assert all(r.ok for r in reports)
    finally:
        for name in [n for n in sys.modules if n.startswith("tritium.kernels.mish")]:
            del sys.modules[name]


def test_every_op_is_in_the_table_of_sites():
    table = KERNELS[KERNELS.index("## What a site says") : KERNELS.index("## Bring your own")]
    for name in ops.OPS:
        assert re.search(rf"^\| .*\b{name}\b", table, flags=re.MULTILINE), name


def test_the_bounds_are_the_codes():
    text = (DOCS / "numerics.md").read_text()
    rows = re.findall(r"^\| (\S[^|]*?) \| (float\d+|bfloat16) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    said = {(where, dtype): (float(largest), float(rms)) for where, dtype, largest, rms in rows}
    wanted = {("every op", str(d).removeprefix("torch.")): v for d, v in contract.FLOORS.items()}
    wanted |= {(op, str(d).removeprefix("torch.")): v for (op, d), v in contract.OP_FLOORS.items()}
    assert said == wanted
    assert f"The factor is {contract.FACTOR:g}." in text
    assert f"at most {contract.FEW} elements the floors are four times as high" in text and contract.FEW_FACTOR == 4.0
    assert f"error ≤ {contract.FACTOR:g} ×" in text
    assert frozenset({("linear_cross_entropy", "output")}) == contract.COARSE
    assert (contract.unit_roundoff(torch.float32), contract.unit_roundoff(torch.bfloat16)) == (2**-24, 2**-8)
