"""How many tiles there are, and of what size: Triton's functions of these names, which it types for kernels alone."""


def cdiv(x: int, y: int) -> int:
    """X / y, rounded up."""
    return (x + y - 1) // y


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller than n, 0 of 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
