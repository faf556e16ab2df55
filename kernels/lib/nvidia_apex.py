"""NVIDIA's apex: whether it is here, for the backends that call it. It is built from its repository; the package
index's ``apex`` is an unrelated web toolkit, which the name of the distribution cannot tell apart but the extension
modules can."""

from __future__ import annotations

import importlib.util

from tritium.kernels.site import Site

INSTALL = (
    "install NVIDIA's apex from its repository NVIDIA/apex with its CUDA extensions "
    "(pip's package 'apex' is an unrelated web toolkit)"
)


def unavailable(site: Site, extension: str) -> str | None:
    """Why a kernel of apex's top-level extension module ``extension`` cannot serve the site, or None."""
    if site.machine.version("apex") is None:
        return f"needs the package apex, which is not installed; {INSTALL}"
    # the module is looked up, not imported; on a described machine (packages given) there is nothing to look up
    if site.machine.packages is None and importlib.util.find_spec(extension) is None:
        return f"the installed apex has no module {extension}, so it is not NVIDIA's or lacks that extension; {INSTALL}"
    if site.device != "cuda":
        return f"apex computes on GPUs and this site is on {site.device}; choose reference"
    return None
