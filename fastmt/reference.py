"""Every operation in plain PyTorch: the definition, the fallback and the baseline.

Any device, any floating dtype. Half precision is computed in float32 and float64 stays float64, so
the same text is the float64 truth that the kernels are tested against. Gradients come from
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmt.rounding import HALVES, random_bits, stochastically_rounded
from fastmt.threefry import random_words


class Confidence(NamedTuple):
    """What the teacher believes at each pixel, and how surely."""

    score: Tensor  # (N, *out), float32, in [0, 1], higher is surer
    label: Tensor  # (N, *out), int64, the most probable class


class ConsistencyStats(NamedTuple):
    """How much of the image taught in one call; 0-dim float32 tensors without gradient."""

    selected: Tensor  # fraction of the valid pixels that pass the threshold
    mean_score: Tensor  # mean confidence score of the valid pixels


def upsample(logits: Tensor, size: Sequence[int] | None, align_corners: bool) -> Tensor:
    """Logits (N, C, *spatial) in working precision at `size`, (bi-, tri-)linearly interpolated."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if size is None or tuple(size) == logits.shape[2:]:
        return logits
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(logits, size=tuple(size), mode=mode, align_corners=bool(align_corners))


def ensemble_softmax(
    logits: Sequence[Tensor],
    temperature: float,
    size: Sequence[int] | None,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The mean of the softmaxes of several passes, and its logarithm, both (N, C, *out)."""
    scaled = [upsample(member, size, align_corners) / temperature for member in logits]
    q = torch.stack([member.softmax(1) for member in scaled]).mean(0)
    if len(scaled) == 1:
        return q, scaled[0].log_softmax(1)
    log_members = torch.stack([member.log_softmax(1) for member in scaled])
    return q, log_members.logsumexp(0) - math.log(len(scaled))


def confidence_score(q: Tensor, kind: str) -> Tensor:
    """Score in [0, 1] of class probabilities q (N, C, *out) -> (N, *out)."""
    classes = q.shape[1]
    if kind == "max_prob" or classes == 1:
        return q.amax(1)
    if kind == "margin":
        top = q.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
    entropy = torch.special.entr(q).sum(1)
    return (1 - entropy / math.log(classes)).clamp(0, 1)


def softmax_confidence(
    logits: Tensor | Sequence[Tensor],
    *,
    kind: str = "max_prob",
    temperature: float = 1.0,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Confidence:
    """Score and label of q = softmax(logits / temperature), averaged over a sequence of logits."""
    members = [logits] if isinstance(logits, Tensor) else logits
    q, log_q = ensemble_softmax([m.detach() for m in members], temperature, size, align_corners)
    return Confidence(confidence_score(q, kind), log_q.argmax(1))


def _times(probability: Tensor, logarithm: Tensor) -> Tensor:
    """probability * logarithm with 0 * log 0 = 0."""
    return probability * torch.where(probability == 0, 0, logarithm)


def _weighted(weight: Tensor, log_p: Tensor) -> Tensor:
    """weight * log_p with 0 * log 0 = 0, where PyTorch has NaN; a NaN of the logits stays."""
    return weight * torch.where((weight == 0) & (log_p == -math.inf), 0, log_p)


def _log_one_minus_softmax(logits: Tensor, log_p: Tensor) -> Tensor:
    """log(1 - p), exact also where p rounds to 1: there 1 - p is the mass of the other classes."""
    if logits.shape[1] == 1:
        return torch.zeros_like(logits)
    top = logits.argmax(1, keepdim=True)
    first, others = logits.gather(1, top), logits.scatter(1, top, -math.inf)
    second = others.amax(1, keepdim=True).detach()
    alone = second == -math.inf  # where a logsumexp has no gradient
    even = others.sum(1, keepdim=True) / (logits.shape[1] - 1)  # -inf, of which each has a share
    rest = torch.where(alone, 0, others - second).logsumexp(1, keepdim=True)
    # Differences of logits first: they are exact, however large the logits.
    log_rest = torch.where(alone, even - first, second - first + rest) + log_p.gather(1, top)
    is_top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, top, True)
    p = torch.where(is_top, 0, log_p.exp())
    return torch.where(is_top, log_rest, torch.log1p(-p))


def pixel_loss(
    logits: Tensor, q: Tensor, log_q: Tensor, label: Tensor, loss: str, class_reduction: str
) -> Tensor:
    """Loss of each pixel between p = softmax(logits) and q, both (N, C, *out) -> (N, *out)."""
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    if loss == "ce":
        return -log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    if loss == "mse":
        terms = (p - q).square()
    elif loss == "kl":
        terms = _times(q, log_q - log_p)
    elif loss == "soft_ce":
        terms = -_times(q, log_p)
    elif loss == "bce":
        terms = -_times(q, log_p) - _times(1 - q, _log_one_minus_softmax(logits, log_p))
    else:
        log_mean = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        terms = (_times(p, log_p - log_mean) + _times(q, log_q - log_mean)) / 2
    return terms.mean(1) if class_reduction == "mean" else terms.sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and exactly 0 (value and gradient) where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0, numerator / torch.where(empty, 1, denominator))


def consistency_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    *,
    loss: str = "mse",
    class_reduction: str = "sum",
    confidence: str = "max_prob",
    weight: str = "mask",
    threshold: float | Tensor = 0.968,
    strict: bool = False,
    temperature: float = 1.0,
    pixel_weight: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: str = "all",
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ConsistencyStats]:
    """Masked consistency of p = softmax(student) with q = softmax(teacher / temperature)."""
    members = [teacher] if isinstance(teacher, Tensor) else teacher
    logits = upsample(student, size, align_corners)
    with torch.no_grad():
        q, log_q = ensemble_softmax(members, temperature, size, align_corners)
        score, label = confidence_score(q, confidence), log_q.argmax(1)
        keep = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
        limit = _beside(score, threshold, score.dtype)
        limit = limit[label] if limit.ndim else limit
        selected = keep & (score > limit if strict else score >= limit)
        valid_count, selected_count = keep.sum(), selected.sum()
        # Not of integers, whose quotient has the default dtype.
        fraction = _ratio(selected_count.to(score.dtype), valid_count)
        pixels = {
            "mask": lambda: selected.to(score.dtype),
            "confidence": lambda: torch.where(selected, score, 0),
            "ratio": lambda: keep * fraction,
            "none": lambda: keep.to(score.dtype),
        }[weight]()
        if pixel_weight is not None:
            pixels = torch.where(pixels == 0, 0, pixels * pixel_weight.to(score.dtype))
        denominator = {
            "all": lambda: torch.full_like(valid_count, label.numel()),
            "valid": lambda: valid_count,
            "selected": lambda: selected_count,
            "weight": lambda: pixels.sum(),
        }[normalize]()
        active = (pixels != 0) & (denominator != 0)
        mean_score = _ratio(torch.where(keep, score, 0).sum(), valid_count)
    # Inactive pixels enter as zeros, so that not even a NaN there reaches the loss or the gradient.
    logits = torch.where(active.unsqueeze(1), logits, 0)
    losses = pixel_loss(logits, q, log_q, label, loss, class_reduction)
    total = torch.where(active, pixels * losses, 0).sum()
    value = _ratio(total, denominator.to(total.dtype))
    if not return_stats:
        return value
    return value, ConsistencyStats(fraction.float(), mean_score.float())


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    pixel_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: str = "valid",
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of logits (N, C, *spatial), up-sampled to the labels (N, *out)."""
    logits = upsample(logits, labels.shape[1:], align_corners)
    classes = logits.shape[1]
    labels = labels.long()  # a uint8 tensor would compare with 300 as with 44
    keep = labels != ignore_index
    target = torch.where(keep, labels, 0)
    weights = logits.new_ones(classes) if class_weight is None else class_weight.to(logits.dtype)
    pixels = keep.to(logits.dtype) if pixel_weight is None else keep * pixel_weight.to(logits.dtype)
    active = keep if pixel_weight is None else keep & (pixel_weight != 0)
    if class_weight is not None:
        counts = weights != 0
        active = active & (counts | counts.any() if label_smoothing else counts)[target]
    denominator = {
        "all": lambda: logits.new_full((), labels.numel()),
        "valid": lambda: keep.sum().to(logits.dtype),
        "weight": lambda: torch.where(active, pixels * weights[target], 0).sum(),
    }[normalize]()
    active = active & (denominator != 0)
    log_p = torch.where(active.unsqueeze(1), logits, 0).log_softmax(1)
    own = weights * (1 - label_smoothing)
    losses = -_weighted(own[target], log_p.gather(1, target.unsqueeze(1)).squeeze(1))
    if label_smoothing:
        by_class = (weights * label_smoothing / classes).view(-1, *[1] * (log_p.ndim - 2))
        losses = losses - _weighted(by_class, log_p).sum(1)
    total = torch.where(active, pixels * losses, 0).sum()
    return _ratio(total, denominator)


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    rounding: str = "nearest",
    draw: int | Tensor = 0,
    numbers: Sequence[int] | None = None,
    compensation: Sequence[Tensor | None] | None = None,
) -> None:
    """teacher <- decay * teacher + (1 - decay) * student; integer, bool and float8 are copied.

    Decay 0 copies, also over a NaN; 1 keeps an average, also beside one; a negative decay changes
    nothing. How a half-precision teacher is stored: "nearest"; "stochastic", up or down at random
    with the mean where the average is, by random numbers of `draw`, the tensor's number and the
    element's; or "kahan", with what the rounding lost kept in `compensation`.
    """
    numbers = range(len(teacher)) if numbers is None else numbers
    lost = [None] * len(teacher) if compensation is None else compensation
    for average, value, number, rest in zip(teacher, student, numbers, lost, strict=True):
        average, value = _reals(average, value)
        is_wide = average.dtype in (torch.float32, torch.float64)
        if is_wide and rest is None and not isinstance(decay, Tensor) and 0 < decay < 1:
            average.lerp_(value.to(average), 1 - decay)  # the same numbers by one operation
            continue
        before = average if rest is None else average.float() + rest.float()
        after = _mean(before, value, decay)
        if rounding == "stochastic" and average.dtype in HALVES:
            random = random_bits(average, draw, number)
            after = stochastically_rounded(after.float(), average.dtype, random)
        rounded = after.to(average.dtype)
        if rest is not None:
            lost_now = (after - rounded.float()).nan_to_num(0.0, 0.0, 0.0).to(rest.dtype)
            rest.copy_(_unless_kept(decay, lost_now, rest))
        average.copy_(_unless_kept(decay, rounded, average))


def is_averaged(tensor: Tensor) -> bool:
    """Whether it holds numbers that have an average: no integers, truth values, float8 codes."""
    return (tensor.is_floating_point() and tensor.itemsize > 1) or tensor.is_complex()


def _reals(average: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if not average.is_complex():
        return average, value
    if average.is_conj():  # has no view as real numbers
        average, value = average.conj(), value.conj()
    return torch.view_as_real(average), torch.view_as_real(value.resolve_conj())


def _mean(average: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """decay * average + (1 - decay) * value in float32 or float64; `value` where not floating."""
    if not is_averaged(average):
        return value.to(average.device)
    wide = torch.promote_types(average.dtype, torch.float32)
    share = _beside(average, 1 - decay, wide)
    value = value.to(average.device, wide)
    return torch.where(share == 1, value, average.to(wide).lerp(value, share))  # even over a NaN


def _beside(tensor: Tensor, value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """On the device of a tensor: a number is made there, as a copy of it would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.to(tensor.device, dtype)
    return torch.full((), value, dtype=dtype, device=tensor.device)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _unless_kept(decay: float | Tensor, after: Tensor, before: Tensor) -> Tensor:
    """`after`, but `before` to the bit where the decay is negative, or 1 of what is averaged."""
    averaged = is_averaged(before)
    if not isinstance(decay, Tensor):
        return before if decay < 0 or (averaged and decay == 1) else after
    decay = decay.to(after.device)
    moves = (decay >= 0) & (decay != 1) if averaged else decay >= 0
    bits = _SIGNED.get(after.dtype, after.dtype)  # torch.where of 2.11 takes no unsigned ones
    return torch.where(moves, after.view(bits), before.view(bits)).view(after.dtype)


def gaussian_noise(images: Tensor, seed: Tensor, sigma: float, clip: float, clamp: bool) -> Tensor:
    """images + clip(sigma * eps, -clip, clip); eps follows from the seed and the place in memory.

    seed: 0-dim int64. The noise is drawn in float32, by Box and Muller's transform.
    """
    groups = -(-images.numel() // (4 * _COUNTERS))
    words = random_words(torch.arange(groups * _COUNTERS, device=images.device), seed)
    upper = ((words >> 8) & 0xFFFFFF).float().view(2, 2, groups, _COUNTERS)
    radius = (-2 * ((upper[:, 0] + 1) * 2**-24).log()).sqrt()
    angle = upper[:, 1] * (2**-24 * 2 * math.pi)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)  # (2, 2, groups, 32)
    in_order = normal.flatten(0, 1).transpose(0, 1).flatten()[: images.numel()]
    noise = torch.empty_like(images, dtype=torch.float32, requires_grad=False)
    noise.as_strided(in_order.shape, (1,)).copy_(in_order.mul_(sigma).clamp_(-clip, clip))
    noisy = images + noise
    return (noisy.clamp(0.0, 1.0) if clamp else noisy).to(images.dtype)


_COUNTERS = 32  # of a group of 128 elements: word w of counter i is element 32 w + i
