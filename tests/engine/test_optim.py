import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.engine import train
from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig
from tritium.engine.optim import AdamW
from tritium.engine.precision import lay_out, resolve, to_compute_dtype
from tritium.engine.step import MicroBatch


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


# ----------------------------------------------------------------------------------------------- where gradients add up


class Casts(TorchDispatchMode):
    """How many tensors of more than one element were made in another dtype than their source."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._opname == "_to_copy" and result.dtype != args[0].dtype and result.numel() > 1:
            self.count += 1
        return result


def narrow(flat: bool = False, sum_in_fp32: bool = True, layout: str = "out_in"):
    """A net with copies in bf16 and its optimizer."""
    net = Net()
    lay_out(net, layout)
    optimizer = AdamW(net, OptimConfig(weight_decay=0.1, grad_clip=0.5), to_compute_dtype(net, torch.bfloat16))
    if flat:
        optimizer.flatten(sum_in_fp32)
    elif sum_in_fp32:
        optimizer.sum_in_fp32()
    return net, optimizer


def micro_batch(net, i: int) -> torch.Tensor:
    """Its loss; the graph casts nothing to fp32 but activations of one row."""
    draw = torch.Generator().manual_seed(i)
    return net.b(net.a(torch.randn(4, 5, generator=draw).bfloat16()).float()).square().sum()


def gradients_of(net, optimizer, count: int) -> dict[str, torch.Tensor]:
    for i in range(count):
        micro_batch(net, i).backward()
    names = [name for group in optimizer.groups for name in group.names]
    found = {name: g.clone() for name, g in zip(names, optimizer.gradients(), strict=True)}
    optimizer.zero_grad()
    return found


def fp32_sums(count: int) -> dict[str, torch.Tensor]:
    """Of the micro-gradients as the GEMMs made them."""
    net, optimizer = narrow(sum_in_fp32=False)
    sums: dict[str, torch.Tensor] = {}
    for i in range(count):
        micro_batch(net, i).backward()
        for name, leaf in net.named_parameters():
            sums[name] = leaf.grad.float() if name not in sums else sums[name] + leaf.grad.float()
        optimizer.zero_grad()
    return sums


@pytest.mark.parametrize("flat", [False, True], ids=["lists", "flat"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_gradients_of_copies_are_the_fp32_sums_over_many_micro_batches(flat, layout):
    """To the bit; autograd's own sums in bf16 are not within 2 % of them."""
    sums, found = fp32_sums(400), gradients_of(*narrow(flat, True, layout), 400)
    for name, value in sums.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name
    in_bf16 = gradients_of(*narrow(flat, False, layout), 400)
    for name in ("a.weight", "a.bias"):
        assert in_bf16[name].dtype == torch.bfloat16
        assert (in_bf16[name] - sums[name]).norm() > 0.02 * sums[name].norm(), name


@pytest.mark.parametrize("flat", [False, True], ids=["lists", "flat"])
def test_a_gradient_is_not_copied_to_fp32_before_it_is_added(flat):
    """The first of a step is widened; of the others autograd adds what the GEMM wrote."""

    def casts(count: int) -> int:
        with Casts() as seen:
            gradients_of(net, optimizer, count)
        return seen.count

    net, optimizer = narrow(sum_in_fp32=False)
    by_the_graph = casts(1)
    net, optimizer = narrow(flat)
    assert casts(1) == by_the_graph + (0 if flat else 2)  # a copy into its place casts as it goes
    assert casts(3) == 3 * by_the_graph + (0 if flat else 2)
    net, optimizer = narrow(sum_in_fp32=False)
    for name in ("weight", "bias"):
        getattr(net.a, name).grad_dtype = torch.float32  # as autograd does it alone
    assert casts(3) == 3 * by_the_graph + 6


def test_one_micro_batch_leaves_gradients_as_they_came():
    net, optimizer = narrow(sum_in_fp32=False)
    micro_batch(net, 0).backward()
    assert net.a.weight.grad.dtype == torch.bfloat16
    assert all(not leaf._post_accumulate_grad_hooks for leaf in net.parameters())
    optimizer.step(torch.tensor(0.1), torch.tensor(0.25))


# --------------------------------------------------------------------------------------------------------- flat storage


def trained(flat: bool, masters: bool, sum_in_fp32: bool, layout: str):
    """Net, optimizer and norms after five steps without clipping, which would round by the order of the norm's sum."""
    net = Net()
    lay_out(net, layout)
    dtype = torch.bfloat16 if masters else torch.float32
    optimizer = AdamW(net, OptimConfig(weight_decay=0.1, grad_clip=0.0), to_compute_dtype(net, dtype))
    strides = [p.stride() for p in net.parameters()]
    if flat:
        optimizer.flatten(sum_in_fp32)
    elif sum_in_fp32:
        optimizer.sum_in_fp32()
    assert [p.stride() for p in net.parameters()] == strides
    return net, optimizer, steps(net, optimizer, 5)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("sum_in_fp32", [False, True])
@pytest.mark.parametrize("masters", [False, True], ids=["fp32", "bf16"])
def test_flat_storage_trains_to_the_same_bits(masters, sum_in_fp32, layout):
    states, norms = [], []
    for flat in (False, True):
        net, optimizer, found = trained(flat, masters, sum_in_fp32, layout)
        norms.append(found)
        states.append({**optimizer.state_dict(), **optimizer.master_weights(), **net.state_dict(prefix="net.")})
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype and torch.equal(value, states[1][name]), name


def test_flat_buffers_hold_every_tensor_at_an_aligned_place_and_zeros_between():
    config = Config(
        model=GPTConfig(vocab_size=61, vocab_multiple=1, block_size=5, n_layer=1, n_head=1, n_embd=6),
        train=TrainConfig(batch_rows=2, micro_rows=1, precision="bf16", compile="false", flat="true"),
    )
    engine = train.build(config)
    optimizer, ids = engine.optimizer, torch.arange(10).view(2, 1, 5)
    work = [MicroBatch(row, row) for row in ids]
    for _ in range(3):
        engine.step(work, torch.tensor(0.01), torch.tensor(0.1))
    assert len(optimizer.groups) == 4 and optimizer.flat
    for group in optimizer.groups:
        kinds = {"params": group.params, "copies": group.copies, "grads": group.places, "exp_avgs": group.exp_avgs,
                 "exp_avg_sqs": group.exp_avg_sqs}  # fmt: skip
        assert group.flat.keys() == {kind for kind, tensors in kinds.items() if tensors}
        offsets = set()
        for kind, buffer in group.flat.items():
            rest = buffer.clone()
            for tensor in kinds[kind]:
                assert tensor.untyped_storage()._cdata == buffer.untyped_storage()._cdata
                at = tensor.storage_offset()
                assert at * tensor.element_size() % 128 == 0
                rest[at : at + tensor.numel()] = 0
            assert not rest.any() and buffer.any()
            offsets.add(tuple(tensor.storage_offset() for tensor in kinds[kind]))
        assert len(offsets) == 1
        for leaf, tensor in zip(group.leaves, group.copies or group.params, strict=True):
            assert leaf.data_ptr() == tensor.data_ptr()


def test_flat_storage_is_normed_and_updated_as_one_tensor_for_each_group():
    net, optimizer = narrow(flat=True)
    calls = []
    for site in (optimizer.adamw, optimizer.global_norm):
        site.function = lambda tensors, *rest, f=site.function: (calls.append(len(tensors)), f(tensors, *rest))[1]
    micro_batch(net, 0).backward()
    assert len(optimizer.stored_gradients()) == 4
    optimizer.step(torch.tensor(0.1), torch.tensor(1.0))
    assert calls == [4, 1, 1, 1, 1]


def test_a_gradient_that_autograd_did_not_bring_is_taken_into_flat_storage():
    net, optimizer = narrow(flat=True)
    micro_batch(net, 0).backward()
    net.b.weight.grad = torch.full((3, 7), 2.0)
    assert optimizer.step(torch.tensor(0.1), torch.tensor(1.0)) > 2 * 21**0.5
    assert torch.equal(optimizer.state_dict()["exp_avg.b.weight"].sign(), torch.ones(3, 7))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="a.weight has no gradient"):
        optimizer.step(torch.tensor(0.1), torch.tensor(1.0))
