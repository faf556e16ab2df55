"""``tritium bench report``: what it shows, that it shows nothing else, and what damaged records do to it."""

import copy
import functools
import html.parser
import json
import pathlib
import re
import shutil

import pytest

from tritium.benchmarks import ablate, compare, gpu, gpu_table, kernels, record, report, report_page, training
from tritium.benchmarks import ladder as ladders
from tritium.kernels import aot

COMMITTED = record.ROOT / "benchmarks" / "results" / "cpu"
INTERVAL = {"median": 1.1, "low": 1.05, "high": 1.15, "level": 0.95}

# ------------------------------------------------------------------------------------------------ records of every kind


@functools.cache
def blank(kind):
    """A record of this machine with nothing in it: asking git and the system takes a while."""
    return json.dumps(record.begin(kind, f"tritium bench {kind}", "cpu", "tiny"))


def common(kind, **changes):
    made = json.loads(blank("any")) | {"kind": kind, "command": f"tritium bench {kind} tiny", "dirty": False}
    made["kernels"] = [{"site": "norm", "op": "layer_norm", "phase": "train", "backend": "native", "why": "auto"}]
    made["sources"] = {"layer_norm.native": "0123456789abcdef"}
    made["checks"] = [record.check("finite losses", True, "first and last 7, 6")]
    return made | changes


def train(**changes):
    shown = {
        "row": "GEMM",
        "ms": 60.0,
        "backward_ms": 40.0,
        "share": 0.6,
        "roofline_ms": 30.0,
        "fraction": 0.5,
        "top": [],
    }
    rest = shown | {"row": "norm", "ms": 40.0, "share": 0.4, "roofline_ms": None, "fraction": None}
    return common("train") | {
        "figures": [
            record.figure("tokens/s", "tokens/s", "higher", [5000.0, 5010.0, 4990.0, 5020.0, 5000.0]),
            record.figure("MFU, full of measured matmul", "fraction", "higher", [0.251]),
            record.figure("peak memory", "bytes", "lower", value=2**30),
        ],
        "settings": {"T": 64, "B": 4, "rounds": 3, "seed": 0, "config": {}},
        "model": {"parameters": 10, "flops_per_token": {"full": 3, "causal": 2}, "flops_per_token_done": None},
        "rates": {"datasheet": None, "measured_matmul": 1e11, "measured_at": "1 × 1 × 1"},
        "gemms": [], "attention": {"backend": "sdpa", "why_not": {}},
        "compilation": {
            "compiled": True, "first_step_s": 1.0, "seconds": 1.0, "graphs": 1, "graph_breaks": 0,
            "compiled_after_warm_up": 0,
        },
        "dtype": "float32", "deterministic": True, "warm_up": {"runs": 3, "stable": True}, "noise": 0.01,
        "step_over_own": INTERVAL, "anatomy": [shown, rest],
    } | changes  # fmt: skip


def kernel(**changes):
    row = {
        "op": "layer_norm", "backend": "native", "case": "gpt2_124m", "dtype": "fp32", "compiled": False,
        "what": "forward", "stable": True,
        "p20_ms": 0.011, "p50_ms": 0.0125, "p80_ms": 0.014, "noise": 0.01, "gb_per_s": 12.5,
        "tflop_per_s": 0.01, "of_copy": 0.6, "of_matmul": 0.01, "of_bound": 0.6, "bound_by": "memory",
        "over_reference": INTERVAL,
    }  # fmt: skip
    return common("kernels", preset=None) | {
        "figures": [record.figure("layer_norm.native gpt2_124m fp32 forward", "ms", "lower", [0.0125, 0.012, 0.013])],
        "clock": "perf_counter", "rounds": 3, "rates": {"fp32": {"copy_gb_per_s": 20.0, "matmul_tflop_per_s": 0.1}},
        "rows": [row], "refused": [{"op": "layer_norm", "backend": "apex", "why": "needs apex"}], "red": [],
    } | changes  # fmt: skip


def ablation(**changes):
    arm = {
        "name": "attention=native", "settings": {"attention": "native"}, "status": "ok", "reason": "", "group": 0,
        "precision": "fp32", "compiled": False, "speed": INTERVAL | {"median": 4000.0},
        "ratio": INTERVAL | {"median": 1.0},
        "delta_tokens_per_s": INTERVAL, "verdict": "baseline", "times": None, "noise": 0.01, "own_bytes": 100,
        "peak_bytes": 2**20, "loss_delta": 1e-7, "gradient_delta": 1e-6, "gradient_error": None, "first_step_s": 1.0,
        "compile_s": 0.5, "kernels": [], "training": None,
    }  # fmt: skip
    arms = [
        arm, arm | {"name": "attention=sdpa", "ratio": INTERVAL, "verdict": "faster"},
        arm | {"name": "attention=reference", "ratio": {"median": 0.9, "low": 0.88, "high": 0.95, "level": 0.95},
               "verdict": "slower"},
        arm | {"name": "attention=triton", "status": "unavailable", "reason": "needs a GPU", "speed": None,
               "ratio": None, "verdict": ""},
    ]  # fmt: skip
    twin = {"name": "the baseline is as fast as its twin", "ok": True, "detail": ""}
    return common("ablate", checks=[twin]) | {
        "settings": {
            "T": 64, "B": 4, "rounds": 3, "seed": 0, "mode": "one", "axes": {"attention": ["native", "sdpa"]},
            "gate": True, "steps": 0, "seeds": 0, "eval_every": 0, "target_loss": None, "data": "", "config": {},
        },
        "method": "interleaved", "baseline": "attention=native", "arms": arms, "twin": INTERVAL, "resolution": 0.02,
        "figures": [record.figure("attention=native tokens/s", "tokens/s", "higher", [4000.0, 4100.0])],
    } | changes  # fmt: skip


def ladder(**changes):
    cell = {
        "preset": "gpt2_124m", "column": "eager", "status": "ok", "reason": "", "variant": "fp32, eager",
        "tokens_per_s": {"median": 101.5, "low": 99.0, "high": 104.0, "level": 0.95}, "mfu_full": 0.2,
        "mfu_causal": 0.1, "over_first": None, "stable": True, "times": {}, "noise": 0.01, "startup_s": 1.0,
        "peak_bytes": 2**31, "losses": [7.0],
    }  # fmt: skip
    none = dict.fromkeys(
        ["tokens_per_s", "mfu_full", "mfu_causal", "stable", "times", "noise", "startup_s", "peak_bytes"]
    )
    faster = {"tokens_per_s": cell["tokens_per_s"] | {"median": 151.5}, "over_first": INTERVAL}
    cells = [
        cell, cell | {"column": "compile"} | faster,
        cell | {"column": "+ fp8", "status": "not built yet", "reason": "no train.precision=fp8"} | none,
        cell | {"preset": "gpt2_350m", "status": "out of memory", "reason": "give a smaller B"} | none,
        cell | {"preset": "gpt2_350m", "column": "compile", "status": "unequal losses", "reason": "7 and 8"} | none,
    ]  # fmt: skip
    shapes = {"gpt2_124m": {"T": 64, "B": 2}, "gpt2_350m": {"T": 64, "B": 1}}
    return common("ladder", preset=None) | {
        "settings": {"presets": shapes, "columns": ["eager", "compile"], "rounds": 3, "seed": 0, "precision": "fp32",
                     "kernels": "auto"},
        "peak": {"flop_per_s": 1e12, "of": "measured"}, "method": "interleaved", "cells": cells,
        "figures": [record.figure("gpt2_124m eager tokens/s", "tokens/s", "higher", [100.0, 101.0, 102.0, 103.0])],
    } | changes  # fmt: skip


def goals(**changes):
    row = {"figure": "gpt2_124m tokens/s", "value": 612345.0, "unit": "tokens/s", "goal": 6e5, "better": "higher",
           "verdict": "met", "by": "triton", "recorded": False}  # fmt: skip
    return common("gpu", preset=None) | {
        "stages": [{"stage": "training", "status": "ok", "seconds": 1.0, "detail": ""}],
        "goals": [
            row, row | {"figure": "slow", "value": 1.3, "unit": "×", "goal": 1.2, "better": "lower",
                        "verdict": "not met", "recorded": True},
            row | {"figure": "absent", "value": None, "verdict": "not run"},
        ],
    } | changes  # fmt: skip


def throughput(**changes):
    return record.read(sorted(COMMITTED.glob("throughput_*.json"))[0]) | changes


KINDS = {
    "train": train, "kernels": kernel, "ablate": ablation, "ladder": ladder, "throughput": throughput, "gpu": goals,
}  # fmt: skip
SCHEMAS = {
    "train": training.SCHEMA, "kernels": kernels.SCHEMA, "ablate": ablate.SCHEMA, "gpu": gpu_table.SCHEMA,
    "ladder": ladders.SCHEMA,
}  # fmt: skip


def test_the_records_of_these_tests_fit_their_kinds():
    for kind, schema in SCHEMAS.items():
        found = record.problems(KINDS[kind](), {**record.COMMON, **schema})
        assert [problem for problem in found if not problem.endswith("is missing")] == []  # what no page shows


# ------------------------------------------------------------------------------------------------------ reading a page


class Page(html.parser.HTMLParser):
    """A page as a reader sees it. tags: every tag with its attributes; rows: every row of every table as texts; texts:
    tag → what its elements say; open: what was not closed."""

    VOID = {"meta", "br", "img"}

    def __init__(self, content):
        super().__init__()
        self.tags, self.rows, self.open, self.loud, self.words = [], [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows is not None:
            self.rows[-1].append("")
        if dict(attributes).get("class") == "loud":
            self.loud.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if inside and inside[-1] in ("script", "style"):
            return
        self.words.append(data)
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
        if any(attributes.get("class") == "loud" for _, attributes in self.open):
            self.loud[-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def row(self, *begins):
        """The one row that begins with these cells."""
        (found,) = [row for row in self.rows if row[: len(begins)] == list(begins)]
        return found


def put(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in records.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def page_of(folder, *words, status=0):
    assert report.main([str(folder), *words]) == status
    return Page((folder / "report.html").read_text())


def test_every_kind_is_shown_with_its_numbers(tmp_path):
    put(tmp_path, {f"deep/{kind}.json": made() for kind, made in KINDS.items()})
    page = page_of(tmp_path)
    assert page.row("tiny", "5,000")[3:9] == [
        "T=64, B=4", "fp32, compiled", "25.1 %", "–", "1.100 [1.050, 1.150]", "1.00 GiB",
    ]  # fmt: skip
    best = throughput()["best_peer"]
    ratio = throughput()["speedup"][best]
    assert f"{ratio['median']:.3f} × [{ratio['low']:.3f}, {ratio['high']:.3f}]" in page.row(best)
    for name, why in throughput()["peers_absent"].items():
        assert page.row(name) == [name, "unrun", why]
    settings = throughput()["settings"]
    processes = settings["models"]["gpt2_124m"]["restarts"]
    assert processes > 1
    assert f"gpt2_124m: {settings['rounds']} interleaved rounds in each of {processes} processes (" in page.text
    assert page.row("GEMM") == ["GEMM", "60.00", "60.0 %", "30.00", "50 %"]
    assert page.row("norm", "40.00") == ["norm", "40.00", "40.0 %", "–", "–"]
    assert page.row("layer_norm", "native", "gpt2_124m")[5:] == [
        "0.01250", "[0.01100, 0.01400]", "12.50", "0.01000", "60 %", "memory", "1.100 × [1.050, 1.150]",
    ]  # fmt: skip
    assert page.row("layer_norm.apex") == ["layer_norm.apex", "unrun", "needs apex"]
    assert page.row("attention=reference")[2] == "-10.0 % [-12.0, -5.0]"
    assert "attention=triton: unavailable: needs a GPU" in page.text
    assert page.row("gpt2_124m, T=64, B=2")[1:] == ["101.5", "151.5 (1.10 ×)", "not built yet"]
    assert page.row("gpt2_350m, T=64, B=1")[1:] == ["out of memory", "unequal losses", "unrun"]
    kinds = {name for tag, a in page.tags if tag == "td" for name in a.get("class", "").split()}
    assert kinds >= {"ours", "unrun", "red", "muted"}
    assert page.row("gpt2_350m", "eager")[2] == "out of memory: give a smaller B"
    assert page.row("gpt2_124m", "151.5")[2:5] == ["[99.00, 104.0]", "T=64, B=2", "fp32, eager (compile)"]
    assert page.row("gpt2_124m tokens/s")[1:] == ["612,345 tokens/s", "≥ 600,000 tokens/s", "met", "triton"]
    assert page.row("slow")[1:] == ["1.300 ×", "≤ 1.200 ×", "not met", "triton (an earlier run)"]
    assert "Goals: 1 met, 1 not met, 1 unrun." in page.text
    assert page.row("absent")[1:4] == ["unrun", "≥ 600,000 tokens/s", "unrun"]
    for kind, made in KINDS.items():
        assert f"deep/{kind}.json: {kind}, " in page.text
        assert made()["command"] in page.text
    assert not page.loud


def test_threads_and_environment_are_on_the_page(tmp_path):
    made = train(environment={"OMP_WAIT_POLICY": "PASSIVE"})
    made["machine"] = made["machine"] | {"threads": 7}
    put(tmp_path, {"a.json": made})
    text = page_of(tmp_path).text
    assert "7 threads" in text
    assert "Set: OMP_WAIT_POLICY=PASSIVE." in text


def test_the_page_needs_nothing_else(tmp_path):
    put(tmp_path, {f"{kind}.json": made() for kind, made in KINDS.items()} | {"gpu/device.jsonl": stage("device")})
    page = page_of(tmp_path)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in ids
    content = (tmp_path / "report.html").read_text()
    assert "url(" not in content
    assert "@import" not in content
    assert "prefers-color-scheme:dark" in content
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_of_restarts_the_page_says_how_many_and_what_stopped_them(tmp_path):
    data = throughput()
    name = next(iter(data["settings"]["models"]))
    data["settings"]["models"][name] |= {"restarts": 3, "deviation": 0.0213, "stopped": "restart 4 failed: killed"}
    for figure in data["figures"]:
        figure["restarts"] = [i * 3 // len(figure["samples"]) for i in range(len(figure["samples"]))]
    data["settings"]["rounds"] = 4
    put(tmp_path, {"a.json": data})
    page = page_of(tmp_path)
    said = "4 interleaved rounds in each of 3 processes (which deviate by 2.1 %); restart 4 failed: killed."
    assert f"{name}: {said}" in page.text
    figure = data["figures"][0]
    wanted = compare.median_of(figure["samples"], figure["restarts"])
    key = figure["name"].removesuffix(" tokens/s")
    assert page.row(key)[2] == f"[{report.number(wanted.low)}, {report.number(wanted.high)}]"


def test_what_is_no_baseline_is_called_void_on_the_page_too(tmp_path):
    why = "it has to be at least as fast as huggingface, compiled, which was not timed"
    put(tmp_path, {"a.json": throughput() | {"void": {"textbook": why}}})
    page = page_of(tmp_path)
    key = next(key for key, arm in throughput()["arms"].items() if arm["peer"] == "textbook")
    assert page.row(f"{key} (void as a baseline)")
    assert f"textbook is void as a baseline: {why}." in page.text


def test_what_was_not_measured_is_unrun(tmp_path):
    put(tmp_path, {"train.json": train()})
    page = page_of(tmp_path)
    machine = report.machine_name(train()["machine"])
    assert page.row("preset", machine) == ["preset", machine, "a GPU"]
    assert page.row("tiny", "5,000 at T=64, B=4 (fp32, compiled)")[2] == "unrun"
    assert page.row("gpt2_1558m") == ["gpt2_1558m", "unrun", "unrun"]
    assert page.text.count("Unrun.") == 6  # goals, peers, ladder, kernels, ablations, make gpu
    for goal in gpu_table.TRAINING_GOALS:
        name = f"{goal.preset} {'tokens/s' if goal.unit == 'tokens/s' else gpu_table.OVER}"
        assert [page.row(name)[i] for i in (1, 3)] == ["unrun", "unrun"]


def test_the_newest_measurement_is_the_one_in_front(tmp_path):
    old = train(date="2020-01-01T00:00:00+00:00")
    old["figures"][0] = record.figure("tokens/s", "tokens/s", "higher", [9000.0, 9000.0])
    put(tmp_path, {"a.json": train(), "b.json": old})
    page = page_of(tmp_path)
    assert page.row("tiny", "5,000 at T=64, B=4 (fp32, compiled)")
    assert page.row("tiny", "9,000")[-1] == "2020-01-01 00:00"


def test_of_a_ladder_the_fastest_is_the_one_in_front(tmp_path):
    put(tmp_path, {"ladder.json": ladder()})
    assert page_of(tmp_path).row("gpt2_124m", "151.5 at T=64, B=2 (fp32, eager (compile))")


@pytest.mark.parametrize(
    ("command", "in_front"),
    [
        ("tritium bench train tiny --anatomy --T 64 --data.folder d", True),
        ("tritium bench train tiny --train.recompute full", False),
        ("tritium bench train tiny --model.n_layer=2", False),
        ("tritium bench peers tiny --kernels reference", False),
    ],
)
def test_what_is_not_the_preset_as_it_is_does_not_take_its_place(tmp_path, command, in_front):
    """It is newer and faster, as is a rung of the ladder; where there is nothing else it stands there by its name."""
    other = train(date="2030-01-01T00:00:00+00:00", command=command)
    other["figures"][0] = record.figure("tokens/s", "tokens/s", "higher", [9000.0, 9000.0])
    rung = ladder(date="2031-01-01T00:00:00+00:00")
    rung["settings"]["presets"]["tiny"] = {"T": 64, "B": 1}
    rung["cells"].append(rung["cells"][1] | {"preset": "tiny"})
    put(tmp_path, {"a.json": train(), "b.json": other, "c.json": rung})
    wanted = "9,000" if in_front else "5,000"
    assert page_of(tmp_path).row("tiny", f"{wanted} at T=64, B=4 (fp32, compiled)")
    for name in ("a.json", "b.json"):
        (tmp_path / name).unlink()
    assert page_of(tmp_path).row("tiny", "151.5 at T=64, B=1 (fp32, eager (compile))")


def test_a_peers_parts_do_not_take_the_place_of_the_preset_s(tmp_path):
    data = throughput()
    arms = {key: arm for key, arm in data["arms"].items() if arm["peer"] == "tritium"}
    own, other = (
        next(key for key, arm in arms.items() if bool(data["settings"]["models"][arm["model"]]["changed"]) == changed)
        for changed in (False, True)
    )
    for figure in data["figures"]:
        if figure["name"] == f"{other} tokens/s":
            figure |= record.figure(figure["name"], "tokens/s", "higher", [1e6, 1e6])
    put(tmp_path, {"a.json": data})
    found = {(s.tokens_per_s, s.as_it_is, s.what) for s in report.speeds(report.search(tmp_path))}
    changed = data["settings"]["models"][arms[other]["model"]]["changed"]
    assert (1e6, False, f"{arms[other]['variant']}, {changed}") in found
    shown = f"{report.number(data['arms'][own]['tokens_per_s'])} at T=256, B=2 ({arms[own]['variant']})"
    assert page_of(tmp_path).row(data["preset"], shown)


def test_a_red_check_is_loud_and_the_speed_withheld(tmp_path):
    put(tmp_path, {"train.json": train(checks=[record.check("finite losses", False, "first and last 7, nan")])})
    page = page_of(tmp_path)
    assert page.loud[0] == "train.json: finite losses: first and last 7, nan"
    assert [row[1:3] for row in page.rows if row[0] == "tiny"] == [["withheld: red", "unrun"], ["withheld: red", "–"]]
    front = page.text[: page.text.index("Against other implementations")]
    assert "5,000" not in front


def test_committed_records_of_version_1_are_shown(tmp_path):
    old = [path for path in COMMITTED.glob("*.json") if json.loads(path.read_text())["schema"] == 1]
    assert old
    for path in old:
        shutil.copy(path, tmp_path)
    found = report.search(tmp_path)
    assert len(found.entries) == len(old)
    assert not found.refused
    made = report.speeds(found)
    assert "gpt2_124m" in {s.preset for s in made}
    assert len(made) == len(found.entries)  # tritium's own, and no peer's
    assert not [entry.problem for entry in found.entries if entry.problem]


def test_every_committed_record_is_shown():
    found = report.search(COMMITTED)
    assert len(found.entries) == len(list(COMMITTED.glob("*.json")))
    assert not found.refused
    assert not [entry.problem for entry in found.entries if entry.problem]


# -------------------------------------------------------------------------------------------------------------- charts


def test_bars_and_their_intervals_are_drawn_to_scale(tmp_path):
    bars = [
        report_page.Bar("a", 10.0, 8.0, 12.0, "10"), report_page.Bar("b", -5.0, -8.0, -4.0, "-5", "worse"),
    ]  # fmt: skip
    drawn = Page(str(report_page._bars(report_page.Bars(bars, band=(-2.0, 2.0)))))
    shapes = [(a.get("class"), a) for tag, a in drawn.tags if tag == "rect"]

    def place(attributes):
        return float(attributes["x"].rstrip("%")), float(attributes["width"].rstrip("%"))

    assert [kind for kind, _ in shapes] == ["band", "other", "band", "worse"]
    band, a, _, b = (place(attributes) for _, attributes in shapes)  # from -8 to 12: 5 % a unit
    assert (band, a, b) == ((30.0, 20.0), (40.0, 50.0), (15.0, 25.0))
    whiskers = [
        (float(a["x1"].rstrip("%")), float(a["x2"].rstrip("%")))
        for tag, a in drawn.tags if tag == "line" and a["y1"] == a["y2"]
    ]  # fmt: skip
    assert whiskers == [(80.0, 100.0), (0.0, 20.0)]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "10", None, True])
def test_what_cannot_be_drawn_is_no_block(wrong):
    made = [
        lambda: report_page.Bar("a", wrong, 0.0, 1.0, "a"), lambda: report_page.Bar("a", 0.0, wrong, 1.0, "a"),
        lambda: report_page.Bars([], band=(wrong, 0.0)), lambda: report_page.Stack([("a", wrong)], "a"),
        lambda: report_page.Cell("a", bar=wrong) if wrong is not None else report_page.Cell(wrong),
    ]  # fmt: skip
    for make in made:
        with pytest.raises((TypeError, ValueError)):
            make()


def test_the_parts_of_a_stack_fill_it():
    parts = [("GEMM", 0.5), ("norm", 0.3), ("other", 0.2)]
    drawn = Page(str(report_page._stack(report_page.Stack(parts, "a step"))))
    places = [(a["x"], a["width"]) for tag, a in drawn.tags if tag == "rect"]
    assert places == [("0.00%", "50.00%"), ("50.00%", "30.00%"), ("80.00%", "20.00%")]
    assert "norm 30.0 %" in drawn.text


def test_samples_are_drawn_in_their_order():
    drawn = str(report_page._points(report_page.Points([("step", [1.0, 3.0, 2.0], "3 samples")])))
    assert 'points="0.00,22.00 50.00,2.00 100.00,12.00"' in drawn


def test_numbers_sort_as_numbers():
    table = report_page.Table(["x"], [[report_page.Cell("1,000", 1000.0)], [report_page.Cell("9", 9.0)]])
    values = [a.get("data-v") for tag, a in Page(str(report_page._table(table))).tags if tag == "td"]
    assert values == ["1000.0", "9.0"]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (13697.5, "tokens/s", "13,698 tokens/s"), (324.32, "tokens/s", "324.3 tokens/s"), (0.25, "fraction", "25.0 %"),
        (3 * 2**30, "bytes", "3.00 GiB"), (2**20, "bytes", "1.0 MiB"), (299.0, "ms", "299.0 ms"), (0, "s", "0 s"),
        (1.5, "×", "1.500 ×"),
    ],
)  # fmt: skip
def test_quantities(value, unit, shown):
    assert report.quantity(value, unit) == shown


# ----------------------------------------------------------------------------------------------------------- injection

ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(1)><!-- measured:end --> | `x` [a](javascript:alert(1))"


def attacked(value, kept=()):
    """The same with every string, keys too, become an attack; what is under a key of ``kept`` stays."""
    if isinstance(value, str):
        return value[:3] + ATTACK
    if isinstance(value, list):
        return [attacked(item, kept) for item in value]
    if isinstance(value, dict):
        names = record.COMMON.keys() | record.MACHINE.keys() | OWN
        return {
            key if key in names else key + ATTACK: item if key in kept else attacked(item, kept)
            for key, item in value.items()
        }
    return value


def keys_of(value):
    if isinstance(value, dict):
        return {key for key in value if isinstance(key, str)} | {k for item in value.values() for k in keys_of(item)}
    return {k for item in value for k in keys_of(item)} if isinstance(value, list) else set()


OWN = set().union(*(keys_of(made()) for made in KINDS.values())) - {"layer_norm.native", "attention", "fp32"}
BRANCHES = ("kind", "device", "peer", "status", "verdict", "better", "unit", "date")  # what decides what is shown


@pytest.mark.parametrize("kept", [("kind",), BRANCHES, (*BRANCHES, "baseline", "name", "figures", "arms")])
def test_no_string_of_a_record_becomes_markup(tmp_path, kept):
    hostile = {f"{kind}.json": attacked(made(), kept) for kind, made in KINDS.items()}
    for made in hostile.values():
        made["checks"].append({"name": ATTACK, "ok": False, "detail": ATTACK})
    hostile["<img src=x onerror=alert(1)>.json"] = hostile["train.json"]
    hostile["<script>alert(2)<.json"] = "{" + ATTACK
    lines = [attacked(line, ("unit",)) for line in map(json.loads, stage("kernels").splitlines())]
    hostile["gpu/kernels.jsonl"] = "\n".join(map(json.dumps, lines))
    put(tmp_path, hostile)
    (tmp_path / "performance.md").write_text("\n".join(["# Page", *report.MARKERS, "end"]))
    page = page_of(tmp_path, "--markdown", str(tmp_path / "performance.md"))
    assert ATTACK in "".join(page.words)
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [a for _, a in page.tags if not a.get("href", "#").startswith("#")]
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    text = (tmp_path / "performance.md").read_text()
    assert text.count(report.MARKERS[1]) == 1
    rendered = re.sub(r"`[^`]*`", "", text.replace(r"\`", ""))  # without code, where a tag is none
    assert "<script" not in rendered and "<img" not in rendered
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "](javascript" not in rendered


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    put(tmp_path, {"train.json": json.dumps(train(preset="half \ud83d"))})
    assert "half ?" in page_of(tmp_path).text


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.json", json.dumps(train())[:500], "not a record that can be read"),
        ("foreign.json", '{"weights": [1, 2]}', "is not a benchmark record"),
        ("list.json", "[1, 2]", "is not a benchmark record"),
        ("old.json", '{"schema": 1, "kind": "throughput"}', "damaged record"),
        ("new.json", '{"schema": 99, "kind": "train"}', "schema 99"),
        ("deep.json", "[" * 100_000, "maximum recursion depth"),
        ("nan.json", json.dumps(train(figures=[record.figure("x", "ms", "", [float("nan")])])), "must be finite"),
        ("huge.json", json.dumps(train(settings={"T": 10**400})), "huge number"),
        ("large.json", json.dumps(train(noise=1e200)), "1e+200"),
        ("digits.json", '{"schema": ' + "1" * 5000 + "}", "has 5000 digits"),
        ("huge.jsonl", '{"stage": "a", "name": "b", "value": 1' + "0" * 400 + ', "unit": "c"}', "huge number"),
        ("digits.jsonl", '{"stage": "a", "name": "b", "value": ' + "1" * 5000 + ', "unit": "c"}', "digits"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.5}\n', "line"),
        ("numbers.jsonl", "1\n2\n", "line"),
        ("empty.jsonl", "", "line"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_costs_nothing_else(tmp_path, name, content, said):
    put(tmp_path, {"train.json": train(), name: content})
    page = page_of(tmp_path)
    assert said in page.row(name)[1]
    assert page.row("tiny", "5,000")


def test_bytes_that_are_no_text_are_named(tmp_path):
    put(tmp_path, {"train.json": train()})
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00{")
    page = page_of(tmp_path)
    assert page.row("a.json") and page.row("a.jsonl")


GARBAGE = (None, 7, "x", [], {}, [7], {"x": 7}, -1e99, float("nan"), True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_whatever_a_records_own_fields_are_the_page_is_made(tmp_path, kind):
    good = KINDS[kind]()
    own = [key for key in good if key not in record.COMMON]
    broken = {}
    for key in own:
        broken[f"{key} gone.json"] = {k: v for k, v in good.items() if k != key}
        for i, garbage in enumerate(GARBAGE):
            broken[f"{key} {i}.json"] = good | {key: garbage}
            inner = copy.deepcopy(good[key])
            part = inner[0] if isinstance(inner, list) and inner else inner
            if isinstance(part, dict) and part:
                part[sorted(part)[i % len(part)]] = garbage
                broken[f"{key} in {i}.json"] = good | {key: inner}
    put(tmp_path, {"good.json": good, **broken})
    page = page_of(tmp_path)
    assert "good.json" in page.text
    assert not [row for row in page.rows if row[0] == "good.json"]  # where files are that could not be shown
    named = {row[0] for row in page.rows} & broken.keys()
    shown = {name for name in broken if f"{name}: {kind}, " in page.text}
    assert named | shown == broken.keys()
    assert named


# ------------------------------------------------------------------------------------------------------------ make gpu


def stage(name, *lines, end="ok", device="cuda"):
    """The lines of a stage, as benchmarks/stages.py leaves them."""
    made = [{"stage": name, **line} for line in lines]
    if name == "device":
        environment = json.loads(blank("gpu"))
        environment["machine"] |= {"device": device, "name": "A GPU of ours" if device == "cuda" else "CPU"}
        made.append({"stage": name, "name": "machine", "value": "A GPU", "unit": "name", "environment": environment})
    elif not lines:
        value = {"name": f"layer_norm.{name}", "value": 1.25, "unit": "GB/s", "over_reference": INTERVAL, "p50_ms": 0.5}
        made.append({"stage": name, **value})
    if end:
        made.append(
            {"stage": name, "name": "end", "value": end, "unit": "status", "seconds": 3.0, "detail": "so it was"}
        )
    return "\n".join(map(json.dumps, made)) + "\n"


SPEED = {"name": "gpt2_124m, tritium --kernels=auto", "value": 98765.0, "unit": "tokens/s", "B": 32, "T": 1024,
         "peak_gib": 20.0}  # fmt: skip
EQUAL = {"name": "equal losses", "value": "True", "unit": "verdict"}


def test_the_stages_of_make_gpu_are_shown(tmp_path):
    put(
        tmp_path / "h100",
        {"device.jsonl": stage("device"), "training.jsonl": stage("training", EQUAL, SPEED),
         "gemm.jsonl": stage("gemm")},
    )  # fmt: skip
    page = page_of(tmp_path)
    assert page.row("preset", "A GPU of ours")
    assert page.row("gpt2_124m", "98,765 at T=1024, B=32 (tritium --kernels=auto)")
    assert page.row("gpt2_124m", "98,765")[8] == "20.00 GiB"
    assert page.row("layer_norm.gemm") == [
        "layer_norm.gemm", "1.250", "GB/s", "over_reference 1.100 × [1.050, 1.150], p50_ms 0.5000",
    ]  # fmt: skip
    assert page.row("training", "ok") == ["training", "ok", "3", "2", "so it was"]
    assert page.row("flex", "unrun")
    assert {row[0] for row in page.rows if row[1:2] == ["unrun"]} >= gpu.STAGES.keys() - {"device", "training", "gemm"}
    assert not page.loud


def test_what_an_earlier_run_measured_is_its_own(tmp_path):
    lines = stage("training", EQUAL, SPEED | {"recorded": "gpu_1/training.jsonl"})
    put(tmp_path, {"device.jsonl": stage("device"), "training.jsonl": lines})
    assert [row[0] for row in page_of(tmp_path).rows if "98,765" in " ".join(row)] == [SPEED["name"]]  # in its stage


def test_of_several_runs_the_newest_whose_goals_can_be_read_counts(tmp_path):
    row = goals()["goals"][0]
    records = {
        "1.json": goals(date="2020-01-01T00:00:00+00:00", goals=[row | {"value": 1000.0}]),
        "2.json": goals(date="2021-01-01T00:00:00+00:00", goals=[row | {"value": 2000.0}]),
        "3.json": goals(date="2022-01-01T00:00:00+00:00", goals=[{"figure": "x"}]),
    }
    put(tmp_path, records)
    page = page_of(tmp_path)
    assert page.row("gpt2_124m tokens/s", "2,000 tokens/s")
    assert "1,000 tokens/s" not in [cell for row in page.rows for cell in row]
    assert "KeyError" in page.row("3.json")[1]


def test_a_rehearsal_says_that_it_is_none_of_it(tmp_path):
    put(tmp_path, {"device.jsonl": stage("device", device="cpu"), "training.jsonl": stage("training", EQUAL, SPEED)})
    page = page_of(tmp_path)
    assert page.loud == ["A rehearsal without a GPU: its figures mean nothing."]
    assert [row for row in page.rows if "98,765" in row[1:2]] == [
        [SPEED["name"], "98,765", "tokens/s", "B 32, T 1024, peak_gib 20.00"]
    ]


def test_records_of_a_rehearsal_are_shown_as_such_and_nowhere_else(tmp_path):
    lines = {"run/device.jsonl": stage("device", device="cpu")}
    red = train(checks=[record.check("finite losses", False)])
    put(tmp_path, {"train.json": train(), "run/in/train.json": red, "run/gpu.json": goals(), **lines})
    page = page_of(tmp_path)
    assert page.row("tiny", "5,000")  # once
    assert page.row("gpt2_124m tokens/s")[1] == "unrun"
    assert page.loud.count("Of a rehearsal without a GPU: its figures mean nothing.") == 2
    assert "Red" not in [word.strip() for word in page.words]


@pytest.mark.parametrize(
    ("lines", "end", "status", "said"),
    [
        ((EQUAL, SPEED), "failed", "failed", "training: failed: so it was"),
        ((EQUAL, SPEED), "time limit", "time limit", "training: time limit: so it was"),
        ((EQUAL | {"value": "False", "problems": "5 > 4"}, SPEED), "ok", "ok", "training: equal losses: False 5 > 4"),
        (({"name": "gelu.triton", "value": "failed", "unit": "contract", "reason": "NaN"},), "ok", "ok",
         "training: gelu.triton: failed NaN"),
        (({"name": "gelu.triton", "value": "hung", "unit": "item", "reason": "killed"},), "ok", "ok",
         "training: gelu.triton: hung killed"),
        (({"name": "check: losses", "value": "nan", "unit": "red"},), "ok", "ok", "training: check: losses: nan"),
        (({"name": "flash", "value": "RuntimeError: no", "unit": "error"},), "ok", "ok",
         "training: flash: RuntimeError: no"),
        ((SPEED,), "", "cut short", None),
    ],
)  # fmt: skip
def test_what_went_wrong_in_a_stage_is_loud(tmp_path, lines, end, status, said):
    put(tmp_path, {"device.jsonl": stage("device"), "training.jsonl": stage("training", *lines, end=end)})
    page = page_of(tmp_path)
    assert page.row("training")[1] == status
    assert page.loud == ([f".: make gpu: {said}", f"RED: {said}"] if said else [])
    if SPEED in lines and said:
        assert sum(row[:2] == ["gpt2_124m", "withheld: red"] for row in page.rows) == 2


def test_a_line_that_a_kill_cut_short_costs_no_other(tmp_path):
    put(tmp_path, {"device.jsonl": stage("device"), "gemm.jsonl": stage("gemm", end="") + '{"stage": "gemm", "na'})
    assert page_of(tmp_path).row("layer_norm.gemm")[1] == "1.250"


# ------------------------------------------------------------------------------------------------------------ Markdown


def test_markdown_replaces_its_own_part_and_nothing_else(tmp_path):
    put(tmp_path, {"train.json": train(), "kernels.json": kernel()})
    page, text = tmp_path / "page.md", "# Page\n\nbefore\n{}\nold\n{}\n\nafter é\n".format(*report.MARKERS)
    page.write_text(text)
    page_of(tmp_path, "--markdown", str(page))
    once = page.read_text()
    head, _, rest = once.partition(report.MARKERS[0])
    inside, _, tail = rest.partition(report.MARKERS[1])
    assert (head, tail) == ("# Page\n\nbefore\n", "\n\nafter é\n")
    assert "old" not in inside
    assert "| tiny | **5,000** |" in inside
    assert "| gpt2_124m | *unrun* | *unrun* |" in inside
    assert "| layer_norm | native | gpt2_124m | fp32 | forward | 0.01250 |" in inside
    page_of(tmp_path, "--markdown", str(page))
    assert page.read_text() == once


@pytest.mark.parametrize(
    "text",
    [
        "no markers\n",
        f"{report.MARKERS[0]}\n",
        f"{report.MARKERS[1]}\n{report.MARKERS[0]}\n",
        "{0}\n{1}\n{0}\n{1}\n".format(*report.MARKERS),
        f"{report.MARKERS[0]}\n{report.OTHERS[0]}\n{report.OTHERS[1]}\n{report.MARKERS[1]}\n",  # theirs inside ours
        f"{report.OTHERS[0]}\n{report.MARKERS[0]}\n{report.MARKERS[1]}\n{report.OTHERS[1]}\n",  # ours inside theirs
    ],
)
def test_a_page_that_is_not_as_it_must_be_is_left_alone(tmp_path, capsys, text):
    put(tmp_path, {"train.json": train()})
    (tmp_path / "page.md").write_text(text)
    assert report.main([str(tmp_path), "--markdown", str(tmp_path / "page.md")]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text


def test_neither_writer_of_the_page_destroys_the_others_part(tmp_path):
    assert report.OTHERS == (aot.BEGIN, aot.END)
    put(tmp_path, {"train.json": train()})
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# Page", *report.MARKERS, "between", *report.OTHERS, "end\n"]))
    aot.write_page(page, "compiled tables")
    page_of(tmp_path, "--markdown", str(page))
    assert "compiled tables" in page.read_text()
    aot.write_page(page, "other tables")
    text = page.read_text()
    assert "**5,000**" in text and "other tables" in text and "compiled tables" not in text
    page_of(tmp_path, "--markdown", str(page))
    assert page.read_text() == text


def test_the_performance_page_has_room_for_both():
    text = (record.ROOT / "docs" / "performance.md").read_text()
    for marker in (*report.MARKERS, *report.OTHERS):
        assert text.count(marker) == 1
    assert text.index(report.MARKERS[1]) < text.index(report.OTHERS[0])


# ------------------------------------------------------------------------------------------------------------- command


def test_a_folder_without_records_leaves_the_last_page_as_it_was(tmp_path, capsys):
    put(tmp_path, {"report.html": "the one before", "foreign.json": "{}"})
    assert report.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "no record" in said and "foreign.json" in said
    assert (tmp_path / "report.html").read_text() == "the one before"


def test_out_is_where_the_page_goes(tmp_path, capsys):
    put(tmp_path / "records", {"train.json": train()})
    assert report.main([str(tmp_path / "records"), "--out", str(tmp_path / "page.html")]) == 0
    assert "1 record and 0 runs" in capsys.readouterr().out
    assert Page((tmp_path / "page.html").read_text())
    assert report.main([str(tmp_path / "records"), "--out", str(tmp_path / "none" / "page.html")]) == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "there is no folder nowhere"), ([".", "--markdwon", "x"], "the nearest are --markdown")],
)  # fmt: skip
def test_a_wrong_command_line(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        report.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(pathlib.Path(tmp_path).iterdir())
