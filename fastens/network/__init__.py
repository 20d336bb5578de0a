"""The network that members share: its modules run as they are, and their tables hold the members' stacks.

``alike`` compares members, ``stacking`` makes stacks [K, ...] of their tensors, ``folded`` builds the network, and
``tables`` are where its modules keep the stacks; ``parametrized`` are weights that are computed when they are read.
``member_tables`` and ``views`` are single members again, for the loop, and ``own_states`` what those wrote to
themselves. ``state`` saves and puts back what code writes, ``rollback`` what a method wrote that failed; ``snapshots``,
``global_state`` and ``closures`` find what it can write to. ``barrier`` and ``weights`` notice that Python state and
weights have changed.
"""
