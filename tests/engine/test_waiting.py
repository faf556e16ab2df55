"""Threads spin where the cores are theirs and sleep where they are not (engine/waiting.py)."""

import json
import os
import subprocess
import sys
import threading

import pytest

from tritium.engine import waiting

GIVEN = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(waiting.SPINS)}


@pytest.mark.parametrize(
    ("user", "then", "ours"),
    [
        ({}, GIVEN, True),
        (GIVEN, GIVEN, True),  # from a parent process
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}, False),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}, False),
    ],
)
def test_what_the_user_has_set_stays(user, then, ours):
    environment = dict(user)
    assert waiting.choose(environment) == ours
    assert environment == then
    # a peer's process is run as it came: without what was chosen here, with what the user has set
    assert waiting.as_given({**environment, "A": "b"}) == {"A": "b"} | ({} if ours else then)


def test_where_nothing_could_watch_they_sleep(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "_THREADS", tmp_path / "none")
    environment: dict[str, str] = {}
    assert not waiting.choose(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_cores_are_shared_at_once_and_free_again_after_a_while():
    judge = waiting.Judge()
    assert all(map(judge, [0.0] * (waiting.PATIENCE - 1)))  # at the start they are not taken to be free
    assert not any(map(judge, [0.0, 0.01, 0.09]))
    assert judge(0.6)
    quiet = [0.01] * (waiting.PATIENCE - 1)
    assert all(map(judge, [*quiet, 0.07, *quiet, 0.2, *quiet]))  # each disturbance starts the waiting anew
    assert not judge(0.01)
    assert judge(0.11)


def test_a_watch_opens_one_team_and_closes_it():
    opened = []
    watch = waiting.Watch(lambda: opened.append)
    before = threading.active_count()
    start, quiet = (0.0, 1, 1), [(0.0, 1, 1)] * 2
    for cores, teams, alive in [start, *quiet, (0.0, 1, 0), (0.09, 1, 0), (0.5, 2, 1), (0.5, 2, 1)]:
        watch.look(cores)
        assert (len(opened), threading.active_count() - before) == (teams, alive)
    assert set(opened) == {len(os.sched_getaffinity(0)) + 1}
    watch.team.close()
    assert threading.active_count() == before


def test_without_libgomp_nothing_is_opened():
    watch = waiting.Watch(lambda: None)
    watch.look(0.9)
    assert watch.judge.shared
    assert watch.team is None


def test_a_thread_without_a_core_is_seen():
    """Two threads of this process that want one core: together they wait for as long as they run."""
    code = """
import os, threading, time
from tritium.engine import waiting
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def busy(end):
    while time.monotonic() < end:
        sum(range(100_000))
before, began = waiting.waited(), time.monotonic()
child = os.fork()
busy(began + 1.0)
if child:
    after = waiting.waited()
    os.waitpid(child, 0)
    print(sum(after.values()) - sum(before.values()))
else:
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert 0.2e9 < int(done.stdout) < 1.5e9


SPUN = """
import json, os, sys, threading, time
import torch
from tritium.engine import waiting
torch.set_num_threads(2)
x = torch.randn(1 << 16)

def spun():  # seconds that the second thread runs after a parallel region has ended, a hundred times
    me = threading.get_native_id()
    torch.exp(x)
    def ran():
        total = 0
        for thread in os.listdir("/proc/self/task"):
            try:
                total += 0 if int(thread) == me else int(open(f"/proc/self/task/{thread}/schedstat").read().split()[0])
            except FileNotFoundError:  # it has ended
                pass
        return total

    total = 0
    for _ in range(100):
        torch.exp(x)
        before = ran()
        time.sleep(0.002)
        total += ran() - before
    return total / 1e9

found = [spun()]
watch = waiting.Watch()
watch.look(1.0)
assert watch.team is not None
found.append(spun())
for _ in range(waiting.PATIENCE):
    watch.look(0.0)
assert watch.team is None
found.append(spun())
assert not any(name.startswith("tritium.kernels") for name in sys.modules)  # watched without the native library too
print(json.dumps(found))
"""


def test_a_second_team_stops_the_spinning_and_its_end_brings_it_back():
    def seconds(environment):
        env = waiting.as_given({k: v for k, v in os.environ.items() if k not in GIVEN}) | environment
        done = subprocess.run([sys.executable, "-P", "-c", SPUN], capture_output=True, text=True, env=env, check=True)
        return json.loads(done.stdout)

    for _ in range(4):  # where other processes want the cores, a thread that would spin may not get to
        spinning, sleeping, again = seconds(GIVEN)
        passive = seconds({"OMP_WAIT_POLICY": "PASSIVE"})
        if max(sleeping, *passive) < 0.2 * spinning and again > 0.3 * spinning:
            return
    raise AssertionError(f"seconds: spinning {spinning}, asleep {sleeping}, again {again}, always asleep {passive}")
