"""What happens at one pixel: softmax, score, loss, gradient. Mirrors csrc/pixel.h, reference.py.

A column holds the C values of a block of pixels as a tuple of float32 tiles (rows, BLOCK), and
`classes` which class each row is, (rows, 1). Rows beyond the last class are padding: their logits
are -inf, their probabilities 0. Tiles of unlike height leave little padding: 19 = 16 + 2 + 1.
What needs logits comes before their exponentials, which then take their place in the registers.

Exponentials are relative to the largest logit of a pixel, which csrc/pixel.h may not count on: so
where it divides each of them by their sum, here the sum goes into factors of the whole pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from fastmt.kernels.halves import COMPILED
from fastmt.kernels.over_classes import added, first_of, largest, largest_but, value_at

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
LOG_TINY = tl.constexpr(-88.0)  # exp of this is next to nothing
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def times(probability, logarithm):
    """probability * logarithm with 0 * log 0 = 0."""
    return tl.where(probability == 0, 0.0, probability * logarithm)


@triton.jit
def log_positive(x):
    return tl.log(at_least_tiny(x))


@triton.jit
def at_least_tiny(x):
    return tl.where(x < TINY, TINY, x)  # a maximum would lose a NaN


@triton.jit
def log_one_minus(p):
    """log(1 - p) for p in [0, 1/2], accurate also for small p."""
    u = 1.0 - p
    return tl.log(u) - ((u - 1.0) + p) / u


@triton.jit
def exp(x, scale=1.0):
    return tl.exp2(x * (scale * LOG2_E))


@triton.jit
def inverse_of(total):
    """1 / total of exponentials that are relative to the largest, so that total is at least 1.

    On NVIDIA by the unit for it, an ulp off and exact for 1: a division serves numbers beyond
    2^126 and below 2^-126 too, and takes several instructions more.
    """
    if COMPILED and is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / total


@triton.jit
def label_of(label, total):
    """Where the sum of the exponentials is NaN all probabilities are, and the first is the top."""
    return tl.where(total == total, label, 0)


@triton.jit
def exponentials(column, top, scale=1.0):
    """exp(scale * (column - top)) and its sum over the classes."""
    total = None
    powers = ()
    for i in tl.static_range(len(column)):
        powers = powers + (exp(column[i] - top[None, :], scale),)
        total = added(total, powers[i], column)
    return powers, tl.sum(total, 0)


@triton.jit
def scaled(column, factor):
    tiles = ()
    for i in tl.static_range(len(column)):
        tiles = tiles + (column[i] * factor[None, :],)
    return tiles


@triton.jit
def teacher_pixel(y, classes, inverse_temperature, KIND: tl.constexpr, CLASSES: tl.constexpr):
    """Score and label of q = softmax(y / T), and q: a column and what it is to be multiplied by."""
    top = largest(y)
    label = first_of(y, classes, top)
    of_top = 1.0
    if KIND == "margin" and CLASSES > 1:
        of_top -= exp(largest_but(y, classes, label) - top, inverse_temperature)
    powers, total = exponentials(y, top, inverse_temperature)
    inverse = inverse_of(total)
    score = of_top * inverse
    if KIND == "entropy" and CLASSES > 1:
        moment = None
        for i in tl.static_range(len(y)):
            x = (y[i] - top[None, :]) * inverse_temperature
            moment = added(moment, powers[i] * tl.maximum(x, LOG_TINY), y)
        score = entropy_score(tl.log(total) - tl.sum(moment, 0) * inverse, CLASSES)
    return score, label_of(label, total), (powers, inverse)


@triton.jit
def entropy_score(entropy, CLASSES: tl.constexpr):
    score = 1.0 - entropy / tl.log(tl.full((), CLASSES, tl.float32))
    return tl.where(score < 0.0, 0.0, score)


@triton.jit
def add_member(q, y, inverse_temperature):
    """q + softmax(y / T) of one member of an ensemble; q is () before the first."""
    powers, total = exponentials(y, largest(y), inverse_temperature)
    member = scaled(powers, inverse_of(total))
    tiles = ()
    for i in tl.static_range(len(y)):
        tiles = tiles + (member[i] if len(q) == 0 else q[i] + member[i],)
    return tiles


@triton.jit
def ensemble_pixel(q, classes, MEMBERS: tl.constexpr, KIND: tl.constexpr, CLASSES: tl.constexpr):
    """Score and label of what the members of an ensemble have summed up in q, and q as above."""
    top = largest(q)
    label = first_of(q, classes, top)
    total = None
    for i in tl.static_range(len(q)):
        total = added(total, q[i], q)
    score = top
    if KIND == "margin" and CLASSES > 1:
        score -= largest_but(q, classes, label)
    # Divided, as IEEE has it, so that certain members score exactly 1.
    score = tl.div_rn(score, tl.full(score.shape, MEMBERS, tl.float32))
    inverse = tl.full(top.shape, 1.0 / MEMBERS, tl.float32)
    if KIND == "entropy" and CLASSES > 1:
        score = entropy_score(-negative_entropy(scaled(q, inverse)), CLASSES)
    return score, label_of(label, tl.sum(total, 0)), (q, inverse)


@triton.jit
def negative_entropy(q):
    total = None
    for i in tl.static_range(len(q)):
        total = added(total, q[i] * log_positive(q[i]), q)
    return tl.sum(total, 0)


@triton.jit
def consistency_pixel(z, q, label, coefficient, classes, LOSS: tl.constexpr, CLASSES: tl.constexpr):
    """Loss between p = softmax(z) and q at each pixel, and coefficient times its gradient."""
    y, inverse = q
    if LOSS == "mse":
        return mse_pixel(z, y, inverse, coefficient)
    elif LOSS == "ce":
        return ce_pixel(z, label, coefficient, classes)
    elif LOSS == "bce":
        return bce_pixel(z, scaled(y, inverse), coefficient, classes, CLASSES)
    elif LOSS == "js":
        return js_pixel(z, scaled(y, inverse), coefficient)
    else:
        return soft_ce_pixel(z, scaled(y, inverse), coefficient, LOSS)


@triton.jit
def mse_pixel(z, y, inverse, coefficient):
    """sum (p - q)^2; its gradient 2 p ((p - q) - sum p (p - q)).

    All of it in units of 1 / total, which lies between 1 / C and 1: p is its exponential then.
    """
    p, total = exponentials(z, largest(z))
    q_scale, unit = inverse * total, inverse_of(total)
    square = unit * unit
    factor = 2.0 * coefficient * square
    value, mean = None, None
    differences = ()
    for i in tl.static_range(len(z)):
        difference = tl.fma(y[i], -q_scale[None, :], p[i])
        value = added(value, difference * difference, z)
        mean = added(mean, p[i] * difference, z)
        differences = differences + (difference,)
    value, mean = tl.sum(value, 0) * square, tl.sum(mean, 0)
    shift = factor * unit * mean
    gradient = ()
    for i in tl.static_range(len(z)):
        slope = differences[i] * factor[None, :] - shift[None, :]
        gradient = gradient + (p[i] * slope,)
    return value, gradient


@triton.jit
def soft_ce_pixel(z, q, coefficient, LOSS: tl.constexpr):
    """-sum q log p, plus sum q log q for "kl"; the gradient of both is p - q."""
    of_teacher = negative_entropy(q) if LOSS == "kl" else 0.0
    top = largest(z)
    expected = None
    for i in tl.static_range(len(z)):
        expected = added(expected, times(q[i], z[i] - top[None, :]), z)
    expected = tl.sum(expected, 0)
    powers, total = exponentials(z, top)
    p = scaled(powers, inverse_of(total))
    gradient = ()
    for i in tl.static_range(len(z)):
        gradient = gradient + ((p[i] - q[i]) * coefficient[None, :],)
    return tl.log(total) - expected + of_teacher, gradient


@triton.jit
def ce_pixel(z, label, coefficient, classes):
    """-log p[label]; its gradient p - onehot."""
    top = largest(z)
    chosen = value_at(z, classes, label) - top
    powers, total = exponentials(z, top)
    p_scale = coefficient * inverse_of(total)
    own_slope = exp(chosen) * p_scale - coefficient
    gradient = ()
    for i in tl.static_range(len(z)):
        own = classes[i] == label[None, :]
        gradient = gradient + (tl.where(own, own_slope[None, :], powers[i] * p_scale[None, :]),)
    return tl.log(total) - chosen, gradient


@triton.jit
def weighted_ce_pixel(z, label, coefficient, classes, weights, smoothing, CLASSES: tl.constexpr):
    """-sum w[c] t[c] log p[c] for the target t = (1 - smoothing) onehot + smoothing / C.

    weights: w, one tile (rows, 1) a tile of z, 0 in the padding; that of the label; the mean of w.
    All but the second are 0 where smoothing is.
    """
    class_weight, own_weight, mean_weight = weights
    top = largest(z)
    chosen = value_at(z, classes, label) - top
    spread = None
    for i in tl.static_range(len(z)):
        spread = added(spread, times(class_weight[i], z[i] - top[None, :]), z)
    spread = tl.sum(spread, 0)
    powers, total = exponentials(z, top)
    share = own_weight * (1.0 - smoothing)
    mass = share + mean_weight * smoothing
    p_scale = mass * inverse_of(total)
    own_slope = exp(chosen) * p_scale - (share + own_weight * (smoothing / CLASSES))
    own_slope *= coefficient
    p_scale *= coefficient
    target = times(smoothing / CLASSES, coefficient)
    gradient = ()
    for i in tl.static_range(len(z)):
        own = classes[i] == label[None, :]
        slope = powers[i] * p_scale[None, :] - class_weight[i] * target[None, :]
        gradient = gradient + (tl.where(own, own_slope[None, :], slope),)
    loss = mass * tl.log(total) - times(share, chosen) - times(smoothing / CLASSES, spread)
    return loss, gradient


@triton.jit
def bce_pixel(z, q, coefficient, classes, CLASSES: tl.constexpr):
    """-sum q log p + (1-q) log(1-p).

    1 - p of the largest class is the mass of the others, so these are kept relative to the second
    largest logit.
    """
    top = largest(z)
    label = first_of(z, classes, top)
    second = largest_but(z, classes, label)
    # Where all others are -inf nothing is left to be kept relative to.
    second = tl.where(second == float("-inf"), top, second)
    # An infinite logit makes everything NaN, as it does in softmax; so does a NaN, through `rest`.
    gap = second - top + (top - top)
    rest, expected = None, None
    others = ()
    for i in tl.static_range(len(z)):
        is_top = classes[i] == label[None, :]
        other = tl.where(is_top, 0.0, exp(z[i] - second[None, :]))
        expected = added(expected, times(q[i], z[i] - top[None, :]), z)
        rest = added(rest, other, z)
        others = others + (other,)
    rest, expected, q_top = tl.sum(rest, 0), tl.sum(expected, 0), value_at(q, classes, label)
    total = 1.0 + rest * exp(gap)
    p_top = 1.0 / total
    p = scaled(others, exp(gap) * p_top)
    value = tl.log(total) - expected
    value -= times(1.0 - q_top, gap + tl.log(rest) - tl.log(total))
    against, odds = None, None
    for i in tl.static_range(len(z)):
        counts = (classes[i] != label[None, :]) & (classes[i] < CLASSES)
        against = added(against, tl.where(counts, (1.0 - q[i]) * log_one_minus(p[i]), 0.0), z)
        odds = added(odds, tl.where(counts, (1.0 - q[i]) * p[i] / (1.0 - p[i]) - q[i], 0.0), z)
    value -= tl.sum(against, 0)
    odds = tl.sum(odds, 0)  # over the other classes of -q + (1-q) p / (1-p)
    # Where nothing is left the others lose alike, as logits that fall together do.
    alone = rest == 0.0
    lost = (1.0 - q_top) * p_top
    share = tl.where(alone, 0.0, lost / rest)
    even = tl.where(alone, lost / tl.maximum(CLASSES - 1.0, 1.0), 0.0)
    gradient_top = p_top - q_top - p_top * odds
    gradient = ()
    for i in tl.static_range(len(z)):
        own = (1.0 - q[i]) * p[i] / (1.0 - p[i]) - q[i]
        other = own - p[i] * odds[None, :] + q_top[None, :] * p[i]
        other -= others[i] * share[None, :] + even[None, :]
        is_top = classes[i] == label[None, :]
        other = tl.where(is_top, gradient_top[None, :], other)
        gradient = gradient + (other * coefficient[None, :],)
    if CLASSES == 1:
        # 0, or NaN as a softmax would be.
        nothing = tl.where(classes[0] == 0, (z[0] - z[0]) + (q[0] - q[0]), 0.0)
        value = tl.sum(nothing, 0)
        gradient = (nothing * coefficient[None, :],)
    return value, gradient


@triton.jit
def js_pixel(z, q, coefficient):
    """KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2; its gradient p (g - sum p g), g = log(p/m) / 2."""
    powers, total = exponentials(z, largest(z))
    p = scaled(powers, inverse_of(total))
    value, mean = None, None
    halves = ()
    for i in tl.static_range(len(z)):
        twice = 2.0 / at_least_tiny(p[i] + q[i])
        g = 0.5 * log_positive(p[i] * twice)
        mean = added(mean, p[i] * g, z)
        value = added(value, p[i] * g + 0.5 * q[i] * log_positive(q[i] * twice), z)
        halves = halves + (g,)
    value, mean = tl.sum(value, 0), tl.sum(mean, 0)
    gradient = ()
    for i in tl.static_range(len(z)):
        share = p[i] * coefficient[None, :]
        gradient = gradient + (share * halves[i] - share * mean[None, :],)
    return value, gradient
