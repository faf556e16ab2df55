"""Every pair of an op's options, as its signature has them, is in its cases."""

import dataclasses

import pytest

from tritium.kernels import ops, options
from tritium.kernels.case import Case


@pytest.mark.parametrize("name", ops.OPS)
def test_every_pair_of_options_has_a_case(name):
    op = ops.OPS[name]
    lacking = options.missing(op)
    assert not lacking, f"kernels/{name}/cases.py needs small cases for {lacking} (or BANNED with the reason)"


@pytest.mark.parametrize("name", ops.OPS)
def test_what_is_banned_has_a_reason_and_no_case(name):
    op = ops.OPS[name]
    known = {f"{word}{option}" for option in [*options.options(op), options.WIDE] for word in ("", "not ")}
    order = [*options.options(op), options.WIDE]
    for pair, reason in options.banned(op).items():
        assert set(pair) <= known, f"{pair}: unknown option"
        assert order.index(pair[0].removeprefix("not ")) < order.index(pair[1].removeprefix("not ")), (
            f"{pair}: in the signature's order"
        )
        assert len(reason.split()) >= 6, f"{pair}: {reason!r} is no reason"
        users = [
            c.name for c in op.cases.CASES if not c.large and pair in set(options.combinations(options.chosen(op, c)))
        ]
        assert not users, f"{pair} is banned and {users} have it"


def test_options_are_read_from_the_signature():
    assert options.options(ops.layer_norm) == ["bias", "eps"]
    assert options.options(ops.relu2) == []
    case = next(c for c in ops.layer_norm.cases.CASES if c.name == "wide_no_bias")
    assert options.chosen(ops.layer_norm, case) == {"bias": False, "eps": False, options.WIDE: True}


def test_a_pair_without_a_case_is_noticed(monkeypatch):
    """Planted: the only cases that set both go away; a new option has no case at all."""
    op = ops.layer_norm
    kept = tuple(c for c in op.cases.CASES if c.options.get("bias", True) or "eps" not in c.options)
    if kept == op.cases.CASES:
        kept = tuple(c for c in op.cases.CASES if c.options.get("bias", True))
    monkeypatch.setattr(op.cases, "CASES", kept)
    assert ("not bias", "eps") in options.missing(op)

    def with_more(x, weight, bias=None, eps=1e-5, gain=1.0):
        return x

    monkeypatch.setitem(op.__dict__, "reference", with_more)
    monkeypatch.setitem(op.__dict__, "signature", __import__("inspect").signature(with_more))
    assert ("bias", "gain") in options.missing(op)
    assert ("not eps", "gain") in options.missing(op)


def test_a_case_is_judged_by_what_it_gives():
    """Not by what its ``options`` say: a value equal to the default is the default."""
    case = Case("x", {"N": 2, "C": 4}, {"eps": 1e-5, "bias": False})
    assert options.chosen(ops.layer_norm, case) == {"bias": False, "eps": False, options.WIDE: False}
    other = dataclasses.replace(case, options={"eps": 1e-3})
    assert options.chosen(ops.layer_norm, other) == {"bias": True, "eps": True, options.WIDE: False}
