import math

import pytest
import torch

from tritium.engine.config import OptimConfig
from tritium.engine.optim import AdamW
from tritium.engine.precision import resolve, to_compute_dtype


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def compute_parameters(self):
        return ["a.weight", "a.bias"]


def steps(net, optimizer, n, lr=0.1, count=4.0):
    torch.manual_seed(1)
    norms = []
    for _ in range(n):
        x = torch.randn(4, 5)
        loss = net.b(net.a(x.to(net.a.weight.dtype)).float()).square().sum()  # a sum over 4 rows
        loss.backward()
        norms.append(optimizer.step(torch.tensor(lr), torch.tensor(1 / count)).item())
        optimizer.zero_grad()
    return norms


def test_equals_torch_adamw_with_clipping():
    config = OptimConfig(weight_decay=0.1, grad_clip=0.5, beta1=0.9, beta2=0.95)
    ours, theirs = Net(), Net()
    norms = steps(ours, AdamW(ours, config, {}), 5)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == d], "weight_decay": w} for d, w in ((2, 0.1), (1, 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=config.eps)
    torch.manual_seed(1)
    for norm in norms:
        (theirs.b(theirs.a(torch.randn(4, 5))).square().sum() / 4).backward()
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item() == pytest.approx(norm, rel=1e-5)
        reference.step()
        reference.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_bf16_copies_follow_fp32_masters():
    net = Net()
    masters = to_compute_dtype(net, torch.bfloat16)
    assert set(masters) == {"a.weight", "a.bias"}
    assert net.a.weight.dtype == torch.bfloat16 and net.b.weight.dtype == torch.float32
    optimizer = AdamW(net, OptimConfig(), masters)
    before = masters["a.weight"].clone()
    steps(net, optimizer, 20, lr=1e-4)
    assert masters["a.weight"].dtype == torch.float32 and not torch.equal(before, masters["a.weight"])
    assert torch.equal(net.a.weight.detach(), masters["a.weight"].bfloat16())
    # the point of masters: twenty steps of 1e-4 move a weight of 0.4 less than bf16's spacing there, and are not lost
    assert (masters["a.weight"] - before).abs().max() > 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    net = Net()
    optimizer = AdamW(net, OptimConfig(), {})
    steps(net, optimizer, 2)
    before = {k: v.clone() for k, v in {**optimizer.state_dict(), **optimizer.master_weights()}.items()}
    (net.a(torch.full((1, 5), math.inf)).sum() + net.b.weight.sum() + net.b.bias.sum()).backward()
    norm = optimizer.step(torch.tensor(0.1), torch.tensor(1.0))
    assert not math.isfinite(norm.item())
    after = {**optimizer.state_dict(), **optimizer.master_weights()}
    for name in ("skipped", "guard.streak"):
        assert after.pop(name).item() == 1 and before.pop(name).item() == 0
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_parameter_out_of_reach_is_an_error():
    net = Net()
    optimizer = AdamW(net, OptimConfig(), {})
    net.a(torch.ones(1, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="b.weight has no gradient"):
        optimizer.step(torch.tensor(0.1), torch.tensor(1.0))


def test_precision_names():
    cpu = torch.device("cpu")
    assert resolve("fp32", cpu) == torch.float32 and resolve("bf16", cpu) == torch.bfloat16
    assert resolve("auto", cpu) in (torch.float32, torch.bfloat16)
