"""Memory of large CPU results, kept for the next call.

A fresh gradient of full resolution costs about as much time in page faults as in the kernel that
fills it, and the C library gives memory of that size back to the system whenever a tensor dies. So
the last few such stretches are kept and used again once no tensor has them any more, as PyTorch's
allocator does for GPUs. FASTMT_KEEP_MEMORY=0 turns that off; `release` gives back what is kept.
"""

from __future__ import annotations

import os
import sys
import threading

import torch
from torch import Tensor, UntypedStorage

MOST = 4  # stretches: of a step's two gradients, this one's and those of another size
_kept: list[UntypedStorage] = []  # the most recent one last
_lock = threading.Lock()  # two threads could take the same stretch
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def output_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the shape, dtype and strides of `torch.empty_like(tensor)`."""
    # Under deterministic algorithms PyTorch fills fresh memory, so that reads of it show.
    if not _wanted() or torch.are_deterministic_algorithms_enabled():
        return torch.empty_like(tensor)
    with _lock:
        storage = _unused(tensor.numel() * tensor.element_size())
    if storage is None:
        output = torch.empty_like(tensor)
        storage = output.untyped_storage()
    else:
        strides = torch.empty_like(tensor, device="meta").stride()
        output = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, strides)
    with _lock:
        _kept.append(storage)
        del _kept[:-MOST]
    return output


def release() -> None:
    """Give back all memory that is kept; what tensors still use goes when they do."""
    with _lock:
        _kept.clear()


def _wanted() -> bool:
    return _use_count is not None and os.environ.get("FASTMT_KEEP_MEMORY", "1") != "0"


def _unused(size: int) -> UntypedStorage | None:
    """Takes out a stretch of `size` bytes that nobody but this list holds."""
    # Another process may read what was sent to it, as a worker of a DataLoader sends its batches.
    _kept[:] = [storage for storage in _kept if not storage.is_shared()]
    for place in reversed(range(len(_kept))):
        if _kept[place].nbytes() == size and _is_free(place):
            return _kept.pop(place)
    return None


def _is_free(place: int) -> bool:
    """Whether no tensor has a kept storage, nor anybody its Python object, which is one only."""
    references = sys.getrefcount(_kept[place])  # the list's and the argument's among them
    return references == 2 and _use_count(_kept[place]._cdata) == 1


def _renew_lock() -> None:
    """A process that was forked has no thread to release what one held at that moment."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


_library = torch.library.Library("fastmt", "FRAGMENT")
_library.define("output_like(Tensor like) -> Tensor")
_library.impl("output_like", output_like, "CPU")
