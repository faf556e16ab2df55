"""apex 25.09's SoftmaxCrossEntropyLoss, with what its wrapper does to its arguments."""

import torch


class SoftmaxCrossEntropyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert not half_to_float or logits.dtype == torch.float16, "conversion is supported for Half type only"
        assert labels.dtype == torch.int64
        assert labels.is_contiguous()
        assert logits.numel() > 0
        assert 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1], "the kernel reads logits[label] unmasked"
        z = logits.float()
        lse = torch.logsumexp(z, -1)
        losses = lse - smoothing * z.mean(-1) - (1 - smoothing) * z.gather(1, labels[:, None])[:, 0]
        losses.masked_fill_(labels == padding_idx, 0)
        ctx.save_for_backward(logits, lse.to(torch.float32 if half_to_float else logits.dtype), labels)
        ctx.smoothing, ctx.padding_idx, ctx.half_to_float = smoothing, padding_idx, half_to_float
        return losses

    @staticmethod
    def backward(ctx, grad_loss):
        logits, lse, labels = ctx.saved_tensors
        if not grad_loss.is_contiguous():
            grad_loss = grad_loss.contiguous()
        grad_loss.masked_fill_(labels == ctx.padding_idx, 0)  # in the caller's own gradient, as apex does
        assert grad_loss.dtype == (torch.float32 if ctx.half_to_float else logits.dtype)
        V = logits.shape[1]
        wanted = (1 - ctx.smoothing) * torch.nn.functional.one_hot(labels, V) + ctx.smoothing / V
        grad = grad_loss[:, None].float() * (torch.exp(logits.float() - lse[:, None].float()) - wanted)
        return grad.to(logits.dtype), None, None, None, None
