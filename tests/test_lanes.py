"""tests/lanes.py: every test is in one process, and one that fails is not lost."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("lanes", ROOT / "tests" / "lanes.py")
sys.modules["lanes"] = lanes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lanes)


def is_under(path: pathlib.Path, names: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(ROOT / name) for name in names)


def test_every_file_of_tests_is_in_exactly_one_lane():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 80
    for file in files:
        assert sum(is_under(file, lane.paths) and not is_under(file, lane.ignored) for lane in lanes.LANES) == 1, file
    for lane in lanes.LANES:
        assert all((ROOT / name).exists() for name in lane.paths + lane.ignored)


def test_who_needs_an_interpreter_or_a_fake_gpu_is_alone():
    for name in ("tests/kernels_interpreted", "tests/fake_cuda"):
        file = next((ROOT / name).glob("test_*.py"))
        held = [lane for lane in lanes.LANES if is_under(file, lane.paths) and not is_under(file, lane.ignored)]
        assert [lane.paths for lane in held] == [(name,)]
    for lane in lanes.LANES:
        assert ("TRITON_INTERPRET" in lane.environment) == ("tests/kernels_interpreted" in lane.paths)


def test_the_oldest_triton_sees_all_but_planted_faults():
    found = lanes.with_oldest(".venv-old")
    assert all(lane.environment["PYTHONPATH"] == str(ROOT / ".venv-old") for lane in found)
    ahead = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_aot*.py")}
    assert len(ahead) >= 5 and ahead < set(found[2].paths)
    assert [lane.options[1] for lane in found[:2]] == [
        "not (attention or mutant or two_per_cent)", "attention and not (mutant or two_per_cent)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "given", "good"),
    [
        ((0, 0), [], True), ((0, 1), [], False), ((0, 5), [], False), ((0, 5), ["-k", "x"], True),
        ((5, 5), ["-k", "x"], False), ((0, 1), ["-k", "x"], False), ((0, -9), [], False), ((0, 2), ["-k", "x"], False),
    ],
)  # fmt: skip
def test_all_must_pass(statuses, given, good):
    assert lanes.passed({str(i): status for i, status in enumerate(statuses)}, given) == good


def test_what_fails_is_shown_and_the_others_run(tmp_path, capfdbinary):
    (tmp_path / "test_wrong.py").write_text("import os\ndef test_wrong():\n    assert os.environ['MARK'] == '2'\n")
    (tmp_path / "test_right.py").write_text("import os\ndef test_right():\n    assert os.environ['MARK'] == '1'\n")
    both = [lanes.Lane(n, s, (str(tmp_path / f"test_{n}.py"),), {"MARK": "1"}) for n, s in (("right", 1), ("wrong", 2))]
    found = lanes.run(tuple(both), ["-p", "no:cacheprovider"], 1)
    assert found == {"wrong": 1, "right": 0}
    said = capfdbinary.readouterr().out.decode()
    assert "AssertionError" in said and said.index("wrong: started") < said.index("right: started")


def test_ctrl_c_ends_all_of_them(tmp_path):
    (tmp_path / "test_long.py").write_text(
        "import pathlib, time\n"
        "def test_long():\n    pathlib.Path(__file__).with_name('begun').touch()\n    time.sleep(60)\n"
    )
    program = (
        "import sys, lanes, pathlib, threading, time, _thread\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop():\n"
        "    while not (folder / 'begun').exists(): time.sleep(0.05)\n"
        "    _thread.interrupt_main()\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "lanes.LANES = (lanes.Lane('long', 1, (str(folder),)),)\n"
        "sys.exit(lanes.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tests", timeout=30)
    assert done.returncode == 130
