"""Where a process is in a mesh, and what it talks over."""

from __future__ import annotations

import datetime

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fastens.distributed.exchange import Exchange


class Place:
    """Where this process is in a mesh, and what it talks over.

    Attributes:
        members: with the ranks that hold the other members, for the same rows.
        data: with those that have the same members for other rows; none where each has a batch of its own.
        control: with all whose calls are the same, on the CPU.
    """

    def __init__(self, mesh: DeviceMesh, batch: str, timeout: float) -> None:
        self.mesh, self.timeout = mesh, timeout
        self.members = Exchange(mesh.get_group("member"), timeout)
        self.data = Exchange(mesh.get_group("data"), timeout) if batch == "global" else None
        every = mesh.mesh.T.tolist()  # by place in "data"
        groups = [sorted(rank for ranks in every for rank in ranks)] if batch == "global" else every
        for ranks in groups:  # all processes take part in making each
            group = dist.new_group(ranks, datetime.timedelta(seconds=timeout), backend="gloo")
            if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks:
                self.control = Exchange(group, timeout)

    @property
    def num_data(self) -> int:
        """How many shares the rows of a call are cut into."""
        return 1 if self.data is None else self.data.size
