"""Naive PyTorch versions of every op: what tests compare with and benchmarks run against."""
