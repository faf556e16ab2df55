"""litgpt's loss over every column of the logits, (B, T, V) and (B, T)."""

import torch.nn.functional as F


def chunked_cross_entropy(logits, targets, chunk_size=128, ignore_index=-100):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
