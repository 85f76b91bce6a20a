"""Leaving out a step of the optimiser whose loss or gradient is not finite."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, distributed, nn

from fastmt.ema_bound import is_expanded


class Buffers:
    """The buffers of a network as they are now, to be put back into it.

    A forward may write into a buffer or put another tensor in its place; both are undone. Those of
    one shape are kept together: a network has hundreds of small ones in few shapes, and to launch a
    kernel for each takes longer than to move their bytes.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module) -> None:
        self._places = [
            (module._buffers, name, buffer)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for buffer in {id(buffer): buffer for *_, buffer in self._places}.values():
            if not is_expanded(buffer):  # nothing can write into it
                alike[buffer.shape, buffer.dtype, buffer.device].append(buffer)
        self._kept = [(buffers, torch.stack(buffers)) for buffers in alike.values()]

    @torch.no_grad()
    def put_back(self) -> None:
        for held, name, buffer in self._replaced():
            held[name] = buffer
        for buffers, kept in self._kept:
            try:
                torch._foreach_copy_(buffers, kept.unbind())
            except RuntimeError as error:
                raise ValueError(
                    "student: a forward gave a buffer another size, as observers of quantisation "
                    "do at the first; let it see a batch before the trainer is made"
                ) from error

    @torch.no_grad()
    def put_back_unless(self, finite: Tensor) -> None:
        """Put back where `finite`, a 0-dim bool tensor, holds False; it is not read by the host."""
        for buffers, kept in self._kept:
            values = torch.where(finite, torch.stack(buffers), kept)
            torch._foreach_copy_(buffers, values.unbind())
        for held, name, buffer in self._replaced():
            held[name] = torch.where(finite, held[name], buffer)

    def _replaced(self) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
        return [place for place in self._places if place[0].get(place[1]) is not place[2]]


def on_all_processes(finite: Tensor, student: nn.Module) -> Tensor:
    """`finite`, and of a DistributedDataParallel student whether it holds in every process.

    Their gradients are one, but each has a loss of its own: where one alone left out the step, the
    replicas would differ from there on.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return finite
    parallel = nn.parallel.DistributedDataParallel
    group = next((m.process_group for m in student.modules() if isinstance(m, parallel)), None)
    if group is None:
        return finite
    agreed = finite.int()
    distributed.all_reduce(agreed, distributed.ReduceOp.MIN, group)
    return agreed.bool()


def step_where(
    finite: Tensor, optimizer: torch.optim.Optimizer, buffers: Buffers, *, wait: bool
) -> None:
    """Step where `finite`, a 0-dim bool tensor, holds True, and put the buffers back elsewhere.

    A fused optimiser reads it on the device. Any other, and on a CPU every one, is called or not
    called where `wait` allows to look.
    """
    if wait and (finite.device.type == "cpu" or not can_skip(optimizer)):
        if finite:
            optimizer.step()
        else:
            optimizer._opt_called = True  # or the scheduler would warn that it comes too early
            buffers.put_back()
        return
    # The attributes by which GradScaler tells a fused optimiser to leave out a step.
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    buffers.put_back_unless(finite)


def check_capturable(optimizer: torch.optim.Optimizer, class_mixing: float) -> None:
    """ValueError for a decision of the host amid a step, which a CUDA graph cannot hold."""
    if not can_skip(optimizer):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} without fused=True cannot leave out a step on "
            "the device; capturable needs a fused optimiser"
        )
    if class_mixing not in (0, 1):
        raise ValueError(
            f"class_mixing: got {class_mixing}, expected 0 or 1 with capturable, as the host draws "
            "whether a step mixes"
        )


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser leaves out a step that its `found_inf` tells it to."""
    supported = getattr(optimizer, "_step_supports_amp_scaling", False)
    # A state that was loaded may have turned `fused` off again.
    return supported and all(group.get("fused", True) for group in optimizer.param_groups)
