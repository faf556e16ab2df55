"""What a user installs: the wheel, the editable install, the machine without a compiler, transformers beside it."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "kernels", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = pytest.mark.timeout(300)  # pip and compilers, on a machine that may be busy
VERBS = ("train", "test", "test-full", "check", "check-kernels", "bench", "gpu", "clean")


def run(*command: object, cwd: pathlib.Path, status: int = 0, **environment: str) -> str:
    """Run a command; its output, both streams. ``environment`` is added to this process's."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def copy_sources(to: pathlib.Path) -> pathlib.Path:
    """The source tree as a clone would have it: no builds, no caches."""
    leave = shutil.ignore_patterns("__pycache__", "_native*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=leave)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, to)
    return to


def build_wheel(source: pathlib.Path, **environment: str) -> pathlib.Path:
    """Offline and without isolation, as on a machine that has setuptools."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", source / "dist", ".", cwd=source, **environment)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    return build_wheel(copy_sources(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The Python of a fresh environment: the wheel, and for the rest this environment's packages (not its tritium)."""
    home = tmp_path_factory.mktemp("fresh")
    python = fresh_environment(home)
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", wheel, cwd=home)
    return python


def fresh_environment(home: pathlib.Path) -> pathlib.Path:
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files there are not followed
    return home / "venv" / "bin" / "python"


# -------------------------------------------------------------------------------------------------------------- wheel


def test_the_wheel_serves_every_python_on_its_platform(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"tritium-{PROJECT['version']}-py3-none-{platform}.whl"


def test_the_wheel_holds_every_module_the_library_and_its_sources(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for pattern in ("*.py", "*.cpp", "*.cu", "*.h"):
            for path in (ROOT / folder).rglob(pattern):
                assert f"tritium/{path.relative_to(ROOT)}" in names
    assert {f"tritium/kernels/tuning/{p.name}" for p in (ROOT / "kernels/tuning").glob("*.json")} <= names
    assert "tritium/kernels/_native.so" in names
    assert "tritium/kernels/_native_missing.txt" not in names
    assert "tritium/__init__.py" not in names  # a namespace
    assert all(name.startswith(("tritium/", f"tritium-{PROJECT['version']}.dist-info/")) for name in names)
    assert not [name for name in names if "__pycache__" in name or "/results/" in name]


def test_the_wheels_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"tritium-{PROJECT['version']}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License: Apache-2.0" in metadata or "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "tritium = tritium.engine.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert [name for name in archive.namelist() if re.fullmatch(rf"{re.escape(info)}/(licenses/)?LICENSE", name)]


def test_the_installed_wheel_computes_natively_wherever_it_is_called_from(installed, tmp_path):
    code = (
        "import json, torch, tritium.kernels\n"
        "from tritium.kernels import ops\n"
        "from tritium.kernels.lib import native\n"
        "norm = ops.layer_norm.load('native').function\n"
        "y = norm(torch.arange(6.).reshape(2, 3), torch.ones(3))\n"
        "print(json.dumps([tritium.kernels.__file__, native.missing(), y.sum().item(), sorted(ops.OPS)]))\n"
    )
    for cwd in (tmp_path, ROOT):
        file, missing, total, names = json.loads(run(installed, "-c", code, cwd=cwd).splitlines()[-1])
        assert pathlib.Path(file).is_relative_to(installed.parents[1])
        assert missing is None
        assert abs(total) < 1e-6
        folders = {p.parent.name for p in (ROOT / "kernels").glob("*/reference.py")}
        assert folders == set(names)


def test_the_installed_command_lists_its_verbs(installed, tmp_path):
    said = run(installed.parent / "tritium", "--help", cwd=tmp_path)
    assert all(
        verb in said for verb in ("train", "prepare", "sample", "evaluate", "kernels", "bench", "ablate", "export")
    )


def test_the_source_distribution_can_build_it_all(tmp_path):
    source = copy_sources(tmp_path)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    name = run(sys.executable, "-c", code, cwd=source).splitlines()[-1]
    with tarfile.open(source / "dist" / name) as archive:
        members = {member.partition("/")[2] for member in archive.getnames()}
    wanted = {"CMakeLists.txt", "pyproject.toml", "setup.py", "LICENSE", "constraints.txt"}
    for folder in FOLDERS:
        for pattern in ("*.py", "*.cpp", "*.cu", "*.h", "*.json"):
            wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern) if "results" not in p.parts}
    assert wanted <= members


# --------------------------------------------------------------------------------------------- a machine that lacks
# tools


def tools(folder: pathlib.Path, **scripts: str) -> str:
    """A PATH of these commands alone."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text("#!/bin/sh\n" + text)
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("scripts", "cxx", "reason"),
    [
        ({}, "", r"no C\+\+ compiler was found; install one \(Debian: apt install g\+\+\), then install tritium again"),
        ({}, "no-such-c++", r"CXX=no-such-c\+\+ is not a command; install one"),
        (
            {"c++": "exit 1", "cmake": "echo cmake version 3.10.2"},
            "",
            r"no cmake 3\.22 or later was found; install it \(pip or apt install cmake\), then install tritium again",
        ),
        (
            {"c++": "exit 1",
            "cmake": '[ "$1" = --version ] && echo cmake version 3.25.1 || { echo CMake Error: broken >&2; exit 1; }'},
            "",
            r"building it failed \(CMake Error: broken\); mend that, then install tritium again",
        ),
    ],
    ids=["no compiler", "wrong CXX", "old cmake", "broken compiler"],
)  # fmt: skip
def test_without_the_tools_building_succeeds_and_keeps_the_reason(tmp_path, scripts, cxx, reason):
    source = tmp_path / "source"
    for folder in FOLDERS:
        (source / folder).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, source)
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    said = run(sys.executable, "-c", code, cwd=source, PATH=tools(tmp_path / "bin", **scripts), CXX=cxx)
    wheel = zipfile.ZipFile(source / "dist" / said.splitlines()[-1])
    recorded = wheel.read("tritium/kernels/_native_missing.txt").decode().strip()
    assert re.match(reason, recorded)
    assert f"installed WITHOUT its native kernels: {recorded}" in said
    assert "tritium/kernels/_native.so" not in wheel.namelist()


def test_an_editable_install_sees_what_is_added_and_drops_a_stale_library(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source)
    python = fresh_environment(tmp_path)
    (source / "kernels" / "_native.so").write_text("a stale library")
    install = (sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index")
    without_tools = tools(tmp_path / "bin")
    run(*install, "--no-build-isolation", "--editable", ".", cwd=source, PATH=without_tools, CXX="")
    assert not (source / "kernels" / "_native.so").exists()
    recorded = (source / "kernels" / "_native_missing.txt").read_text().strip()
    assert recorded.startswith("no C++ compiler was found")
    (source / "kernels" / "new_op" / "deeper").mkdir(parents=True)
    (source / "kernels" / "new_op" / "deeper" / "reference.py").write_text("VALUE = 7\n")
    (source / "engine" / "new_module.py").write_text("VALUE = 8\n")
    code = (
        "import tritium.kernels.new_op.deeper.reference as a, tritium.engine.new_module as b\n"
        "from tritium.kernels.lib import native\n"
        "print(a.VALUE + b.VALUE, a.__file__, native.missing(), sep='|')\n"
    )
    new = source / "kernels" / "new_op" / "deeper" / "reference.py"
    assert run(python, "-c", code, cwd=tmp_path).strip() == f"15|{new}|native library missing: {recorded}"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_cuda_sources_are_compiled_where_nvcc_is(tmp_path):
    """There is no .cu file yet; the way for one is kept open."""
    source = copy_sources(tmp_path)
    (source / "kernels" / "layer_norm" / "probe.cu").write_text(
        "__global__ void add(float* x) { x[threadIdx.x] += 1.0f; }\n"
        'extern "C" __attribute__((visibility("default"))) int probe(float* x) { add<<<1, 32>>>(x); return 42; }\n'
    )
    library = tmp_path / "probe.so"
    run("cmake", "-S", ".", "-B", "b", f"-DTRITIUM_OUT={library}", "-DCMAKE_CUDA_ARCHITECTURES=80-real", cwd=source)
    run("cmake", "--build", "b", "--parallel", "2", cwd=source)
    code = f"import ctypes; l = ctypes.CDLL({str(library)!r}); print(l.tritium_has_cuda(), hasattr(l, 'probe'))"
    expected = "1 True" if shutil.which("nvcc") else "0 False"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == expected


# ----------------------------------------------------------------------------------------------------- beside
# transformers


def test_transformers_works_from_the_repository_root_beside_the_editable_install():
    """It probes for a module named kernels, and with the root on sys.path it finds ours."""
    code = (
        "import sys, torch, transformers\n"
        "assert '' in sys.path\n"
        "config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6)\n"
        "model = transformers.GPT2LMHeadModel(config).eval()\n"
        "print(tuple(model(torch.arange(6)[None]).logits.shape))\n"
        "from tritium.kernels import ops\n"
        "print(len(ops.OPS) > 0)\n"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT, HF_HUB_OFFLINE="1").splitlines()[-2:] == ["(1, 6, 11)", "True"]


def test_the_kernels_package_does_nothing_when_it_is_imported():
    """Whoever finds it under the name kernels may run it, and may read its version."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]
    assert isinstance(body[0].value, ast.Constant)


# ------------------------------------------------------------------------------------------------ what the verbs
# install


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def wanted(requirements: list[str], seen: set[str]) -> set[str]:
    """Names of these requirements and of all they require here, in turn."""
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name in seen or (requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras)):
            continue
        seen.add(name)
        wanted([r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r], seen)
    return seen


def test_everything_the_verbs_install_is_pinned_and_here_in_that_version():
    optional = PROJECT["optional-dependencies"]
    needed = wanted([*PROJECT["dependencies"], *optional["test"], *optional["dev"]], set())
    pins = constraints()
    assert needed <= set(pins)
    ranges = {name for name, pin in pins.items() if not re.fullmatch(r"==[^*,]+", str(pin.specifier))}
    assert ranges == {"triton"}  # torch from the package index and torch's CPU build want different ones
    for name in sorted(needed):
        assert pins[name].specifier.contains(importlib.metadata.version(name), prereleases=True), name


def test_every_verb_of_the_makefile_is_there():
    said = run("make", "help", cwd=ROOT)
    for verb in VERBS:
        assert re.search(rf"^make {verb} ", said, re.M), verb
        run("make", "--dry-run", verb, cwd=ROOT)
    run("bash", "-n", ".ci/run", cwd=ROOT)
