"""What every test of the repository runs under: thread counts, a time limit, and no skip that is not listed.

skips.txt beside this file lists the skips that are allowed, a line each: a pattern over test ids (fnmatch), a colon and
a space, and the reason. Any other skip or expected failure fails the session: a test that did not run must not look
like one that passed.
"""

import fnmatch
import os
import pathlib
import signal

import pytest

# before torch is imported anywhere. Two threads, that sleep while they wait: several sessions may share the cores
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TIMEOUT_S = 120
SKIPS = pathlib.Path(__file__).with_name("skips.txt")


def allowed_skips() -> list[tuple[str, str]]:
    """(pattern, reason) of every line of skips.txt."""
    found = []
    for number, line in enumerate(SKIPS.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, colon, reason = line.partition(": ")
        if not colon or not reason.strip():
            raise pytest.UsageError(f"{SKIPS.name}:{number}: a line is 'test id pattern: reason', this is {line!r}")
        found.append((pattern.strip(), reason.strip()))
    return found


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: children would be deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(_Skips(allowed_skips()), "tritium-skips")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


class _Skips:
    """Collects skips and fails the session for those that are not listed."""

    def __init__(self, allowed: list[tuple[str, str]]):
        self.allowed = allowed
        self.unlisted: list[tuple[str, str]] = []

    def _see(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped and not hasattr(report, "wasxfail"):
            return
        if not any(fnmatch.fnmatchcase(report.nodeid, pattern) for pattern, _ in self.allowed):
            reason = getattr(report, "wasxfail", None) or (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            )
            self.unlisted.append((report.nodeid, reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._see(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._see(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skips that tests/skips.txt does not list", red=True)
            for nodeid, reason in self.unlisted:
                terminalreporter.line(f"{nodeid}: {reason}")
