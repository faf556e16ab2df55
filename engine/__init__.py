"""tritium.engine: everything about training a GPT; nothing about how an op is computed (that is tritium.kernels)."""
