"""The conftest's own promises, on a small suite in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")


def run(tmp_path: pathlib.Path, test: str, skips: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "skips.txt").write_text(skips)
    (tmp_path / "test_it.py").write_text("import pytest\n" + test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_timeout", "--strict-markers", str(tmp_path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # start in 0.3 s rather than 2
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False, env=environment
    )


@pytest.mark.parametrize(
    ("test", "skips", "passes"),
    [
        ("def test_a(): pytest.skip('no such machine')", "", False),
        ("def test_a(): pytest.skip('no such machine')", "test_it.py::test_a: it needs such a machine\n", True),
        ("def test_a(): pytest.skip('no such machine')", "test_it.py::test_b: another test\n", False),
        ("pytest.importorskip('no_such_package')\ndef test_a(): pass", "", False),
        ("pytest.importorskip('no_such_package')\ndef test_a(): pass", "# a comment\n\ntest_it.py: optional\n", True),
        ("@pytest.mark.xfail\ndef test_a(): assert False", "", False),
        ("@pytest.mark.xfail\ndef test_a(): pass", "", False),
        ("def test_a(): pass", "", True),
        ("def test_a(): pass", "test_it.py::test_a\n", False),  # a line without a reason
        ("import time\n@pytest.mark.timeout(1)\ndef test_a(): time.sleep(30)", "", False),
        ("@pytest.mark.no_such_marker\ndef test_a(): pass", "", False),
    ],
    ids=[
        "unlisted",
        "listed",
        "other",
        "module",
        "module listed",
        "xfail",
        "xpass",
        "none",
        "no reason",
        "slow",
        "marker",
    ],
)
def test_a_skip_fails_the_session_unless_it_is_listed(tmp_path, test, skips, passes):
    done = run(tmp_path, test, skips)
    assert (done.returncode == 0 or (done.returncode == 5 and "1 skipped" in done.stdout and passes)) == passes, (
        done.stdout
    )
    if "no such machine" in test and not passes:
        assert "skips that tests/skips.txt does not list" in done.stdout
        assert "test_it.py::test_a: Skipped: no such machine" in done.stdout


def test_every_test_has_a_time_limit(request):
    assert request.node.get_closest_marker("timeout").args == (120,)
