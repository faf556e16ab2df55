"""One file, one run: ``def config() -> Config``. The file's name is the preset's name."""

import importlib
import pathlib

from tritium.engine.config import Config


def names() -> list[str]:
    """All presets, alphabetically."""
    return sorted(path.stem for path in pathlib.Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def load(name: str) -> Config:
    """The preset's Config; KeyError for a name that is not in ``names()``."""
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"tritium.engine.presets.{name}").config()
