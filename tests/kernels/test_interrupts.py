"""Ctrl-C while other processes are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tritium.kernels.interrupts import interrupts_held


@pytest.fixture
def deaf_to_nothing():
    """A thread that takes the signals that the main thread blocks, as a library's threads do."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("deaf_to_nothing")
def test_ctrl_c_waits_for_the_end_also_where_another_thread_takes_it():
    handler, mask = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    done = False
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done = True
    assert done
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == (handler, mask)


@pytest.mark.usefixtures("deaf_to_nothing")
def test_a_process_started_within_never_gets_it():
    with interrupts_held():
        child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(0.5)"],
                                 stdout=subprocess.PIPE)  # fmt: skip
    with child:
        assert child.stdout.readline() == b"up\n"
        child.send_signal(signal.SIGINT)
    assert child.returncode == 0


def test_without_one_nothing_is_raised_and_what_was_ignored_stays_ignored():
    with interrupts_held():
        pass
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_beside_the_main_thread_it_only_starts_processes():
    raised = []

    def run():
        try:
            with interrupts_held():
                pass
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == []
