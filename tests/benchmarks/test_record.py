"""Benchmark records: what is checked before one is written."""

import json

import pytest

from tritium.benchmarks import record

SCHEMA = {"rows": [{"name": str, "ms": record.NUMBER}], "ratios": {str: record.NUMBER}, "note": (str, type(None))}
GOOD = {"rows": [{"name": "a", "ms": 1.5}, {"name": "b", "ms": 2}], "ratios": {"a/b": 0.75}, "note": None}


def test_a_good_record_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "record.json"
    result = record.begin("test", "tritium bench", "cpu") | GOOD
    record.write(result, SCHEMA, path)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


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
