"""apex 25.09's multi_tensor_applier: it adds the chunk size in front of the operator's own arguments."""


class MultiTensorApply:
    available = True

    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
