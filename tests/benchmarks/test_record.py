"""Benchmark records: what is checked before one is written."""

import json
import re
import types

import pytest

from tritium.benchmarks import record
from tritium.kernels import ops

SCHEMA = {"rows": [{"name": str, "ms": record.NUMBER}], "ratios": {str: record.NUMBER}, "note": (str, type(None))}
GOOD = {"rows": [{"name": "a", "ms": 1.5}, {"name": "b", "ms": 2}], "ratios": {"a/b": 0.75}, "note": None}


def test_a_good_record_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "record.json"
    result = record.begin("test", "tritium bench", "cpu") | GOOD
    record.write(result, SCHEMA, path)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_two_runs_that_write_one_record_at_one_time_leave_a_whole_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "record.json", record.os.replace
    first, second = (record.begin("test", "tritium bench", "cpu") | GOOD | {"note": note} for note in ("1", "2"))

    def after_another(source, target):
        monkeypatch.setattr(record.os, "replace", replace)
        record.write(second, SCHEMA, path)
        assert json.loads(path.read_text())["note"] == "2"
        replace(source, target)

    monkeypatch.setattr(record.os, "replace", after_another)
    record.write(first, SCHEMA, path)
    assert json.loads(path.read_text()) == first
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [{"name": "a"}]}, "rows[0].ms is missing"),
        ({"rows": [{"name": "a", "ms": "fast"}]}, "rows[0].ms must be int or float"),
        ({"rows": [{"name": "a", "ms": float("nan")}]}, "rows[0].ms must be finite"),
        ({"rows": [{"name": "a", "ms": True}]}, "rows[0].ms must be int or float"),
        ({"rows": {}}, "rows must be a list"),
        ({"ratios": {"a/b": None}}, "ratios.a/b must be int or float"),
        ({"note": 3}, "note must be str or null"),
        ({"extra": 1}, "extra is not in the schema"),
        ({"machine": {}}, "machine.device is missing"),
    ],
)
def test_a_record_that_does_not_fit_is_not_written(tmp_path, change, said):
    path = tmp_path / "record.json"
    path.write_text("the one before")
    with pytest.raises(record.RecordError, match="does not fit") as raised:
        record.write(record.begin("test", "tritium bench", "cpu") | GOOD | change, SCHEMA, path)
    assert said in str(raised.value)
    assert path.read_text() == "the one before"


def test_the_common_fields_say_where_and_what():
    common = record.begin("test", "tritium bench tiny", "cpu")
    assert record.problems(common, record.COMMON) == []
    assert common["versions"]["torch"] != "absent"
    assert common["machine"]["cores"] >= 1
    assert common["machine"]["memory_bytes"] > 2**28


def test_a_figure_is_the_median_of_its_samples():
    made = record.figure("tokens/s", "tokens/s", "higher", [3.0, 1.0, 2.0])
    assert (made["value"], made["samples"]) == (2.0, [3.0, 1.0, 2.0])
    assert record.figure("peak memory", "bytes", "lower", value=7)["samples"] == []
    with pytest.raises(ValueError, match="higher"):
        record.figure("x", "ms", "less", [1.0])


def test_a_digest_follows_what_a_backend_imports(tmp_path, monkeypatch):
    kernels = tmp_path / "kernels"
    for name, text in {
        "gelu/impl_a.py": "from tritium.kernels.lib import shared\n", "lib/shared.py": "x = 1\n", "lib/unused.py": "\n",
    }.items():  # fmt: skip
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).write_text(text)
    monkeypatch.setattr(record, "KERNELS", kernels)
    backend = types.SimpleNamespace(module=types.SimpleNamespace(__file__=str(kernels / "gelu/impl_a.py")))
    monkeypatch.setattr(type(ops.OPS["gelu"]), "load", lambda self, name: backend)
    digests = []
    for path, text in (
        (None, ""),
        ("lib/unused.py", "y = 2\n"),
        ("lib/shared.py", "x = 2\n"),
        ("gelu/impl_a.py", "\n"),
    ):
        if path is not None:
            (kernels / path).write_text(text)
        record.source_digest.cache_clear()
        digests.append(record.source_digest("gelu", "a"))
    record.source_digest.cache_clear()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_native_backends_are_digested_with_their_c():
    files = {p.name for p in record._imported(record.KERNELS / "layer_norm" / "impl_native.py", {})}
    assert "native.py" in files
    assert record.source_digest("layer_norm", "native") != record.source_digest("layer_norm", "reference")


def test_the_state_of_a_gpu_is_what_nvidia_smi_says(monkeypatch):
    said = {"clocks.sm": "1980", "power.draw": "[N/A]", "clocks_throttle_reasons.active": "0x0000000000000024"}
    monkeypatch.setattr(record, "_nvidia_smi", lambda field: said.get(field, ""))
    state = record._gpu_state()
    assert state["clock_mhz"] == 1980.0
    assert state["power_w"] is None
    assert state["throttled_by"] == ["sw_power_cap", "sw_thermal"]
    assert record.problems(state, record.STATE) == []


def test_records_of_version_1_are_brought_up_to_date():
    for path in (record.ROOT / "benchmarks" / "results" / "cpu").glob("throughput_*.json"):
        found = record.read(path)
        assert record.problems({k: found[k] for k in record.COMMON}, record.COMMON) == []
        assert found["command"].startswith("tritium bench peers ")
        speeds = {key: arm["tokens_per_s"] for key, arm in found["arms"].items()}
        assert {f["name"]: f["value"] for f in found["figures"]} == {
            f"{key} tokens/s": pytest.approx(speed, rel=1e-3) for key, speed in speeds.items()
        }
        assert found["checks"][0]["ok"]


def test_a_record_with_figures_and_checks_is_read_as_it_was_written(tmp_path):
    result = record.begin("test", "tritium bench", "cpu", "tiny") | GOOD
    result["figures"] = [record.figure("step", "ms", "lower", [2.0, 1.0]), record.figure("peak", "bytes", "", value=7)]
    result["checks"] = [record.check("losses", True), record.check("graphs", False, "two")]
    result["sources"] = record.sources([("gelu", "reference"), ("gelu", "reference")])
    record.write(result, SCHEMA, tmp_path / "a.json")
    found = record.read(tmp_path / "a.json")
    assert found == result
    assert [f["samples"] for f in found["figures"]] == [[2.0, 1.0], []]
    assert found["checks"][1] == {"name": "graphs", "ok": False, "detail": "two"}
    assert list(found["sources"]) == ["gelu.reference"]
    assert len(found["sources"]["gelu.reference"]) == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 5}, "has schema 5"),
        (
            {"figures": [record.figure("step", "ms", "lower", [1.0, 2.0]) | {"value": 3.0}]},
            "figures[0].value of 'step' is 3.0, its samples' median 1.5",
        ),
        (
            {"figures": [record.figure("step", "ms", "lower", value=v) for v in (1.0, 2.0)]},
            "is the second with the name",
        ),
        ({"figures": [record.figure("step", "ms", "lower", [1.0]) | {"value": 10**400}]}, "its samples' median"),
        ({"figures": [{"name": "step", "value": 1.0}]}, "figures[0].unit is missing"),
        ({"figures": [record.figure("step", "ms", "lower", [float("inf")])]}, "figures[0].value must be finite"),
        ({"figures": [record.figure("a", "ms", "", value=1.0) | {"samples": [1.0, "2"]}]}, "samples[1] must be int"),
        ({"checks": [{"name": "losses", "ok": 1, "detail": ""}]}, "checks[0].ok must be bool"),
        ({"sources": {"gelu.native": 3}}, "sources.gelu.native must be str"),
        ({"versions": []}, "versions must be an object"),
    ],
)
def test_a_record_whose_common_fields_do_not_fit_is_not_read(tmp_path, changes, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record.begin("test", "tritium bench", "cpu") | changes))
    with pytest.raises(record.RecordError) as raised:
        record.read(path)
    assert said in str(raised.value)
    assert "a.json" in str(raised.value)


def test_a_record_that_contradicts_itself_is_not_written(tmp_path):
    result = record.begin("test", "tritium bench", "cpu") | GOOD
    result["figures"] = [record.figure("step", "ms", "lower", [1.0]) for _ in range(2)]
    with pytest.raises(record.RecordError, match="second with the name 'step'") as raised:
        record.write(result, SCHEMA, tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    assert str(tmp_path / "a.rejected") in str(raised.value)  # hours of measuring are not thrown away
    assert json.loads((tmp_path / "a.rejected").read_text()) == result


def test_a_record_that_takes_anothers_place_says_so(tmp_path):
    first = (
        record.begin("test", "tritium bench", "cpu") | GOOD | {"date": "2026-01-02T03:04:05+00:00", "commit": "a" * 40}
    )
    assert record.write(first, SCHEMA, tmp_path / "a.json") == ""
    assert record.write(first, SCHEMA, tmp_path / "a.json") == (
        ", in place of that of 2026-01-02 03:04, commit aaaaaaaaaa; another --out keeps both"
    )
    (tmp_path / "a.json").write_text("{")
    assert record.write(first, SCHEMA, tmp_path / "a.json") == ", in place of a file that was no record"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        record.write(record.begin("test", "tritium bench", "cpu") | GOOD, SCHEMA, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_where_no_record_can_be_written_is_known_before(tmp_path):
    assert record.unwritable(tmp_path / "deep" / "a.json") == ""
    assert list((tmp_path / "deep").iterdir()) == []
    assert f"{tmp_path} is a folder; name a file" in record.unwritable(tmp_path)
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} cannot hold a record" in record.unwritable(tmp_path / "file" / "a.json")


def test_threads_and_what_was_set_around_the_program_are_recorded(monkeypatch):
    torch = pytest.importorskip("torch")
    for name, value in {
        "OMP_WAIT_POLICY": "ACTIVE", "TRITON_CACHE_DIR": "/somewhere", "MY_OMP_KEY": "secret", "LD_PRELOAD": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    common = record.begin("test", "tritium bench", "cpu")
    assert common["machine"]["threads"] == torch.get_num_threads()
    assert common["environment"]["OMP_WAIT_POLICY"] == "ACTIVE"
    assert common["environment"].keys().isdisjoint({"TRITON_CACHE_DIR", "MY_OMP_KEY", "PATH", "HOME"})
    assert common["environment"]["LD_PRELOAD"] == ""


def test_the_machine_is_looked_at_again_when_all_was_timed(monkeypatch):
    result = record.begin("test", "tritium bench", "cpu")
    assert (result["machine"]["state_after"], result["machine"]["load_after"]) == (None, [])
    hot = record._cpu_state() | {"throttled_by": ["hw_thermal"]}
    monkeypatch.setattr(record, "_cpu_state", lambda: hot)
    record.after(result)
    assert result["machine"]["state_after"] == hot
    assert len(result["machine"]["load_after"]) == 3
    assert record.problems(result, record.COMMON) == []


def test_records_of_version_3_have_one_process_of_each_arm(tmp_path):
    now = record.begin("train", "tritium bench train", "cpu", "tiny")
    now["figures"] = [record.figure("tokens/s", "tokens/s", "higher", [1.0, 2.0])]
    (tmp_path / "now.json").write_text(json.dumps(now))
    old = now | {"schema": 3, "figures": [{k: v for k, v in now["figures"][0].items() if k != "restarts"}]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert record.read(tmp_path / "old.json") == record.read(tmp_path / "now.json") == now


def test_the_restarts_of_a_figure_are_those_of_its_samples(tmp_path):
    made = record.figure("tokens/s", "tokens/s", "higher", [1.0, 2.0, 3.0], restarts=[0, 1, 1])
    assert made["restarts"] == [0, 1, 1]
    assert record.figure("tokens/s", "tokens/s", "higher", [1.0, 2.0], restarts=[0, 0])["restarts"] == []  # one process
    now = record.begin("test", "tritium bench", "cpu") | GOOD
    record.write(now | {"figures": [made]}, SCHEMA, tmp_path / "record.json")
    for wrong, said in (([0, 1], "has 2 restarts for 3 samples"), ([0, 1, "2"], "restarts[2] must be int")):
        with pytest.raises(record.RecordError, match=re.escape(said)):
            record.write(now | {"figures": [made | {"restarts": wrong}]}, SCHEMA, tmp_path / "record.json")
    (tmp_path / "record.json").write_text(json.dumps(now | {"figures": [made | {"restarts": [0]}]}))
    with pytest.raises(record.RecordError, match="has 1 restarts for 3 samples"):
        record.read(tmp_path / "record.json")


def test_records_of_version_2_are_brought_up_to_date(tmp_path):
    """They do not say with how many threads, and called a goal what is divided by a rate that was measured once."""
    now = record.begin("train", "tritium bench train", "cpu", "tiny")
    names = ("tokens/s", "MFU, full of measured matmul", "MFU, full of datasheet")
    now["figures"] = [record.figure(name, "", "higher", [1.0, 2.0]) for name in names]
    old = {key: value for key, value in now.items() if key != "environment"} | {"schema": 2}
    old["machine"] = {key: value for key, value in now["machine"].items() if key not in NEW_IN_3}
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = record.read(tmp_path / "old.json")
    assert (found["schema"], found["environment"], found["machine"]["threads"]) == (record.VERSION, None, None)
    assert {f["name"]: f["better"] for f in found["figures"]} == dict(zip(names, ("higher", "", "higher"), strict=True))
    assert record.problems(found, record.COMMON) == []


NEW_IN_3 = ("threads", "state_after", "load_after")  # of the machine
NEW_SINCE = ("environment", "preset", "kernels", "sources", "figures", "checks")


def test_a_record_of_version_1_of_another_kind_has_no_figures(tmp_path):
    now = record.begin("overhead", "tritium bench overhead", "cpu")
    old = {key: value for key, value in now.items() if key not in NEW_SINCE} | {"schema": 1, "rows": [1]}
    old["machine"] = {key: value for key, value in now["machine"].items() if key not in ("state", *NEW_IN_3)}
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = record.read(tmp_path / "old.json")
    assert record.problems({key: found[key] for key in record.COMMON}, record.COMMON) == []
    assert (found["schema"], found["rows"], found["figures"], found["checks"]) == (record.VERSION, [1], [], [])
    state = found["machine"]["state"]
    assert state.pop("throttled_by") == []
    assert set(state.values()) == {None}


def test_the_state_of_a_cpu_is_a_clock_where_the_system_tells_one():
    state = record._cpu_state()
    assert record.problems(state, record.STATE) == []
    assert state["clock_mhz"] is None or 100 < state["clock_mhz"] < 10_000
    assert state["throttled_by"] == []


@pytest.mark.parametrize("text", ['{"schema": 1, "kind": "throughput"}', "[" * 100_000, "\udcff"])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(record.RecordError, match=r"record\.json"):
        record.read(path)
