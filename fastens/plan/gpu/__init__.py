"""Plans on a GPU: launches of kernels on memory that was laid out beforehand."""
