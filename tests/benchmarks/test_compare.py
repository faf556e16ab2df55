"""``tritium bench compare``: its statistics on samples whose truth is known, its verdicts, its refusals."""

import functools
import json
import math
import pathlib

import numpy
import pytest

from tritium.benchmarks import compare, record


def samples(seed, middle, n=20, noise=0.02, drift=0.0, memory=0.0):
    """``n`` positive samples around ``middle``. drift: the relative change over them; memory: how much of a sample's
    deviation stays in the next one's (an autoregression of order 1)."""
    random = numpy.random.default_rng(seed)
    fresh, deviations = random.normal(size=n), numpy.empty(n)
    deviations[0] = fresh[0]
    for i in range(1, n):
        deviations[i] = memory * deviations[i - 1] + (1 - memory**2) ** 0.5 * fresh[i]
    return list(middle * (1 + drift * numpy.linspace(-0.5, 0.5, n)) * numpy.exp(noise * deviations))


def intervals(trials, ratio=1.0, drifts=(0.0, 0.0), **kinds):
    """Of ``trials`` pairs of records: B's samples are ``ratio`` times A's."""
    return [
        compare.ratio_of_medians(
            samples(2 * seed, ratio, drift=drifts[1], **kinds), samples(2 * seed + 1, 1.0, drift=drifts[0], **kinds)
        )
        for seed in range(trials)
    ]


@pytest.mark.parametrize(("memory", "n", "least"), [(0.0, 20, 0.92), (0.5, 20, 0.89), (0.5, 80, 0.89), (0.0, 6, 0.92)])
def test_the_interval_covers_the_truth_at_its_nominal_rate(memory, n, least):
    found = intervals(200, 1.03, n=n, memory=memory)
    covered = sum(f.low <= 1.03 <= f.high for f in found) / len(found)
    assert least <= covered  # nominal 0.95; 200 trials have a standard error of 0.015
    assert all(f.low <= f.median <= f.high for f in found)


def test_independent_samples_have_no_needlessly_wide_interval():
    found = intervals(50, 1.03, n=40)
    assert numpy.median([f.high - f.low for f in found]) < 0.03  # a 95 % interval of exact theory is 0.022 wide
    assert numpy.median([f.median for f in found]) == pytest.approx(1.03, abs=0.003)


def test_three_percent_are_found_and_nothing_in_noise():
    better = intervals(60, 1.03, n=40, noise=0.01)
    assert sum(f.low > 1.0 for f in better) >= 57
    worse = intervals(60, 1 / 1.03, n=40, noise=0.01)
    assert sum(f.high < 1.0 for f in worse) >= 57
    none = intervals(200, 1.0, n=40, noise=0.01)
    assert sum(f.low > 1.0 or f.high < 1.0 for f in none) <= 16  # nominal 10


@pytest.mark.parametrize("drifts", [(0.1, 0.1), (0.1, -0.1), (0.0, 0.1)])
def test_a_drift_within_the_records_fakes_no_difference(drifts):
    found = intervals(60, 1.0, drifts, n=40, noise=0.005)
    assert sum(f.low > 1.0 or f.high < 1.0 for f in found) <= 3


def test_blocks_are_rounds_and_never_fewer_than_five():
    assert [compare.block_of(n) for n in (2, 5, 10, 20, 40, 160)] == [1, 1, 2, 4, 5, 20]


def test_a_bootstrap_of_few_blocks_is_widened():
    # of five values, each a block, three draws or more are the largest with probability 0.058, so that it is the
    # quantile 0.975 of the resamples' medians; Student's for four degrees of freedom is 2.776, a normal's 1.960
    found = compare.median_of([math.exp(0.01 * k) for k in (1, -1, 0, -2, 2)])
    widened = 0.02 * math.sqrt(5 / 4) * 2.7764 / 1.9600
    assert math.log(found.high) == pytest.approx(widened, rel=1e-4)
    assert math.log(found.low) == pytest.approx(-widened, rel=1e-4)
    assert found.median == pytest.approx(1.0)


def test_a_skewed_record_has_a_skewed_interval_on_its_own_side():
    skewed = [1.0] * 11 + [1.0 + 0.02 * k for k in range(1, 10)]
    over, under = (compare.ratio_of_medians(*pair) for pair in ((skewed, [1.0] * 20), ([1.0] * 20, skewed)))
    assert over.low == pytest.approx(1.0)
    assert over.high > 1.02
    assert under.high == pytest.approx(1.0)
    assert under.low < 0.98


def test_samples_that_are_all_equal_have_a_point_for_an_interval():
    found = compare.ratio_of_medians([3.0] * 4, [2.0] * 6)
    assert (found.median, found.low, found.high) == (pytest.approx(1.5),) * 3


def restarted(seed, middle, processes, n=8, deviation=0.02, noise=0.01):
    """(samples, their restarts) of ``processes`` processes, each of its own speed for as long as it lives."""
    random = numpy.random.default_rng(seed)
    speeds = middle * numpy.exp(
        deviation * random.normal(size=(processes, 1)) + noise * random.normal(size=(processes, n))
    )
    return list(speeds.ravel()), [i for i in range(processes) for _ in range(n)]


@pytest.mark.parametrize("processes", [(5, 5), (3, 8), (5, 1), (1, 5), (3, 1)])
def test_the_interval_covers_what_differs_between_processes(processes):
    """Of one process in both records nobody can tell."""
    found, blind = [], []
    for seed in range(400):
        top, bottom = (restarted(2 * seed + i, (1.1, 1.0)[i], processes[i]) for i in range(2))
        restarts = tuple(of if max(of) else [] for _, of in (top, bottom))
        found.append(compare.ratio_of_medians(top[0], bottom[0], restarts))
        if seed < 50:
            blind.append(compare.ratio_of_medians(top[0][:8], bottom[0][:8]))
    covered = sum(f.low <= 1.1 <= f.high for f in found) / len(found)
    assert 0.92 <= covered <= 0.985  # nominal 0.95; 400 trials have a standard error of 0.011
    assert sum(f.low <= 1.1 <= f.high for f in blind) / len(blind) < 0.8
    assert all(f.low <= f.median <= f.high for f in found)


def test_the_median_of_restarts_is_students():
    found = compare.median_of([2.0, 2.0, 8.0, 8.0], [0, 0, 1, 1])
    half = 12.7062 * math.log(4.0) / 2  # 1 degree of freedom; the deviation over √2 is half of the distance
    assert (found.median, math.log(found.high / 4.0)) == (pytest.approx(4.0), pytest.approx(half, rel=1e-4))
    same = compare.ratio_of_medians([3.0] * 4, [2.0] * 4, ([0, 0, 1, 1], []))
    assert (same.median, same.low, same.high) == (pytest.approx(1.5),) * 3


# ------------------------------------------------------------------------------------------------------------ verdicts


@functools.cache
def blank():
    """A record of this machine with nothing in it: asking git and the system takes a while."""
    return json.dumps(record.begin("train", "tritium bench train few", "cpu", "few"))


def made(tmp_path, name, speed=100.0, ms=10.0, **changes):
    """A record whose tokens/s are about ``speed`` and whose step takes about ``ms``."""
    result = json.loads(blank()) | {"settings": {"T": 16, "B": 2}}
    result["figures"] = [
        record.figure("tokens/s", "tokens/s", "higher", samples(1, speed, noise=0.002)),
        record.figure("step", "ms", "lower", samples(2, ms, noise=0.002)),
        record.figure("peak memory", "bytes", "lower", value=1e9),
        record.figure("own products", "ms", "", samples(3, ms)),
    ]
    result["checks"] = [record.check("finite losses", True)]
    result["machine"]["load_average"] = [0.0, 0.0, 0.0]
    result["machine"]["threads"] = 2  # a process without torch does not say
    for key, value in changes.items():
        target = result
        *path, last = key.split("__")
        for part in path:
            target = target[part]
        target[last] = value
    path = tmp_path / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def rows(out):
    """name → its line, of what compare printed."""
    table = out[out.index("B/A") :].split("\n\n")[0].splitlines()[1:]
    return {line.split("  ")[0]: line for line in table}


def test_what_an_interval_knows_of_processes_is_said(tmp_path, capsys):
    one, other, both = "does not know either what differs between two processes", "is taken to deviate as they do", []
    for name, speed in (("a", 100.0), ("b", 112.0)):
        path = pathlib.Path(made(tmp_path, name, speed=speed))
        found = json.loads(path.read_text())
        values, of = restarted(int(speed), speed, 5)
        found["figures"][0] = record.figure("tokens/s", "tokens/s", "higher", values, restarts=of)
        del found["figures"][1]
        both.append(tmp_path / f"{name}_restarted.json")
        both[-1].write_text(json.dumps(found))
    alone = made(tmp_path, "alone")
    for pair, said, unsaid in (
        ((alone, alone), [one], [other]), ((alone, both[1]), [other], [one]), (both, [], [one, other]),
    ):  # fmt: skip
        assert compare.main([str(path) for path in pair]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in said)
        assert not any(text in shown for text in unsaid)
    assert rows(shown)["tokens/s"].endswith("better")


def test_above_one_means_that_b_is_better_whatever_the_unit(tmp_path, capsys):
    status = compare.main([made(tmp_path, "a"), made(tmp_path, "b", speed=110.0, ms=9.0)])
    assert status == 0
    found = rows(capsys.readouterr().out)
    assert found.keys() == {"tokens/s", "step", "peak memory"}
    assert "1.100" in found["tokens/s"] and found["tokens/s"].endswith("better")
    assert "1.111" in found["step"] and found["step"].endswith("better")
    assert found["peak memory"].endswith("no interval")
    assert compare.main([made(tmp_path, "a"), made(tmp_path, "b", speed=90.0, ms=10.0)]) == 0
    found = rows(capsys.readouterr().out)
    assert found["tokens/s"].endswith("worse")
    assert found["step"].endswith("no difference shown")


@pytest.mark.parametrize(
    ("speed", "words", "status", "where"),
    [
        (96.0, ["--gate", "0.98"], 1, "below the gate"),
        (96.0, [], 0, "worse"),
        (99.0, ["--gate", "0.98"], 0, "worse, inside the gate"),
        (98.1, ["--gate", "0.98"], 0, "on the gate"),  # not certainly below it
        (98.1, ["--gate", "0.98", "--strict"], 1, "on the gate"),  # nor certainly above
        (104.0, ["--gate", "0.98", "--strict"], 0, "better, inside the gate"),
    ],
)
def test_the_gate(tmp_path, capsys, speed, words, status, where):
    figures = [record.figure("tokens/s", "tokens/s", "higher", samples(7, speed, 40, 0.003))]
    same = [record.figure("tokens/s", "tokens/s", "higher", samples(1, 100.0, 40, 0.002))]
    b = made(tmp_path, "b", figures=figures)
    assert compare.main([made(tmp_path, "a", figures=same), b, *words]) == status
    out = capsys.readouterr().out
    assert rows(out)["tokens/s"].endswith(where)
    assert ("FAILED" in out) == bool(status)


def test_a_figure_that_was_taken_once_is_gated_only_when_asked(tmp_path, capsys):
    a = made(tmp_path, "a")
    more = [record.figure("peak memory", "bytes", "lower", value=2e9)]
    b = made(tmp_path, "b", figures=json.loads((tmp_path / "a.json").read_text())["figures"][:2] + more)
    assert compare.main([a, b, "--gate", "0.9"]) == 0
    assert rows(capsys.readouterr().out)["peak memory"].endswith("no interval, not gated")
    assert compare.main([a, b, "--gate", "0.9", "--gate-single"]) == 1
    assert "FAILED, certainly below it: peak memory" in capsys.readouterr().out


def test_a_gate_that_judged_nothing_does_not_pass(tmp_path, capsys):
    once = [record.figure("peak memory", "bytes", "lower", value=1e9)]
    a, b = (made(tmp_path, name, figures=once) for name in "ab")
    assert compare.main([a, b]) == 0
    capsys.readouterr()
    assert compare.main([a, b, "--gate", "0.98"]) == 1
    assert "FAILED, nothing was gated" in (out := capsys.readouterr().out)
    assert "--gate-single" in out
    assert compare.main([a, b, "--gate", "0.98", "--gate-single"]) == 0


def test_a_record_that_b_lacks_fails_the_strict_gate(tmp_path, capsys):
    for folder in ("before", "after"):
        made(tmp_path / folder, "x")
    folders = [str(tmp_path / "before"), str(tmp_path / "after")]
    made(tmp_path / "after", "new")
    assert compare.main([*folders, "--gate", "0.9", "--strict"]) == 0
    gone = made(tmp_path / "before", "gone")
    assert compare.main([*folders, "--gate", "0.9"]) == 0
    capsys.readouterr()
    assert compare.main([*folders, "--gate", "0.9", "--strict"]) == 1
    assert f"gate 0.9: FAILED, B lacks the record of {gone}" in capsys.readouterr().out


def test_what_held_the_machine_back_meanwhile_is_said(tmp_path, capsys):
    a = made(tmp_path, "a")
    state = json.loads((tmp_path / "a.json").read_text())["machine"]["state"]
    after = state | {"throttled_by": ["hw_thermal"], "clock_mhz": 900.0}
    b = made(
        tmp_path, "b", machine__state_after=after, machine__load_after=[99.0, 0, 0], machine__load_average=[0, 0, 0]
    )
    assert compare.main([a, b]) == 0
    out = capsys.readouterr().out
    assert "B was throttled: hw_thermal" in out
    assert "B ended on a busy machine: load 99.0" in out
    assert compare.main([made(tmp_path, "a", machine__state_after=after | {"clock_mhz": 1800.0}), b]) == 0
    assert "clock_mhz, afterwards: 1800 → 900" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"warm_up": {"runs": 20, "stable": False}}, "the step"),
        ({"arms": {"peer": {"warm_up": {"runs": 30, "stable": False}}, "ours": {"warm_up": {"stable": True}}}}, "peer"),
        ({"cells": [{"preset": "few", "column": "eager", "stable": False}, {"stable": None}, 3]}, "few eager"),
        ({"rows": [{"op": "gelu", "backend": "x", "case": "odd", "what": "forward", "stable": False}]}, "gelu.x odd"),
    ],
)  # fmt: skip
def test_what_was_timed_before_it_settled_is_said(tmp_path, capsys, changes, what):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", **changes)
    assert compare.main([a, b]) == 0
    assert f"B was timed before it settled: {what}" in capsys.readouterr().out
    for odd in (3, {"peer": 3}, {"peer": {"warm_up": 3}}, [3]):
        strange = json.loads((tmp_path / "a.json").read_text())
        assert compare.unsettled(strange | dict.fromkeys(("warm_up", "arms", "cells", "rows"), odd)) == []


def test_what_was_set_differently_around_the_program_is_said(tmp_path, capsys):
    a = made(tmp_path, "a", environment={"OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "AVX2"})
    b = made(tmp_path, "b", environment={"OMP_WAIT_POLICY": "ACTIVE"})
    assert compare.main([a, b]) == 0
    out = capsys.readouterr().out
    assert "environment: MKL_CBWR: AVX2 → unset" in out
    assert "environment: OMP_WAIT_POLICY: PASSIVE → ACTIVE" in out
    assert compare.main([made(tmp_path, "old", environment=None, machine__threads=None), b]) == 0
    assert "environment" not in capsys.readouterr().out


def test_a_figure_that_is_gone_is_said_and_fails_the_strict_gate(tmp_path, capsys):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", speed=200.0, ms=1.0)
    result = json.loads((tmp_path / "b.json").read_text())
    result["figures"] = [f | {"name": f["name"].replace("step", "stride")} for f in result["figures"]]
    (tmp_path / "b.json").write_text(json.dumps(result))
    assert compare.main([a, b, "--gate", "0.98"]) == 0
    out = capsys.readouterr().out
    assert "only in A: step" in out
    assert "only in B: stride" in out
    assert compare.main([a, b, "--gate", "0.98", "--strict"]) == 1
    assert "FAILED, not certainly above it: only in A: step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (record.figure("step", "s", "lower", [1.0, 2.0]), "step: measured as ms, lower is better in A, as s"),
        (record.figure("step", "ms", "lower", [0.0, 0.0, 1.0]), "step: 9.99"),
    ],
)
def test_what_has_no_ratio_is_left_out_with_the_reason(tmp_path, capsys, figure, said):
    speed = record.figure("tokens/s", "tokens/s", "higher", samples(1, 100.0))
    a, b = made(tmp_path, "a"), made(tmp_path, "b", figures=[speed, figure])
    assert compare.main([a, b]) == 0
    out = capsys.readouterr().out
    assert f"not compared: {said}" in out
    assert "step" not in rows(out)


def test_many_verdicts_come_with_a_warning(tmp_path, capsys):
    def many(seed):
        return [record.figure(f"op {i}", "ms", "lower", samples(seed + i, 1.0)) for i in range(40)]

    assert compare.main([made(tmp_path, "a", figures=many(0)), made(tmp_path, "b", figures=many(500))]) == 0
    assert "of 40 figures that did not change, about 2" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what is not the same


def test_what_differs_is_said(tmp_path, capsys):
    row = {"site": "norm", "op": "layer_norm", "phase": "train", "backend": "native", "why": ""}
    both = [row, row | {"site": "norm2"}]
    a = made(
        tmp_path, "a", kernels=both, sources={"layer_norm.native": "1111", "adamw.native": "2222", "x.y": "unknown"},
        machine__state__clock_mhz=1000.0, machine__state__power_limit_w=700.0,
    )  # fmt: skip
    b = made(
        tmp_path, "b", kernels=[r | {"backend": "triton"} for r in both],
        sources={"layer_norm.triton": "3333", "adamw.native": "2222", "x.y": "unknown"}, versions__torch="9.9",
        machine__state__throttled_by=["sw_power_cap"], commit="f" * 40, dirty="other",
        machine__state__clock_mhz=1200.0, machine__state__power_limit_w=701.0, machine__load_average=[99.0, 0, 0],
        settings__config={"train": {"seed": 3}},
    )  # fmt: skip
    result = json.loads((tmp_path / "b.json").read_text())
    result["dirty"] = not json.loads((tmp_path / "a.json").read_text())["dirty"]
    (tmp_path / "b.json").write_text(json.dumps(result))
    assert compare.main([a, b]) == 0
    out = capsys.readouterr().out
    for text in (
        "kernels: layer_norm: native → triton at norm train + 1", "source of layer_norm.native: 1111 → absent",
        "source of layer_norm.triton: absent → 3333", "source of x.y: in no file", "→ 9.9",
        "B was throttled: sw_power_cap", "commit: ", "dirty: ", "clock_mhz: 1000 → 1200", "B began on a busy machine",
        "train.seed: None → 3",
    ):  # fmt: skip
        assert text in out
    assert "adamw" not in out
    assert "power_limit_w" not in out


def test_nothing_differs_between_a_record_and_itself(tmp_path, capsys):
    a = made(tmp_path, "a")
    assert compare.main([a, a, "--gate", "0.9", "--strict"]) == 0
    said, table = capsys.readouterr().out.split("\n\n", 1)
    assert len(said.splitlines()) == 2  # A and B
    assert "better" not in table.replace("B is better", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "kernels"}, "kind: train and kernels"),
        ({"preset": "other"}, "preset: few and other"),
        ({"machine__name": "another"}, "device: "),
        ({"machine__cores": 96}, "cores: "),
        ({"settings__T": 32}, "settings.T: 16 and 32"),
        ({"settings__B": 1}, "settings.B: 2 and 1"),
        ({"dtype": "bfloat16"}, "dtype: None and bfloat16"),
        ({"settings__precision": "bf16"}, "settings.precision: None and bf16"),
        ({"machine__features": ["sve"]}, "features: "),
        ({"machine__threads": 96}, "threads: "),
        ({"settings__presets": {"few": {"T": 3, "B": 2}, "new": {}}}, "settings.presets.few: "),
    ],
)
def test_records_of_different_things_are_refused(tmp_path, capsys, changes, said):
    a, b = made(tmp_path, "a", settings__presets={"few": {"T": 1, "B": 2}, "gone": {}}), made(tmp_path, "b", **changes)
    assert compare.main([a, b]) == 2
    assert said in capsys.readouterr().err
    assert compare.main([a, b, "--anyway"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_red_check_is_not_compared(tmp_path, capsys, which):
    wrong = {"checks": [record.check("finite losses", False, "nan")]}
    a, b = (made(tmp_path, name, **(wrong if name == which else {})) for name in "ab")
    assert compare.main([a, b, "--anyway"]) == 1
    said = capsys.readouterr()
    assert f"{which.upper()}: finite losses: nan" in said.err
    assert "B/A" not in said.out


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", '{"schema": 99, "kind": "train"}', '{"schema": 2, "kind": "train"}',
        '{"schema": 1, "kind": "throughput"}', '{"schema": 1, "kind": "throughput", "settings": 3, "arms": []}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_record_is_named(tmp_path, capsys, text):
    (tmp_path / "b.json").write_text(text)
    assert compare.main([made(tmp_path, "a"), str(tmp_path / "b.json")]) == 2
    assert "b.json" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_answered_with_the_nearest(tmp_path, capsys):
    a = made(tmp_path, "train_tiny")
    assert compare.main([a, str(tmp_path / "train_tyni.json")]) == 2
    assert "the nearest" in (said := capsys.readouterr().err)
    assert "train_tiny.json" in said


def test_folders_are_paired_by_name(tmp_path, capsys):
    made(tmp_path / "before", "x")
    made(tmp_path / "after", "x", speed=90.0)
    made(tmp_path / "after", "y")
    folders = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert compare.main([*folders, "--gate", "0.98"]) == 1
    out = capsys.readouterr().out
    assert out.count("A: ") == 1
    assert f"not compared, the other folder has none of this name: {tmp_path / 'after' / 'y.json'}" in out
    assert compare.main([folders[0], str(tmp_path / "after" / "x.json")]) == 2
    for name in ("a.json", "y.json"):
        (tmp_path / "before" / name).write_text("{")
        (tmp_path / "after" / name).write_text("{")
    assert compare.main([*folders, "--gate", "0.98"]) == 2  # and still x is compared
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "y.json" in said.err
    (tmp_path / "empty").mkdir()
    assert compare.main([folders[0], str(tmp_path / "empty")]) == 2
    capsys.readouterr()
    assert compare.main([folders[0], str(tmp_path / "afer")]) == 2
    assert f"there is no {tmp_path / 'afer'};" in capsys.readouterr().err


def test_the_committed_records_can_be_compared_with_themselves(capsys):
    found = sorted((record.ROOT / "benchmarks" / "results" / "cpu").glob("throughput_*.json"))
    assert found
    for path in found:
        assert compare.main([str(path), str(path), "--gate", "0.9"]) == 0
        assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate", "98"], "is a ratio"),
        (["--gate", "nan"], "is a ratio"),
        (["--strict"], "add --gate"),
        (["--gate-single"], "add --gate"),
        (["--gaet", "0.98"], "the nearest are --gate"),
    ],
)
def test_a_wrong_command_line(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        compare.main([made(tmp_path, "a"), made(tmp_path, "b"), *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
