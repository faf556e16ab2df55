"""NVIDIA apex 25.09 for tests: signatures and stated rules of the functions that are called, computed by torch."""
