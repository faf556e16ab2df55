"""The plan of a step's memory against processes: three drawn configurations here, twelve and more with ``full``."""

import dataclasses
import functools

import pytest

from tritium.benchmarks import memory
from tritium.engine import allocator, plan

SEED = 0
QUICK = ((0, "fp32"), (1, "bf16"), (2, "int8"))
drawn = functools.cache(memory.draw)


@pytest.mark.parametrize(("number", "moments"), QUICK)
def test_the_plan_is_what_a_process_takes(number, moments):
    found = memory.compare(drawn(SEED, number).replace(optim={"moments": moments}))
    assert abs(found.error) <= plan.MARGIN, found
    if moments != "fp32":
        assert found.bytes["moments"] < 0.6 * memory.planned(drawn(SEED, number))[1]["moments"]


def test_a_plan_with_freed_memory_kept_is_what_a_process_takes_too():
    config = drawn(SEED, 0)  # for which glibc's heap takes a quarter more than it is planned to
    planned, measured = memory.planned(config, kept=True)[0], memory.measured(config, kept=True)
    if allocator.policy() == "native":
        assert planned == pytest.approx(measured, rel=plan.MARGIN)
    else:
        assert measured <= planned * (1 + plan.HOLES_MARGIN)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_twelve_plans_are_what_processes_take():
    found = [memory.compare(memory.draw(SEED, number), kept=True) for number in range(12)]
    assert max(abs(c.error) for c in found) <= plan.MARGIN, found
    margin = plan.MARGIN if allocator.policy() == "native" else plan.HOLES_MARGIN
    assert all(c.kept_measured <= c.kept_planned * (1 + margin) for c in found), found


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_plans_of_compiled_steps_are_what_processes_take():
    found = [memory.compare(memory.draw(SEED, number, compile=True)) for number in range(12)]
    assert max(abs(c.error) for c in found) <= plan.MARGIN, found


def test_a_draw_is_decided_by_its_numbers():
    assert memory.draw(SEED, 0) == drawn(SEED, 0)
    assert dataclasses.replace(drawn(SEED, 0), name="") != dataclasses.replace(drawn(SEED, 1), name="")


def test_a_plan_that_is_off_is_an_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(memory, "draw", lambda *args: None)
    found = memory.Comparison("one", 105, 100, {})
    monkeypatch.setattr(memory, "compare", lambda config, kept: found)
    assert memory.main(["--count", "2"]) == 0
    assert "worst error 5.0% of 2" in capsys.readouterr().out
    found = memory.Comparison("one", 100, 100, {}, 100, 115)
    monkeypatch.setattr(allocator, "policy", lambda: "native")
    assert memory.main(["--count", "1"]) == 1
    monkeypatch.setattr(allocator, "policy", lambda: "glibc")
    assert memory.main(["--count", "1"]) == 0 and "not held to it" in capsys.readouterr().out
    found = memory.Comparison("one", 100, 115, {})
    assert memory.main(["--count", "1"]) == 1
