"""``tritium bench compare``: its statistics on samples whose truth is known, its verdicts, its refusals."""

import json

import numpy
import pytest

from tritium.benchmarks import compare, record


def samples(seed, middle, n=20, noise=0.02, drift=0.0):
    random = numpy.random.default_rng(seed)
    return list(middle * (1 + drift * numpy.linspace(-1, 1, n)) * numpy.exp(noise * random.normal(size=n)))


def test_the_interval_covers_the_truth_at_its_nominal_rate_or_above():
    found = [compare.ratio_of_medians(samples(s, 1.03), samples(10_000 + s, 1.0)) for s in range(150)]
    covered = sum(f.low <= 1.03 <= f.high for f in found) / len(found)
    assert 0.90 <= covered <= 1.0  # nominal 0.95; 150 trials have a standard error of 0.018
    assert numpy.median([f.high - f.low for f in found]) < 0.06


def test_three_percent_are_found_and_nothing_in_noise():
    better = [compare.ratio_of_medians(samples(s, 1.03, 40, 0.01), samples(s + 999, 1.0, 40, 0.01)) for s in range(60)]
    assert sum(f.low > 1.0 for f in better) >= 58
    none = [compare.ratio_of_medians(samples(s, 1.0, 40, 0.01), samples(s + 999, 1.0, 40, 0.01)) for s in range(60)]
    assert sum(f.low > 1.0 or f.high < 1.0 for f in none) <= 8


def test_a_drift_within_the_record_widens_the_interval():
    steady = compare.ratio_of_medians(samples(1, 1.0, 40, 0.005), samples(2, 1.0, 40, 0.005))
    drifting = compare.ratio_of_medians(samples(1, 1.0, 40, 0.005, 0.1), samples(2, 1.0, 40, 0.005, 0.1))
    by_one = compare.ratio_of_medians(samples(1, 1.0, 40, 0.005, 0.1), samples(2, 1.0, 40, 0.005, 0.1), block=1)
    assert drifting.high - drifting.low > 3 * (steady.high - steady.low)
    assert drifting.high - drifting.low > 1.3 * (by_one.high - by_one.low)


# ------------------------------------------------------------------------------------------------------------ verdicts


def made(tmp_path, name, speed=100.0, ms=10.0, **changes):
    """A record whose tokens/s are about ``speed`` and whose step takes about ``ms``."""
    result = record.begin("train", "tritium bench train few", "cpu", "few") | {"settings": {"T": 16, "B": 2}}
    result["figures"] = [
        record.figure("tokens/s", "tokens/s", "higher", samples(1, speed, noise=0.002)),
        record.figure("step", "ms", "lower", samples(2, ms, noise=0.002)),
        record.figure("peak memory", "bytes", "lower", value=1e9),
        record.figure("own products", "ms", "", samples(3, ms)),
    ]
    result["checks"] = [record.check("finite losses", True)]
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


def test_above_one_means_that_b_is_better_whatever_the_unit(tmp_path, capsys):
    status = compare.main([made(tmp_path, "a"), made(tmp_path, "b", speed=110.0, ms=9.0)])
    assert status == 0
    rows = {line[:52].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "1.100" in rows["tokens/s"]
    assert "1.111" in rows["step"]
    assert rows["tokens/s"].endswith("better")
    assert rows["step"].endswith("better")
    assert rows["peak memory"].endswith("no interval")
    assert "own products" not in rows


@pytest.mark.parametrize(
    ("speed", "words", "status"),
    [
        (96.0, ["--gate", "0.98"], 1),
        (96.0, [], 0),
        (99.0, ["--gate", "0.98"], 0),
        (98.1, ["--gate", "0.98"], 0),  # on the gate: not certainly below it
        (98.1, ["--gate", "0.98", "--strict"], 1),  # nor certainly above
        (104.0, ["--gate", "0.98", "--strict"], 0),
    ],
)
def test_the_gate(tmp_path, capsys, speed, words, status):
    b = made(tmp_path, "b", speed=speed, figures=None)
    result = json.loads((tmp_path / "b.json").read_text())
    result["figures"] = [record.figure("tokens/s", "tokens/s", "higher", samples(7, speed, 40, 0.003))]
    (tmp_path / "b.json").write_text(json.dumps(result))
    assert compare.main([made(tmp_path, "a"), b, *words]) == status
    out = capsys.readouterr().out
    if words:
        assert ("FAILED" in out) == bool(status)


def test_what_differs_is_said(tmp_path, capsys):
    row = {"site": "norm", "op": "layer_norm", "phase": "train", "backend": "native", "why": ""}
    a = made(tmp_path, "a", kernels=[row], sources={"layer_norm.native": "1111", "adamw.native": "2222"})
    b = made(
        tmp_path, "b", kernels=[row | {"backend": "triton"}], sources={"layer_norm.triton": "3333"},
        versions__torch="9.9", machine__state__throttled_by=["sw_power_cap"], commit="f" * 40,
    )  # fmt: skip
    assert compare.main([a, b]) == 0
    out = capsys.readouterr().out
    for text in (
        "kernels: native → triton", "source of layer_norm.native: 1111 → absent", "→ 9.9",
        "B was throttled: sw_power_cap", "commit: ",
    ):  # fmt: skip
        assert text in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "kernels"}, "kind: train and kernels"),
        ({"preset": "other"}, "preset: few and other"),
        ({"machine__name": "another"}, "device: "),
        ({"settings__T": 32}, "settings.T: 16 and 32"),
    ],
)
def test_records_of_different_things_are_refused(tmp_path, capsys, changes, said):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", **changes)
    assert compare.main([a, b]) == 2
    assert said in capsys.readouterr().err
    assert compare.main([a, b, "--anyway"]) == 0
    assert said in capsys.readouterr().out


def test_a_red_check_is_not_compared(tmp_path, capsys):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", checks=[record.check("finite losses", False, "nan")])
    assert compare.main([a, b, "--anyway"]) == 1
    said = capsys.readouterr()
    assert "B: finite losses: nan" in said.err
    assert "B/A" not in said.out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "kind": "train"}', '{"schema": 2, "kind": "train"}'])
def test_what_is_no_record_is_named(tmp_path, capsys, text):
    (tmp_path / "b.json").write_text(text)
    assert compare.main([made(tmp_path, "a"), str(tmp_path / "b.json")]) == 2
    assert "b.json" in capsys.readouterr().err


def test_folders_are_paired_by_name(tmp_path, capsys):
    made(tmp_path / "before", "x")
    made(tmp_path / "after", "x", speed=90.0)
    made(tmp_path / "after", "y")
    folders = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert compare.main([*folders, "--gate", "0.98"]) == 1
    assert capsys.readouterr().out.count("A: ") == 1
    assert compare.main([folders[0], str(tmp_path / "after" / "x.json")]) == 2


def test_the_committed_records_can_be_compared_with_themselves(capsys):
    for path in sorted((record.ROOT / "benchmarks" / "results" / "cpu").glob("throughput_*.json")):
        assert compare.main([str(path), str(path), "--gate", "0.9"]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--gate", "98"], ["--strict"]])
def test_a_wrong_command_line(tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        compare.main([made(tmp_path, "a"), made(tmp_path, "b"), *words])
    assert stop.value.code == 2
