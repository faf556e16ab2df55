"""Builds tritium: the folder → package map and the native library, through CMake. Metadata and dependencies:
pyproject.toml.

torch is not needed to build: the native library has a plain C interface, so one build serves every Python and torch.
Where it cannot be built the installation succeeds without it, and `_native_missing.txt` beside the kernels keeps the
reason for `tritium kernels`.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = pathlib.Path(__file__).resolve().parent
FOLDERS = ("engine", "kernels", "benchmarks")
LIBRARY = "tritium.kernels._native"
MISSING = "_native_missing.txt"
CMAKE_MINIMUM = (3, 22)


def packages():
    """tritium.engine, tritium.engine.data, ...: every folder below FOLDERS, so a new op needs no edit here."""
    for folder in FOLDERS:
        yield f"tritium.{folder}"
        for name in find_namespace_packages(folder, exclude=["results*", "*__pycache__*"]):
            yield f"tritium.{folder}.{name}"


def cmake():
    """Path of a cmake that is new enough, or None. PyPI's package puts its command beside the interpreter."""
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    found = shutil.which("cmake", path=path)
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    return found if version and tuple(map(int, version.groups())) >= CMAKE_MINIMUM else None


def compiler():
    """The C++ compiler CMake would use ($CXX, which may carry flags, else the usual names), or None."""
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, named[:1] or ["c++", "g++", "clang++"])), None)


def first_error(said):
    """The first line about an error, with the next one, where CMake puts the sentence."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), max(len(lines) - 2, 0))
    return " ".join(lines[at : at + 2])


class BuildLibrary(build_ext):
    """Runs CMake for the one native library; on failure leaves the reason in its place."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in the name: it is a plain C library

    def build_extension(self, ext):
        out = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # neither a stale library nor a stale reason may survive
        reason = out.with_name(MISSING)
        reason.unlink(missing_ok=True)
        problem = self.build_with_cmake(out)
        if problem is not None:
            reason.write_text(problem + "\n")
            self.warn(f"tritium is being installed WITHOUT its native kernels: {problem}")

    def build_with_cmake(self, out):
        """Build ``out``; returns None, or why it could not be built and what would help."""
        again = "then install tritium again (from a clone: make train, or pip install -e .)"
        if compiler() is None:
            named = os.environ.get("CXX")
            wrong = f"CXX={named} is not a command" if named else "no C++ compiler was found"
            return f"{wrong}; install one (Debian: apt install g++), {again}"
        if cmake() is None:
            minimum = ".".join(map(str, CMAKE_MINIMUM))
            return f"no cmake {minimum} or later was found; install it (pip or apt install cmake), {again}"
        # a fresh folder each time: a cache would remember the cmake of a build environment that is gone
        work = pathlib.Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        configure = [cmake(), str(ROOT), "-DCMAKE_BUILD_TYPE=Release", f"-DTRITIUM_OUT={out}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        for command in (configure, [cmake(), "--build", ".", "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", check=False)
            sys.stdout.write(done.stdout)
            sys.stderr.write(done.stderr)
            if done.returncode != 0:
                return f"building it failed ({first_error(done.stderr + done.stdout)}); mend that, {again}"
        return None if out.exists() else f"cmake ended without an error and without {out.name}; report this"

    def built(self):
        """What the build left: the library or the reason."""
        folder = pathlib.Path(self.build_lib, *LIBRARY.split(".")[:-1])
        return [path for path in (folder / "_native.so", folder / MISSING) if path.exists()]

    def copy_extensions_to_source(self):
        """Editable installs: put the library, or the reason, into kernels/ itself."""
        source = ROOT / "kernels"
        for name in ("_native.so", MISSING):
            (source / name).unlink(missing_ok=True)  # unlink first: a running process keeps the copy it has mapped
        for path in self.built():
            self.copy_file(str(path), str(source / path.name))

    def get_outputs(self):
        return list(map(str, self.built()))


class PlatformWheel(bdist_wheel):
    """Tagged py3-none-<platform>: machine code, and tied to no Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    license="Apache-2.0",  # here and not in pyproject.toml, where its spelling divides old setuptools from new
    packages=list(packages()),
    package_dir={f"tritium.{folder}": folder for folder in FOLDERS},
    package_data={"": ["*.json", "*.cpp", "*.cu", "*.h", "*.cuh", "*.txt"]},
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    # asked for only where it is of use, so that a machine without a compiler installs without it
    setup_requires=["cmake>=3.22"] if compiler() is not None and cmake() is None else [],
    zip_safe=False,
)
