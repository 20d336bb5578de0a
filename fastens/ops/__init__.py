"""Tensor ops over members: one file per op, each with a naive counterpart of the same name in ``reference``."""
