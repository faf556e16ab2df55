"""apex 25.09's extension amp_C for tests: multi_tensor_adam_capturable, the gradients written back as there."""

import torch


def multi_tensor_adam_capturable(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale
):
    assert isinstance(chunk_size, int)
    assert noop_flag.dtype == step.dtype == torch.int32
    assert lr.dtype == inv_scale.dtype == torch.float32
    assert all(isinstance(x, float) for x in (beta1, beta2, epsilon, weight_decay))
    assert (mode, bias_correction) == (1, 1)
    grads, params, exp_avgs, exp_avg_sqs = tensor_lists
    assert len(grads) == len(params) == len(exp_avgs) == len(exp_avg_sqs) > 0
    assert params[-1].numel() > 0, "the launch goes with the last tensor's last chunk"
    for tensor in (t for group in tensor_lists for t in group):
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
    if noop_flag == 1:
        return
    for g, p, m, v in zip(grads, params, exp_avgs, exp_avg_sqs, strict=True):
        g.mul_(inv_scale)
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon) + weight_decay * p
        p.sub_(lr * update)
