"""liger_kernel 0.8.5 for tests: the autograd functions that are called, computed by torch.

They write where Liger's write: over contiguous activations and over the gradients that come from above.
"""
