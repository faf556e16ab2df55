"""The page of the full product: rows that a run did not make again stay, in what is written and in what is read."""

import json
import multiprocessing
import time

import products

ABOUT = {"triton": "3.9.0", "torch": "2.13.0"}


def row(checked: int, date: str = "2026-01-01") -> dict[str, object]:
    return {"checked": checked, "passed": checked - 1, "refused": 1, "worst": 0.25, "date": date, "commit": "abc1234+"}


def test_a_page_is_read_as_what_it_was_written_from():
    tally = {**ABOUT, "rows": {
        products.PRODUCT: {"linear": row(3), "attention": row(products.size("attention"))}, "cases": {"linear": row(8)},
    }}  # fmt: skip
    text = products.page(tally)
    assert f"3 **of {products.size('linear')}**" in text
    assert products.read(text) == tally


def test_the_page_in_docs_is_read_and_written_again_as_it_is():
    text = products.PAGE.read_text()
    read = products.read(text)
    assert len(read["rows"]) == 3
    assert sum(map(len, read["rows"].values())) > 45
    lines, again = (page.splitlines() for page in (text, products.page(read)))
    assert [line for line in again if line not in lines and "**of" not in line] == []
    assert len(lines) == len(again)


def test_newer_rows_replace_older_ones_and_the_others_stay():
    before = {**ABOUT, "rows": {"cases": {"linear": row(1), "rope": row(2)}, "other": {"rope": row(3)}}}
    now = {**ABOUT, "rows": {"cases": {"rope": row(4, "2026-02-02")}, "new": {"rope": row(5)}}}
    assert products.over(before, now)["rows"] == {
        "cases": {"linear": row(1), "rope": row(4, "2026-02-02")}, "other": {"rope": row(3)}, "new": {"rope": row(5)},
    }  # fmt: skip
    for package in ABOUT:
        assert products.over({**before, package: "1"}, now) == now
    assert products.over({}, now) == now


def write(place, number: int) -> None:
    products.TALLY = place
    join = products.over
    products.over = lambda before, now: time.sleep(0.05) or join(before, now)  # time for another to read what it reads
    tally = products.Tally()
    tally.rows = {"cases": {f"op{number}": {"checked": number, "passed": number, "refused": 0, "worst": 0.5}}}
    tally.write()


def test_runs_that_end_side_by_side_lose_no_row(tmp_path):
    place = tmp_path / "build" / "tally.json"
    processes = [multiprocessing.get_context("fork").Process(target=write, args=(place, n)) for n in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {name: found["checked"] for name, found in json.loads(place.read_text())["rows"]["cases"].items()} == {
        f"op{n}": n for n in range(6)
    }
