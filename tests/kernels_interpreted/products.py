"""The full product of every op's shapes and options, and the tally of what came out: `make test-full` runs it.

python tests/kernels_interpreted/products.py        write docs/contract.md from build/tally.json and its rows of before
"""

import fcntl
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import torch

from tritium.kernels import ops
from tritium.kernels.case import Case

ROOT = pathlib.Path(__file__).parents[2]
TALLY = ROOT / "build" / "tally.json"
PAGE = ROOT / "docs" / "contract.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROWS = (0, 1, 9, 40)
NORM = {"N": ROWS, "C": (5, 33, 130, 768), "wide": (False, True), "eps": (1e-5, 0.1)}
LOSS = {
    "label_smoothing": (0.0, 0.1), "z_loss": (0.0, 1e-2), "softcap": (0.0, 9.0), "ignored": (0.0, 0.4, 1.0),
    "ignore_index": (-100, 0),
}  # fmt: skip
PRODUCTS: dict[str, dict[str, tuple]] = {
    "linear": {"N": ROWS, "C": (1, 16, 70), "F": (1, 24, 65), "bias": (True, False)},
    "embedding": {"N": ROWS, "V": (1, 7, 60), "C": (1, 24, 130), "repeated": (False, True)},
    "attention": {
        "T": ((37, 37), (5, 70), (70, 33)), "heads": ((2, 2), (4, 2), (3, 1)), "D": (8, 24, 64),
        "causal": (True, False), "documents": (False, True), "window": (0, 6), "softcap": (0.0, 7.0),
        "dropout": (0.0, 0.2),
    },
    "attention_lse": {
        "T": ((37, 37), (5, 40), (40, 33)), "heads": ((2, 2), (3, 1)), "D": (8, 24), "causal": (True, False),
        "documents": (False, True, "anywhere"), "window": (0, 6), "softcap": (0.0, 7.0), "scale": (None, -0.25),
    },
    "layer_norm": {**NORM, "bias": (True, False)},
    "add_layer_norm": {**NORM, "bias": (True, False)},
    "rms_norm": {**NORM, "weight": (True, False)},
    "add_rms_norm": {**NORM, "weight": (True, False)},
    "rope": {"B": (0, 1, 3), "T": (1, 13), "heads": ((1, 1), (4, 2)), "DR": ((2, 2), (16, 16), (24, 10), (64, 0)),
             "per_row": (False, True)},
    "gelu": {"N": ROWS, "F": (1, 33, 1030), "approximate": ("tanh", "none"), "spread": (2.0, 40.0)},
    "swiglu": {"N": ROWS, "F": (1, 33, 1030), "spread": (2.0, 40.0)},
    "geglu": {"N": ROWS, "F": (1, 33, 1030), "approximate": ("tanh", "none"), "spread": (2.0, 40.0)},
    "relu2": {"N": ROWS, "F": (1, 33, 1030)},
    "cross_entropy": {"N": (0, 1, 9), "V": ((1, 1), (50, 64), (4100, 4104)), **LOSS,
                      "reduction": ("none", "sum", "mean")},
    "linear_cross_entropy": {"N": (0, 9, 20), "C": (16, 24), "V": ((50, 64), (90, 90)), **LOSS, "ignore_index": (-100,),
                             "chunk": (0, 4), "master": (True, False)},
    "global_norm": {"K": (0, 1, 5), "P": (1, 130, 9000), "scale": (1.0, 1e-12, 1e12)},
    "adamw": {"K": (0, 1, 5), "P": (1, 130, 9000), "copies": (True, False), "fp32_grads": (False, True),
              "clip": (1.0, 0.3), "skip": (0, 2), "weight_decay": (0.0, 0.1), "eps": (1e-8, 1e-6),
              "moments": ("fp32", "bf16")},
    "adamw_8bit": {"K": (0, 1, 5), "P": (1, 300, 5000), "copies": (True, False), "fp32_grads": (False, True),
                   "clip": (1.0, 0.3), "skip": (0, 2), "weight_decay": (0.0, 0.1)},
}  # fmt: skip
SHAPES = {"T": ("Tq", "Tk"), "heads": ("H", "G"), "DR": ("D", "R"), "V": ("V", "Vp")}


def case_of(name: str, chosen: Mapping[str, object]) -> tuple[Case, torch.dtype]:
    """A choice of PRODUCTS[name], with a dtype, as a case of the op."""
    known = {letter for case in ops.OPS[name].cases.CASES for letter in case.shape}
    shape, options = ({"B": 1} if name in ("attention", "attention_lse") else {}), {}
    for key, value in chosen.items():
        if isinstance(value, tuple):
            shape |= dict(zip(SHAPES[key], value, strict=True))
        elif key in known:
            shape[key] = value
        elif key != "dtype" and value is not None:
            options[key] = value
    if options.get("documents") is True and shape["Tq"] > shape["Tk"]:  # documents are about queries that are keys too
        shape["Tq"] = shape["Tk"]
    return Case(" ".join(f"{k}={v}" for k, v in {**shape, **options}.items()), shape, options), chosen["dtype"]


def pieces() -> Iterator[tuple[str, dict[str, object]]]:
    """(op, part of a choice): the product in parts of at most some 100 cases, so that a failure names its own."""
    for name, values in PRODUCTS.items():
        values = {**values, "dtype": DTYPES}
        head: list[str] = []
        for key in values:
            left = [v for k, v in values.items() if k not in head]
            if torch.Size(map(len, left)).numel() <= 100:
                break
            head.append(key)
        for choice in itertools.product(*(values[key] for key in head)):
            yield name, dict(zip(head, choice, strict=True))


def cases(name: str, piece: Mapping[str, object]) -> Iterator[tuple[Case, torch.dtype]]:
    """The cases of one piece."""
    rest = {k: v for k, v in {**PRODUCTS[name], "dtype": DTYPES}.items() if k not in piece}
    for values in itertools.product(*rest.values()):
        yield case_of(name, {**piece, **dict(zip(rest, values, strict=True))})


def size(name: str) -> int:
    """How many cases the product of an op has."""
    return math.prod(map(len, PRODUCTS[name].values())) * len(DTYPES)


def commit() -> str:
    """The commit the kernels were tested at, with a + where they were changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "?"

    return git("log", "-1", "--format=%h", "--", "kernels") + ("+" if git("status", "--porcelain", "kernels") else "")


PRODUCT = "product of options"
ABOUT = """\
Written by `python tests/kernels_interpreted/products.py` from what `make test-full` left in build/tally.json; that
file says what is multiplied. A row that the tally has none of stays as it was. Every row: Triton's interpreter, fp32,
bf16 and fp16 (bf16 as mended by the tests), held to docs/numerics.md. *cases* are those of the op's `cases.py`, with
three seeds and in every layout. The bound's use is that of the worst tensor: 1 would be red. *commit* is that of the
kernels; a + says that they were being changed."""


class Tally:
    """What the full product gave: by kind and op, how many were checked and the largest use of a bound."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, dict[str, float]]] = {}
        self.commit = commit()

    def count(self, kind: str, report) -> None:
        row = self.rows.setdefault(kind, {}).setdefault(
            report.op, {"checked": 0, "passed": 0, "refused": 0, "worst": 0.0}
        )
        row["checked"] += 1
        row["passed"] += report.ok
        row["refused"] += report.refused
        if report.worst is not None:
            row["worst"] = max(row["worst"], report.worst.ratio)
        assert report.ok, report

    def write(self) -> None:
        """Add to build/tally.json, a row in the place of an older one of its op. Runs side by side wait for each other
        here."""
        import triton

        about = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
        today = time.strftime("%Y-%m-%d")
        found = {
            kind: {name: {**row, "date": today, "commit": self.commit} for name, row in rows.items()}
            for kind, rows in self.rows.items()
        }
        TALLY.parent.mkdir(exist_ok=True)
        with TALLY.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            tally = over(json.loads(text) if text else {}, {**about, "rows": found})
            file.truncate(0)
            file.write(json.dumps(tally, indent=1))


def over(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """``now``, and the rows of ``before`` that it has no newer ones of; none of another Triton or torch."""
    if any(before.get(package) != now[package] for package in ("triton", "torch")):
        return dict(now)
    kinds = dict.fromkeys([*before["rows"], *now["rows"]])
    return {**now, "rows": {kind: before["rows"].get(kind, {}) | now["rows"].get(kind, {}) for kind in kinds}}


def read(page: str) -> dict[str, object]:
    """What a page was written from."""
    about: dict[str, object] = {"rows": {}}
    if versions := re.search(r"^triton (\S+), torch (\S+)\.$", page, re.M):
        about |= {"triton": versions[1], "torch": versions[2]}
    rows: dict[str, dict[str, object]] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if cells[1:2] == ["checked"]:
            rows = about["rows"][cells[0]] = {}
        elif cells and cells[0] in ops.OPS:
            checked, passed, refused = (int(cell.split()[0]) for cell in cells[1:4])
            rows[cells[0]] = {"checked": checked, "passed": passed, "refused": refused,
                              "worst": float(cells[5]), "date": cells[6], "commit": cells[7]}  # fmt: skip
    return about


def page(about: Mapping[str, object]) -> str:
    """docs/contract.md."""
    lines = [
        "# The full product of options",
        "",
        *ABOUT.splitlines(),
        "",
        f"triton {about['triton']}, torch {about['torch']}.",
        "",
    ]
    for kind, rows in about["rows"].items():
        lines += [
            f"| {kind} | checked | passed | refused | failed | worst use of a bound | date | commit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        total = [0, 0, 0]
        for name in (n for n in ops.OPS if n in rows):
            row = rows[name]
            numbers = [row["checked"], row["passed"], row["refused"]]
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            failed = numbers[0] - numbers[1] - numbers[2]
            if kind == PRODUCT and row["checked"] < size(name):
                numbers[0] = f"{row['checked']} **of {size(name)}**"
            counts = " | ".join(map(str, [*numbers, failed]))
            lines.append(f"| {name} | {counts} | {row['worst']:.2f} | {row['date']} | {row['commit']} |")
        counts = " | ".join(map(str, [*total, total[0] - total[1] - total[2]]))
        lines += [f"| **all** | {counts} | | | |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    if not TALLY.exists():
        sys.exit(f"{TALLY} is not there; make test-full writes it")
    PAGE.write_text(page(over(read(PAGE.read_text()), json.loads(TALLY.read_text()))))
    print(f"wrote {PAGE}")
