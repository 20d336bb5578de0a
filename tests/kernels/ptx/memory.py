"""What an emulated kernel has of memory: tensors, boxes of them, a block's shared memory, and barriers in it."""

import ctypes

import numpy as np


class Memory:
    """The memory of the tensors that a kernel is given."""

    def __init__(self):
        self.spans = []

    def add(self, tensor):
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size and not any(start == a for a, _, _ in self.spans):
            view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            self.spans.append((start, start + size, view))
        return tensor.data_ptr()

    def at(self, addresses, size):
        """For addresses [n] of so many bytes: yields which of them, the bytes, and indices [n', size]."""
        left = np.ones(len(addresses), bool)
        for start, end, view in self.spans:
            here = left & (addresses >= start) & (addresses + size <= end)
            if here.any():
                yield np.flatnonzero(here), view, (addresses[here] - start)[:, None].astype(np.int64) + np.arange(size)
            left &= ~here
        if left.any():
            raise IndexError(f"{left.sum()} threads are outside of the tensors, one at {int(addresses[left][0]):#x}")

    def load(self, addresses, size):
        found = np.zeros((len(addresses), size), np.uint8)
        for which, view, index in self.at(addresses, size):
            found[which] = view[index]
        return found

    def store(self, addresses, values):
        for which, view, index in self.at(addresses, values.shape[1]):
            view[index] = values[which]


class Shared:
    """A block's shared memory, and who used what since the last barrier."""

    def __init__(self, size, threads):
        self.bytes = np.full(size + 1024, 0xFF, np.uint8)
        self.warps = np.arange(threads) // 32
        self.forget()

    def forget(self):
        """Behind a barrier: what was written is everybody's."""
        self.writer = np.full(len(self.bytes), -1, np.int16)
        self.reader = np.full(len(self.bytes), -1, np.int16)  # -2: several warps

    def load(self, threads, addresses, size):
        index = addresses[:, None].astype(np.int64) + np.arange(size)
        own = np.broadcast_to(self.warps[threads][:, None], index.shape)
        writer = self.writer[index]
        if ((writer >= 0) & (writer != own)).any():
            raise RuntimeError("shared memory is read that another warp wrote, and no barrier is between")
        before = self.reader[index]
        self.reader[index] = np.where((before == -1) | (before == own), own, -2)
        return self.bytes[index]

    def store(self, threads, addresses, values):
        index = addresses[:, None].astype(np.int64) + np.arange(values.shape[1])
        own = np.broadcast_to(self.warps[threads][:, None], index.shape)
        for used in (self.writer[index], self.reader[index]):
            if ((used != -1) & (used != own)).any():
                raise RuntimeError("shared memory is written that another warp used, and no barrier is between")
        self.writer[index] = own
        self.bytes[index] = values


class Barrier:
    """A barrier in shared memory that counts arrivals, and bytes."""

    def __init__(self, count):
        self.count = self.left = count
        self.bytes, self.phase, self.copies = 0, 0, []

    def arrive(self, number, expected):
        self.left -= int(number)
        self.bytes += expected
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase + 1

    def wait(self, parity):
        """Until the phase of this parity is complete: the loads that it waits for arrive now, if they have not."""
        copies, self.copies = self.copies, []
        for copy in copies:
            copy()
        if self.phase % 2 == parity:
            raise RuntimeError(f"a wait without end: {self.left} arrivals and {self.bytes} bytes are lacking")


class TensorMap:
    """What a descriptor of a tensor is on the device: a box of it is copied, with zeros where it overhangs."""

    def __init__(self, descriptor, meta):
        self.tensor, self.shape, self.strides = descriptor.base, descriptor.shape, descriptor.strides
        self.lengths, self.swizzle, self.item = meta["block_size"], meta["swizzle"], meta["elem_size"]

    def box(self, memory, corner):
        """The bytes of the box at a corner, its last dimension innermost."""
        whole = np.zeros((*self.lengths[:-1], self.lengths[-1] * self.item), np.uint8)
        start, end = max(0, corner[-1]), min(self.shape[-1], corner[-1] + self.lengths[-1])
        if end > start:
            places = np.moveaxis(np.indices(self.lengths[:-1]), 0, -1) + corner[:-1]
            inside = ((places >= 0) & (places < self.shape[:-1])).all(-1)
            elements = places[inside] @ np.array(self.strides[:-1]) + start
            addresses = (self.tensor.data_ptr() + elements * self.item).astype(np.uint64)
            columns = slice((start - corner[-1]) * self.item, (end - corner[-1]) * self.item)
            whole[inside, columns] = memory.load(addresses, (end - start) * self.item)
        return whole.ravel()
