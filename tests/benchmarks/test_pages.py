"""What README and docs/performance.md show as measured is what the committed records say, to the letter."""

import pathlib
import shutil

import pytest

from tritium.benchmarks import ladder, record, report, throughput

ROOT = pathlib.Path(report.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = {"throughput": throughput.table, "ladder": ladder.table}
SHOWN = [
    pytest.param(path, id=path.stem)
    for path in sorted(RESULTS.rglob("*.json"))
    if record.read(path)["kind"] in TABLES
]  # fmt: skip


@pytest.mark.parametrize("path", SHOWN)
def test_readme_shows_the_record(path):
    data = record.read(path)
    assert TABLES[data["kind"]](data).strip() in (ROOT / "README.md").read_text()


def test_the_page_of_measurements_is_made_from_the_records(tmp_path):
    """To bring it up to date: ``tritium bench report --markdown docs/performance.md``."""
    page = tmp_path / "performance.md"
    shutil.copy(ROOT / "docs" / "performance.md", page)
    before = page.read_text()
    assert report.main([str(RESULTS), "--out", str(tmp_path / "report.html"), "--markdown", str(page)]) == 0
    assert page.read_text() == before


def test_a_changed_record_is_seen(tmp_path):
    folder, page = tmp_path / "results", tmp_path / "performance.md"
    shutil.copytree(RESULTS, folder)
    shutil.copy(ROOT / "docs" / "performance.md", page)
    before = page.read_text()
    for path in folder.rglob("throughput_gpt2_124m*.json"):
        path.write_text(path.read_text().replace('"commit": "', '"commit": "0'))
    report.main([str(folder), "--out", str(tmp_path / "report.html"), "--markdown", str(page)])
    assert page.read_text() != before


ANATOMIES = [
    pytest.param(path, id=path.stem)
    for path in sorted(RESULTS.rglob("*.json"))
    if record.read(path).get("anatomy")
]  # fmt: skip


@pytest.mark.parametrize("path", ANATOMIES)
def test_an_anatomy_is_of_a_step_as_long_as_the_timed_one(path):
    """Or what the profiler costs would show as the work it lengthens."""
    value = {figure["name"]: figure["value"] for figure in record.read(path)["figures"]}
    assert 0.9 < value["profiled step"] / value["step"] < 1.1
