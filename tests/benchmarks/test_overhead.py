"""What an eager call costs the host: a benchmark that must see a cost that was put there."""

import re
import time
from dataclasses import replace

import pytest

from tritium.benchmarks import overhead
from tritium.kernels.ops import OPS

pytest.importorskip("triton")


def spinning(microseconds: float):
    """A backend whose call takes so much longer; what it adds is work of the host, in no kernel."""
    load = type(OPS["gelu"]).load

    def slower(self, name):
        backend = load(self, name)

        def function(*args, **kwargs):
            until = time.thread_time() + microseconds * 1e-6
            while time.thread_time() < until:
                pass
            return backend.function(*args, **kwargs)

        return replace(backend, function=function)

    return slower


def rows(text: str) -> dict[str, list[float]]:
    found = (re.match(r"([\w.]+) +(\d+)((?: +-?[\d.]+){5})$", line) for line in text.splitlines())
    return {m[1]: [int(m[2]), *map(float, m[3].split())] for m in found if m}


def test_the_host_s_part_is_measured_and_a_slow_launcher_is_seen(capsys, monkeypatch):
    words = ["gelu", "layer_norm", "adamw", "--device", "cpu", "--repeats", "9"]
    overhead.main(words)
    quick = rows(capsys.readouterr().out)
    assert {op: launches for op, (launches, *_) in quick.items()} == {
        "gelu": 2, "layer_norm": 3, "adamw": 1, "torch.stack": 0,
    }  # fmt: skip
    for ours, by_hand, over, autograd, own in (row[1:] for row in quick.values()):
        assert ours > 0 < by_hand
        assert over == pytest.approx(ours - by_hand, abs=0.11)
        assert own == pytest.approx(over - autograd, abs=0.11)
    assert quick["adamw"][4] == pytest.approx(0.0, abs=1.0)  # it has no backward

    monkeypatch.setattr(type(OPS["gelu"]), "load", spinning(200.0))
    assert overhead.main(words) == 1
    out = capsys.readouterr().out
    slow = rows(out)
    assert slow.pop("torch.stack")[5] < 100.0
    for op, row in slow.items():
        assert row[5] - quick[op][5] == pytest.approx(200.0, rel=0.6), op  # beside others on a busy machine
    assert "More than 15 µs of our own: gelu, layer_norm\n" in out
    assert "Updates walk lists of tensors and are no part of this: adamw\n" in out


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["gelo"])
    assert "there is no op gelo" in capsys.readouterr().err
