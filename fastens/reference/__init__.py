"""Naive PyTorch versions of the ops: the oracle of tests and benchmarks, and the kernel where there is no other."""
