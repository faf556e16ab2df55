"""Site and Machine: plain values that describe a place, here or elsewhere."""

import pytest
import torch

from tritium.kernels.site import Machine, Site, interpreting, triton_unavailable

H100 = Machine("cuda", "sm_90", "NVIDIA H100", packages={"triton": "3.6.0"})


def site(machine: Machine, **changes: object) -> Site:
    return Site(op="layer_norm", machine=machine, **changes)


def test_here_describes_this_machine():
    machine = Machine.here("cpu")
    assert machine.device == "cpu"
    assert machine.capability == 0
    assert machine.version("torch") == torch.__version__
    assert machine.version("no-such-distribution") is None


@pytest.mark.parametrize(("arch", "capability"), [("sm_80", 80), ("sm_90", 90), ("sm_100", 100), ("x86_64", 0)])
def test_capability_is_read_from_the_arch(arch, capability):
    assert Machine("cuda", arch).capability == capability


def test_given_packages_are_the_only_ones():
    assert H100.version("triton") == "3.6.0"
    assert H100.version("torch") is None


def test_only_training_needs_gradients():
    assert site(H100).needs_grad
    assert not any(site(H100, phase=phase).needs_grad for phase in ("eval", "prefill", "decode"))


def test_option_has_a_default_and_replace_keeps_the_rest():
    here = site(H100, options={"causal": True}, dtype=torch.bfloat16)
    assert (here.option("causal"), here.option("window", 0)) == (True, 0)
    other = here.replace(phase="decode")
    assert (other.phase, other.dtype, here.phase) == ("decode", torch.bfloat16, "train")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_interpreting_follows_tritons_variable(monkeypatch, value, expected):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is expected
    assert Machine.here("cpu").interpreted is expected


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (H100, None),
        (Machine("cuda", "sm_75", packages={"triton": "3.6"}), "sm_75"),
        (Machine("cuda", "sm_90", packages={}), "pip install triton"),
        (Machine("cpu", "x86_64", packages={"triton": "3.6"}), "TRITON_INTERPRET=1"),
        (Machine("cpu", "x86_64", interpreted=True, packages={"triton": "3.6"}), None),
    ],
)
def test_triton_needs_a_package_and_a_gpu_or_the_interpreter(machine, words):
    reason = triton_unavailable(site(machine))
    assert (reason is None) if words is None else (words in reason)
