"""Code that runs again into the same memory, in place of CUDA graphs."""

import torch.utils._pytree as pytree

from fastens import capture


def replayed_by_code(monkeypatch, before=lambda: None):
    """Let recordings run their code again; how often they did, counted up in a list.

    Args:
        monkeypatch: pytest's.
        before: called before each replay.
    """
    replays = []

    def record(run, device):
        output = run()

        def replay():
            before()
            replays.append(1)
            for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(run()), strict=True):
                old.copy_(new)

        return replay, output

    monkeypatch.setattr(capture, "record_graph", record)
    return replays
