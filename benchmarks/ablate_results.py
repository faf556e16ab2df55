"""What an ablation found, for readers: tables, a picture, a page; and for ``auto``: the order of an op's backends."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tritium.engine.config import Config

# ------------------------------------------------------------------------------------------------------------- results


def percent(ratio: Mapping[str, float] | None) -> str:
    """+5.1 % [+4.8, +5.4]"""
    if ratio is None:
        return "–"
    median, low, high = (100 * (ratio[k] - 1) for k in ("median", "low", "high"))
    return f"{median:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _mib(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if row["peak_bytes"] is None:
        return "–"
    mine = f"{row['peak_bytes'] / 2**20:.1f}"
    return mine if row is first else f"{mine} ({(row['peak_bytes'] - first['peak_bytes']) / 2**20:+.1f})"


def _delta(x: float | None) -> str:
    return "–" if x is None else f"{x:+.1e}"


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the table of arms that could be built."""
    first = next(row for row in result["arms"] if row["name"] == result["baseline"])
    heads = ["arm", "tokens/s", "against the baseline", "peak MiB", "Δ loss", "Δ gradient norm", "compile s", ""]
    rows = []
    for row in result["arms"]:
        if row["status"] not in ("ok", "red"):
            continue
        withheld = row["speed"] is None
        rows.append([
            row["name"], "withheld" if withheld else f"{row['speed']['median']:,.0f}",
            "" if row is first or withheld else percent(row["ratio"]), _mib(row, first),
            _delta(row["loss_delta"]), _delta(row["gradient_delta"]),
            "–" if row["compile_s"] is None else f"{row['compile_s']:.1f}",
            "RED" if row["status"] == "red" else row["verdict"],
        ])  # fmt: skip
    return heads, rows


def curve_cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the table of trained arms; no rows where none was trained."""
    target = result["settings"]["target_loss"]
    heads = ["arm", "final validation loss", "Δ final [95 %]", "p", "p, signs", "Δ mean of the curve", "p"]
    heads += [] if target is None else ["reached", "seconds to it", "tokens to it", "faster to it [95 %]"]
    rows = []
    for row in result["arms"]:
        t = row["training"]
        if t is None:
            continue
        finals = [curve["val_loss"][-1] for curve in t["curves"]]
        line = [row["name"], f"{sum(finals) / len(finals):.4f} ({min(finals):.4f} to {max(finals):.4f})"]
        for key in ("final", "mean"):
            p = t[key]
            line.append("" if p is None else f"{p['mean']:+.5f} [{p['low']:+.5f}, {p['high']:+.5f}]")
            line.append("" if p is None else f"{p['p_holm']:.3f}{' *' if p['p_holm'] < 0.05 else ''}")
            if key == "final":
                line.append("" if p is None else f"{p['p_signs']:.3f}")
        if target is not None:
            found = t["target"]
            line.append(f"{found['reached']} of {found['of']}")
            line += [_spread(found["seconds"], "{:.1f}"), _spread(found["tokens"], "{:,.0f}")]
            line.append(percent(found["seconds_ratio"]) if found["seconds_ratio"] else "")
        rows.append(line)
    return heads, rows


def _spread(values: Sequence[float], form: str) -> str:
    """Median (least to most)."""
    if not values:
        return "never"
    middle, least, most = (form.format(v) for v in (sorted(values)[len(values) // 2], min(values), max(values)))
    return f"{middle} ({least} to {most})"


def untold(result: Mapping[str, Any]) -> tuple[float, float]:
    """From where to where a difference of speed, in per cent, is not told from none. A quotient and its inverse are
    equally far from 1: what may be 25 % faster may be 20 % slower."""
    resolution = result["resolution"]
    return -100 * resolution / (1 + resolution), 100 * resolution


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What the tables do not say, in sentences."""
    settings, twin = result["settings"], result["twin"]
    lines = []
    if twin is not None:
        ok = next(c["ok"] for c in result["checks"] if c["name"] == "the baseline is as fast as its twin")
        lines.append(
            f"The baseline against its twin: {percent(twin)}; differences from {untold(result)[0]:.1f} to "
            f"{untold(result)[1]:+.1f} % are not told from none."
        )
        if not ok:
            lines.append(
                "TOO NOISY: the twin's interval does not contain 0, so this machine finds differences where there are "
                "none; take more --rounds, or a quieter machine."
            )
    for row in result["arms"]:
        if row["status"] != "ok":
            lines.append(f"{row['name']}: {row['status'].upper() if row['status'] == 'red' else row['status']}: "
                         f"{row['reason']}")  # fmt: skip
    if settings["steps"]:
        n = settings["seeds"]
        lines.append(
            f"Trained on {settings['data']} for {settings['steps']} steps from each of {n} seeds. Differences are "
            "paired by seed: mean, Student's 95 % interval; p corrected for the number of arms (Holm), * below 0.05. "
            f"With {n} seeds the sign-flip test cannot go below {2 / 2**n:.3g}."
        )
        shown = [row["training"]["final"] for row in result["arms"] if row["training"] and row["training"]["final"]]
        if shown:
            widest = max((p["high"] - p["low"]) / 2 for p in shown)
            lines.append(
                f"Differences of the final loss up to {widest:.2g} would not show with this spread over seeds."
            )
    if settings["target_loss"] is not None:
        lines.append(
            f"Time to a validation loss of {settings['target_loss']:g}: seconds of training steps, without evaluation "
            f"and compiling, at the first evaluation (every {settings['eval_every']} steps) that is there."
        )
    lines += [f"FAILED: {c['name']}: {c['detail']}" for c in result["checks"]
              if not c["ok"] and "computes what" not in c["name"]]  # fmt: skip
    return lines


def title(result: Mapping[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    return f"{result['preset']}, T={settings['T']}, B={settings['B']}, on {machine['name']}"


def text(result: Mapping[str, Any]) -> str:
    """The record for a terminal."""
    parts = [f"{title(result)}; baseline: {result['baseline']}"]
    for heads, rows in (cells(result), curve_cells(result)):
        if rows:
            width = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
            parts.append("\n".join(
                "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                          enumerate(zip(line, width, strict=True))).rstrip()
                for line in [heads, *rows]
            ))  # fmt: skip
    return "\n\n".join([*parts, "\n".join(remarks(result))])


COLOURS = {"baseline": "#555555", "faster": "#2e7d4f", "slower": "#c23b22", "no difference shown": "#9a9a9a"}


LINE = 36  # characters of an arm's name in the picture


def draw(result: Mapping[str, Any]) -> bytes:
    """A PNG: each arm's speed against the baseline with its interval over the band that the twin leaves open, and the
    curves where arms were trained."""
    from matplotlib.figure import Figure

    timed = [row for row in result["arms"] if row["ratio"] is not None]
    trained = [row for row in result["arms"] if row["training"] is not None]
    label = {row["name"]: textwrap.fill(row["name"], LINE) for row in result["arms"]}
    height = sum(0.24 + 0.16 * (1 + label[row["name"]].count("\n")) for row in timed)
    figure = Figure(figsize=(9, 1.6 + height + (3.6 if trained else 0)), dpi=120, layout="constrained")
    panels = figure.subplots(2 if trained else 1, 1, squeeze=False, height_ratios=[1.0, 2.0] if trained else None)[:, 0]
    axes = panels[0]
    for row in timed:
        ratio = {k: 100 * (row["ratio"][k] - 1) for k in ("median", "low", "high")}
        error = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        axes.barh(label[row["name"]], ratio["median"], xerr=error, color=COLOURS[row["verdict"]], capsize=3, height=0.6)
    if any(untold(result)):
        axes.axvspan(*untold(result), color="#dddddd", alpha=0.6, zorder=0, label="not told from none")
        axes.legend(frameon=False, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#222222", linewidth=0.8)
    axes.set_xlabel("tokens/s against the baseline, % (95 % interval)")
    axes.set_title(title(result), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if trained:
        axes = panels[1]
        tokens = result["settings"]["B"] * result["settings"]["T"]
        for row in trained:
            runs = row["training"]["curves"]
            x = [tokens * s for s in runs[0]["steps"]]
            losses = list(zip(*(c["val_loss"] for c in runs), strict=True))
            (line,) = axes.plot(x, [sum(v) / len(v) for v in losses], label=label[row["name"]], linewidth=1.4)
            axes.fill_between(x, [min(v) for v in losses], [max(v) for v in losses], color=line.get_color(), alpha=0.15)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel("validation loss, nats per token")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(result: Mapping[str, Any], picture: bytes) -> str:
    """One HTML page that needs no other file."""
    quote = html.escape
    tables = []
    for heads, rows in (cells(result), curve_cells(result)):
        if rows:
            head = "".join(f"<th>{quote(cell)}</th>" for cell in heads)
            body = "\n".join("<tr>" + "".join(f"<td>{quote(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            tables.append(f"<table>\n<tr>{head}</tr>\n{body}\n</table>")
    notes = "\n".join(f"<li>{quote(line)}</li>" for line in remarks(result))
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
        "code{background:#f3f3f3;padding:.1rem .3rem}img{max-width:100%}"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{quote(title(result))}</title>\n'
        f"<style>{style}</style>\n<h1>{quote(title(result))}</h1>\n<p>Baseline: <b>{quote(result['baseline'])}</b>. "
        f"<code>{quote(result['command'])}</code></p>\n" + "\n".join(tables) + f"\n<ul>\n{notes}\n</ul>\n"
        f'<p><img alt="speed of each arm against the baseline" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>\n'
        f"<p>{quote(result['method'])}.</p>\n<p>Commit {quote(result['commit'][:10])}"
        f"{' (modified)' if result['dirty'] else ''}, {quote(result['date'])}; {quote(versions)}.</p>\n</html>\n"
    )


# -------------------------------------------------------------------------------------------------------------- tuning


RIGHT = "computes what the reference does"  # the checks of arms; one that is red has no speed, and so no rank


def ranking(result: Mapping[str, Any], op: str) -> tuple[list[str], str]:
    """([backends of ``op`` from best to worst], evidence) from a record, or ([], why there is no order to be had). The
    reference is the last: it serves every place.

    Compared are the arms that differ from the baseline in this op alone, each with one backend at all its places. The
    first must be faster than the baseline, or be the baseline and faster than every other. Backends were held to their
    contract, and what the record says of its own timing holds.
    """
    from tritium.kernels.ops import OPS

    if not result["settings"]["gate"] or result["twin"] is None:
        return [], "without contract and twin nothing shows that a backend is right and faster"
    for check in result["checks"]:
        if not check["ok"] and not check["name"].endswith(RIGHT):
            return [], f"{check['name']}: {check['detail']}"
    arms: dict[str, Mapping[str, Any]] = {}
    first = next(row for row in result["arms"] if row["name"] == result["baseline"])

    def else_(row: Mapping[str, Any]) -> dict[str, str]:
        return {k: v for k, v in row["settings"].items() if k not in (op, f"kernels.{op}")}

    for row in result["arms"]:
        backends = {line["backend"] for line in row["kernels"] if line["op"] == op}
        if any("." not in name and OPS[op].load(name).precision is not None for name in backends):
            continue  # auto never means it: that its step is quicker says nothing of what is learned
        if row["ratio"] is not None and len(backends) == 1 and else_(row) == else_(first):
            arms.setdefault(backends.pop(), row)
    if first not in arms.values() or len(arms) < 2:
        return [], "fewer than two backends of it were timed with all else equal"
    order = sorted(arms, key=lambda name: -arms[name]["ratio"]["median"])
    best = arms[order[0]]
    if best is first:
        tied = [name for name in order[1:] if arms[name]["verdict"] != "slower"]
        if tied:
            return [], f"{order[0]} is the fastest, and not shown to be faster than {', '.join(tied)}"
    elif best["verdict"] != "faster":
        return [], f"{order[0]} is the fastest, and not shown to be faster than the baseline"
    if "." in order[0]:
        return [], (
            f"{order[0]} is the fastest, and a module that the package does not have: auto could take it only where it "
            f"can be imported; make it a backend, kernels/{op}/impl_NAME.py"
        )
    order = [name for name in order if "." not in name]
    settings, speeds = result["settings"], []
    for name in order:
        ratio = arms[name]["ratio"]
        speeds.append(f"{name} {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    mode = "compiled" if first["compiled"] else "eager"
    evidence = (
        f"tritium ablate, commit {result['commit'][:10]}: a step of {result['preset']}, T={settings['T']}, "
        f"B={settings['B']}, {first['precision']}, {mode}, on {result['machine']['name']}, in the baseline's speed: "
        + ", ".join(speeds)
    )
    return order[: order.index("reference") + 1] if "reference" in order else order, evidence


def write_tuning(result: Mapping[str, Any], op: str, baseline: Config) -> str:
    """Put the order that ``result`` shows for ``op`` into the tuning file of its kind of device, in front of what holds
    more widely there; returns what was done, in a sentence. An entry of the same scope is replaced, all else stays.

    baseline: the configuration that the order was measured in; ``auto`` must now choose the first of it there, or the
    file is as before and RuntimeError says so. OSError when the file cannot be written.
    """
    from tritium.benchmarks import ablate
    from tritium.kernels.op import tuning

    order, evidence = ranking(result, op)
    if not order:
        return f"{op}: no order was written: {evidence}"
    machine = result["machine"]
    first = next(row for row in result["arms"] if row["name"] == result["baseline"])
    path = tuning_file(machine["device"])
    scope = {
        "arch": machine["arch"], "op": op, "compiled": first["compiled"],
        "dtype": "float32" if first["precision"] == "fp32" else "bfloat16", "phase": "train",
    }  # fmt: skip
    before = path.read_text() if path.exists() else "[]"
    entries = json.loads(before)
    same = [i for i, entry in enumerate(entries) if {k: v for k, v in entry.items() if k in SCOPE} == scope]
    for i in reversed(same):
        del entries[i]
    entries.insert(same[0] if same else 0, {**scope, "order": order, "evidence": evidence})
    _replace(path, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    tuning.cache_clear()
    rows = ablate.planned(baseline.replace(kernels={op: "auto"}), machine["device"])
    picked = {row.backend for row in rows if row.op == op and row.phase == "train"}
    if picked != {order[0]}:
        _replace(path, before)
        tuning.cache_clear()
        raise RuntimeError(
            f"{op}: with the new order auto would choose {', '.join(sorted(picked))} and not {order[0]}, so {path} was "
            "left as it was; another entry decides there first"
        )
    return f"{op}: {' > '.join(order)} written to {path}"


SCOPE = ("arch", "op", "compiled", "dtype", "phase", "shape")  # of kernels.op.Tuned: where an entry holds


def _replace(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def tuning_file(device: str) -> pathlib.Path:
    """cpu.json or cuda.json: of the entries that cover a place the first decides, so a new one must stand in the same
    file before those that hold more widely."""
    from tritium.kernels import op

    return op._FOLDER / "tuning" / f"{device}.json"
