"""Stages that hang, crash, say nothing, write without end or fill the disk cost themselves; so do the items of one."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from tritium.benchmarks import stages, workers

pytestmark = pytest.mark.timeout(120)
LINE = '{"stage": "s", "name": "a", "value": 1, "unit": "x"}'


def planted(out, name, text, limit_s=60.0, **more):
    """A stage that runs ``text`` after it has written one line."""
    writes = f"open({str(out / f'{name}.jsonl')!r}, 'w').write('{LINE}' + chr(10))\n"
    return stages.Stage(name, limit_s, (sys.executable, "-c", writes + text), **more)


def run(out, *work, minutes=2.0):
    out.mkdir(parents=True, exist_ok=True)
    return stages.run(work, out, time.monotonic() + 60 * minutes, say=lambda text: None)


def test_a_hung_stage_is_killed_with_what_it_started_and_the_others_go_on(tmp_path):
    pid_file, out = tmp_path / "pid", tmp_path / "out"
    hangs = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
file = open({str(out / "hangs.jsonl")!r}, "a")
file.write('{{"stage": "ha')
file.flush()
time.sleep(600)
"""
    start = time.monotonic()
    outcomes = run(
        out, planted(out, "hangs", hangs, 2.0), planted(out, "says", "import sys; sys.exit('it fell off the bus')"),
        planted(out, "aborts", "import os; os.abort()"), planted(out, "leaves", "import sys; sys.exit(0)"),
        stages.Stage("cannot start", 60.0, (str(tmp_path / "nothing"),)), planted(out, "good", "print('fine')"),
    )  # fmt: skip
    assert time.monotonic() - start < 40
    assert [o.status for o in outcomes] == ["time limit", "failed", "failed", "ok", "failed", "ok"]
    assert "it fell off the bus" in outcomes[1].detail
    assert f"exit status -{signal.SIGABRT.value}" in outcomes[2].detail
    assert "FileNotFoundError" in outcomes[4].detail
    kept = stages.read_lines(out / "hangs.jsonl")
    assert [line["name"] for line in kept] == ["a", "end"]  # the line cut short is left out, the end is readable
    assert kept[1]["value"] == "time limit"
    assert wait_until_gone(int(pid_file.read_text()))


def wait_until_gone(pid):
    """Whether the process ends within 10 s; a dead one that nobody has waited for counts as gone."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_writes_nothing_or_without_end_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MOST_BYTES", 1 << 20)
    nothing = stages.Stage("nothing", 60.0, (sys.executable, "-c", "pass"))
    endless = planted(tmp_path, "endless", f"file = open({str(tmp_path / 'endless.jsonl')!r}, 'a')\n"
                      "while True: file.write('x' * 1000 + chr(10)); file.flush()")  # fmt: skip
    outcomes = run(tmp_path, nothing, endless, planted(tmp_path, "good", ""))
    assert [o.status for o in outcomes] == ["failed", "failed", "ok"]
    assert "wrote nothing" in outcomes[0].detail
    assert "more than 1 MiB" in outcomes[1].detail


def test_a_full_disk_costs_neither_the_run_nor_what_is_said_of_it(tmp_path):
    """The stage cannot write more than 4 KiB to a file; then not even its last line can be written."""
    fills = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from tritium.benchmarks.stages import Lines
lines = Lines(__import__("pathlib").Path({str(tmp_path)!r}), "fills")
while True: lines.write("figure", 1.0, "x", text="y" * 100)
"""
    said = []
    (tmp_path / "shut.jsonl").mkdir()
    work = [planted(tmp_path, "fills", fills), stages.Stage("shut", 9.0, ("true",)), planted(tmp_path, "good", "")]
    outcomes = stages.run(work, tmp_path, time.monotonic() + 60, said.append)
    assert [o.status for o in outcomes] == ["failed", "failed", "ok"]
    assert "File too large" in outcomes[0].detail or "-25" in outcomes[0].detail
    assert 10 < len(stages.read_lines(tmp_path / "fills.jsonl")) < 100
    assert any("shut: its last line could not be written" in text for text in said)


def test_what_has_no_time_left_or_is_recorded_is_not_begun_and_says_so(tmp_path):
    late = planted(tmp_path, "late", "", expects_s=30.0)
    short = planted(tmp_path, "short", "", expects_s=1.0, facts={"device": "D"})
    known = planted(tmp_path, "known", "", recorded="recorded already: FILE")
    outcomes = run(tmp_path, late, short, known, minutes=0.3)
    assert [o.status for o in outcomes] == ["not run", "ok", "recorded"]
    assert "wants 30 s, 1" in outcomes[0].detail
    ends = {name: stages.read_lines(tmp_path / f"{name}.jsonl")[-1] for name in ("late", "short", "known")}
    assert [line["value"] for line in ends.values()] == ["not run", "ok", "recorded"]
    assert ends["short"]["device"] == "D"
    assert ends["known"]["detail"] == "recorded already: FILE"


def test_a_stage_that_only_ran_out_of_time_has_not_failed(tmp_path):
    late = f"import sys; print('no time left, 3 not run', file=sys.stderr); sys.exit({stages.OUT_OF_TIME})"
    (outcome,) = run(tmp_path, planted(tmp_path, "late", late))
    assert (outcome.status, outcome.detail) == ("time limit", "no time left, 3 not run")


HOLDS = """
import pathlib, sys, tempfile, time
from tritium.benchmarks import stages
@stages.ended_by_signals()
def main():
    with tempfile.TemporaryDirectory(prefix="tritium-bench-", dir=sys.argv[1]):
        pathlib.Path(sys.argv[1], "begun").touch()
        time.sleep(600)
main()
"""


def test_what_is_ended_removes_its_temporary_folder(tmp_path):
    """By SIGTERM, or as a stage that reached its limit."""
    place = tmp_path / "temporary"
    place.mkdir()
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLDS, str(place)], stderr=subprocess.PIPE, text=True)
    while not (place / "begun").exists():
        time.sleep(0.05)
    process.terminate()
    assert "KeyboardInterrupt: stopped by SIGTERM" in process.communicate(timeout=60)[1]
    (place / "begun").unlink()
    assert list(place.iterdir()) == []
    out = tmp_path / "out"
    limit = stages.Stage("held", 5.0, (sys.executable, "-P", "-c", HOLDS, str(place)))
    (outcome,) = run(out, limit)
    assert outcome.status == "time limit"
    assert [path.name for path in place.iterdir()] == ["begun"]


def test_handlers_of_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"), stages.ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
    ran = []
    thread = threading.Thread(target=stages.ended_by_signals()(lambda: ran.append(1)))
    thread.start()
    thread.join()
    assert ran == [1]


NOHUP = """
import os, signal
from tritium.benchmarks import stages
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stages.ended_by_signals():
    os.kill(os.getpid(), signal.SIGHUP)
stages.stop_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("went on")
"""


def test_under_nohup_a_connection_that_ends_stops_nothing():
    done = subprocess.run([sys.executable, "-P", "-c", NOHUP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_a_second_ctrl_c_leaves_no_stage_behind(tmp_path):
    """The stage hears no SIGTERM, as one that waits for a kernel which hangs."""
    pid_file = tmp_path / "pid"
    deaf = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
time.sleep(1.0)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""
    (outcome,) = run(tmp_path / "out", planted(tmp_path / "out", "deaf", deaf))
    assert (outcome.status, outcome.detail) == ("failed", stages.STOPPED)
    assert wait_until_gone(int(pid_file.read_text()))


def test_ctrl_c_ends_the_stage_and_leaves_the_rest(tmp_path):
    stops = planted(tmp_path, "stops", "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    start = time.monotonic()
    outcomes = run(tmp_path, stops, planted(tmp_path, "later", ""))
    assert time.monotonic() - start < 30
    assert [(o.status, o.detail) for o in outcomes] == [("failed", stages.STOPPED), ("not run", stages.STOPPED)]
    assert outcomes[0].seconds > 0.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_run_as_ctrl_c_does(tmp_path, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        stages.stop_on_signals()
        text = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)"
        outcomes = run(tmp_path, planted(tmp_path, "stops", text), planted(tmp_path, "later", ""))
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert [(o.status, o.detail) for o in outcomes] == [("failed", stages.STOPPED), ("not run", stages.STOPPED)]
    assert [line["name"] for line in stages.read_lines(tmp_path / "stops.jsonl")] == ["a", "end"]


def test_a_stage_is_told_how_long_it_has_and_its_environment(tmp_path):
    text = f"import os, json; open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(dict(os.environ)))"
    run(tmp_path, planted(tmp_path, "asks", text, limit_s=7.0, environment={"PLANTED": "yes"}))
    seen = json.loads((tmp_path / "seen").read_text())
    assert (float(seen[stages.SECONDS]), seen["PLANTED"]) == (7.0, "yes")


def test_lines_are_measurements_and_garbage_is_not_read(tmp_path):
    lines = stages.Lines(tmp_path, "s")
    with pytest.raises(ValueError, match="not a measurement"):
        lines.write("speed", float("inf"), "TB/s")
    with lines.attempt("a missing backend"):
        raise RuntimeError("not compiled in\nand more")
    with lines.path.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"name": "no value"}\n')
    assert stages.read_lines(lines.path) == [
        {"stage": "s", "name": "a missing backend", "value": "RuntimeError: not compiled in", "unit": "error"}
    ]
    assert stages.Lines(tmp_path, "s", begin=False) and stages.read_lines(lines.path)
    assert stages.read_lines(tmp_path / "none.jsonl") == []


def test_the_archive_holds_what_stages_write(tmp_path):
    for name in ("a.jsonl", "gpu.json", "table.md", "s.stderr.txt", "old.tar.gz", "notes.bin"):
        (tmp_path / name).write_text("x")
    with tarfile.open(stages.archive(tmp_path, "gpu")) as tar:
        assert set(tar.getnames()) == {f"gpu/{n}" for n in ("a.jsonl", "gpu.json", "table.md", "s.stderr.txt")}
    begun = time.time()  # what lies there from another day is of another run
    os.utime(tmp_path / "table.md", (begun - 1000, begun - 1000))
    with tarfile.open(stages.archive(tmp_path, "gpu", begun)) as tar:
        assert set(tar.getnames()) == {f"gpu/{n}" for n in ("a.jsonl", "gpu.json", "s.stderr.txt")}


def test_an_archive_that_cannot_be_written_leaves_none_that_looks_like_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    full = f"""
import pathlib, resource
from tritium.benchmarks import stages
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
stages.archive(pathlib.Path({str(tmp_path)!r}), "gpu")
"""
    done = subprocess.run([sys.executable, "-P", "-c", full], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# --------------------------------------------------------------------------------------------------------------- items

CHILD = """
import os, sys, time
from tritium.benchmarks import workers

broken = False

def task(task, beat):
    global broken
    kind = task["kind"]
    if kind == "raises": raise ValueError("a bad shape")
    if kind == "hangs": time.sleep(600)
    if kind == "aborts": os.abort()
    if kind == "exits": sys.exit(0)
    if kind == "spoils": broken = True
    if kind == "prints": os.write(1, b"noise of a library\\n")
    if kind == "garbage":
        for fd in range(3, 12):
            try: os.write(fd, b"\\x00\\xff garbage\\n")
            except OSError: pass
        time.sleep(600)
    if kind == "compiles":
        for _ in range(4):
            beat(2.0)
            time.sleep(1.2)
    return {"pid": os.getpid(), **task}

def alive():
    if broken: raise RuntimeError("an illegal memory access was encountered")

workers.serve(task, alive)
"""


def item(kind, group=None, number=0):
    return workers.Item(f"{kind} {number}", group or f"{kind} {number}", {"kind": kind, "number": number})


def done(items, tmp_path, text=CHILD, **more):
    more = {"quiet_s": 1.0, "start_s": 30.0, **more}
    return list(workers.work(items, (sys.executable, "-P", "-c", text), tmp_path / "w", **more))


def test_an_item_that_hangs_or_crashes_costs_itself(tmp_path):
    kinds = ["good", "raises", "good", "hangs", "good", "aborts", "good", "exits", "good", "garbage", "good", "spoils",
             "good", "prints", "compiles"]  # fmt: skip
    found = done([item(kind, number=i) for i, kind in enumerate(kinds)], tmp_path)
    wanted = {"raises": "error", "hangs": "hung", "aborts": "crashed", "exits": "crashed", "garbage": "crashed",
              "spoils": "crashed"}  # fmt: skip
    assert [(d.item.task["kind"], d.status) for d in found] == [(kind, wanted.get(kind, "done")) for kind in kinds]
    by_kind = {d.item.task["kind"]: d for d in found}
    assert by_kind["raises"].detail == "ValueError: a bad shape"
    assert "said nothing for 1 s" in by_kind["hangs"].detail
    assert f"status -{signal.SIGABRT.value}" in by_kind["aborts"].detail
    assert "status 0" in by_kind["exits"].detail
    assert "garbage" in by_kind["garbage"].detail
    assert "illegal memory access" in by_kind["spoils"].detail
    pids = [d.answer["pid"] for d in found if d.status == "done"]
    assert len(set(pids)) == 6  # one child until it is spoiled: an item that raises does not end it
    assert pids[0] == pids[1]


def test_what_hangs_or_keeps_crashing_is_given_up_and_the_rest_is_not(tmp_path):
    kinds = ["hangs", "aborts", "good", "hangs", "aborts", "good", "aborts", "good"]
    ended = done([item(kind, group=kind, number=i) for i, kind in enumerate(kinds)], tmp_path)
    found = sorted(ended, key=lambda d: d.item.task["number"])
    assert [d.status for d in found] == ["hung", "crashed", "done", "not run", "crashed", "done", "not run", "done"]
    assert found[3].detail == "hangs hung before"
    assert found[6].detail == "aborts crashed 2 times before"


def test_several_children_do_every_item_once(tmp_path):
    items = [item("good", number=i) for i in range(40)] + [item("aborts", number=99)]
    found = done(items, tmp_path, count=3)
    assert sorted(d.item.name for d in found) == sorted(i.name for i in items)
    assert [d.status for d in found].count("done") == 40


def test_children_that_do_not_start_end_the_work(tmp_path):
    start = time.monotonic()
    found = done([item("good", number=i) for i in range(3)], tmp_path, "import sys; sys.exit('no such library')")
    assert [d.status for d in found] == ["not run"] * 3
    assert "two children in a row did not start" in found[0].detail
    assert "no such library" in found[0].detail
    assert {d.status for d in done([item("good")], tmp_path, "import time; time.sleep(600)", start_s=0.5)} == {
        "not run"
    }
    assert time.monotonic() - start < 20


def test_nothing_is_begun_or_waited_for_after_the_end(tmp_path):
    start = time.monotonic()
    slow = [workers.Item("slow", "slow", {"kind": "hangs"}, allow_s=600.0), item("good")]
    found = done(slow, tmp_path, end=time.monotonic() + 2.5)
    assert [(d.status, d.detail) for d in found] == [
        ("not run", "no time left to finish it"), ("not run", "no time left"),
    ]  # fmt: skip
    assert time.monotonic() - start < 10


def test_the_children_end_when_their_parent_stops_listening(tmp_path):
    work = workers.work([item("good"), item("hangs")], (sys.executable, "-P", "-c", CHILD), tmp_path / "w")
    pid = next(work).answer["pid"]
    work.close()
    assert wait_until_gone(pid)
