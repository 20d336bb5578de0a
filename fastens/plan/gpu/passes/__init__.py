"""Rewrites of the nodes that kernels take, each with its identity; :mod:`fastens.plan.gpu.pipeline` orders them."""
