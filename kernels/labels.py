"""Labels of pixels as classes, and the cross-entropy that goes with them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmt.kernels import pixel


@triton.jit
def class_weights(class_weight, classes, smoothing, CLASSES: tl.constexpr):
    """Weights that smoothing spreads, one tile (rows, 1) each, 0 in the padding; their mean.

    And the sum of their magnitudes, which is 0 only where all of them are. They are 0
    without smoothing, also for the infinite weight 1 / 0 of a class that has no labels.
    """
    weights = ()
    mean = 0.0
    together = 0.0
    for i in tl.static_range(len(classes)):
        exists = classes[i] < CLASSES
        if class_weight is not None:
            counts = tl.where(smoothing != 0, exists, False)
            tile = tl.load(class_weight + classes[i], mask=counts, other=0.0)
        else:
            tile = tl.where(exists, 1.0, 0.0)
        mean += tl.sum(tl.sum(tile, 1), 0) / CLASSES
        together += tl.sum(tl.sum(tl.abs(tile), 1), 0)
        weights = weights + (tile,)
    return weights, mean, together


@triton.jit
def label_weight(
    given,
    inside,
    pixel_weight,
    ignore_index,
    class_weight,
    spread,
    CLASSES: tl.constexpr,
):
    """(label, kept, out of range, weight, weight of its class) of each pixel.

    A label out of range is read as class 0 and told apart: nothing out of bounds is touched.
    A class without a weight leaves its pixels none, unless smoothing spreads those of others.
    """
    keep = inside & (given != ignore_index)
    wrong = keep & ((given < 0) | (given >= CLASSES))
    label = tl.where(keep & ~wrong, given, 0).to(tl.int32)
    weight = tl.where(keep, pixel_weight, 0.0)
    own_weight = tl.full(weight.shape, 1.0, tl.float32)
    if class_weight is not None:
        own_weight = tl.load(class_weight + label)
        weight = tl.where(tl.abs(own_weight) + spread == 0.0, 0.0, weight)
    return label, keep, wrong, weight, own_weight


@triton.jit
def label_loss(
    z, label, coefficient, classes, weights, smoothing, PLAIN: tl.constexpr, CLASSES: tl.constexpr
):
    """Loss of a label and coefficient times its gradient; weights as in pixel.weighted_ce_pixel."""
    if PLAIN:
        return pixel.ce_pixel(z, label, coefficient, classes)
    else:
        return pixel.weighted_ce_pixel(z, label, coefficient, classes, weights, smoothing, CLASSES)
