"""Triton kernels and their launchers: one file per op, imported when the op first runs.

A launcher takes the arguments of its op and is called by :mod:`fastens.ops._dispatch` alone. On a CPU the kernels run
in Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before this package is imported.
"""
