"""tritium.benchmarks: measuring kernels, training throughput, and peers."""
