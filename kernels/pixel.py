"""What happens at one pixel: softmax, score, loss, gradient. Mirrors csrc/pixel.h, reference.py.

A column holds the C values of a block of pixels as a tuple of float32 tiles (rows, BLOCK), and
`classes` which class each row is, (rows, 1). Rows beyond the last class are padding: their logits
are -inf, their probabilities 0. Tiles of unlike height leave little padding: 19 = 16 + 2 + 1.
What needs logits comes before their exponentials, which then take their place in the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
LOG_TINY = tl.constexpr(-88.0)  # exp of this is next to nothing
LOG2_E = tl.constexpr(1.4426950408889634)
NO_CLASS = tl.constexpr(2**30)


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
def largest(column):
    top = tl.max(column[0], 0)
    for i in tl.static_range(1, len(column)):
        top = tl.maximum(top, tl.max(column[i], 0))
    return top


@triton.jit
def first_of(column, classes, top):
    """The first class whose value is `top`; never one that is NaN."""
    label = tl.min(tl.where(column[0] >= top[None, :], classes[0], NO_CLASS), 0)
    for i in tl.static_range(1, len(column)):
        found = tl.where(column[i] >= top[None, :], classes[i], NO_CLASS)
        label = tl.minimum(label, tl.min(found, 0))
    return label


@triton.jit
def label_of(label, total):
    """Where the sum of the exponentials is NaN all probabilities are, and the first is the top."""
    return tl.where(total == total, label, 0)


@triton.jit
def largest_but(column, classes, label):
    second = tl.max(tl.where(classes[0] == label[None, :], float("-inf"), column[0]), 0)
    for i in tl.static_range(1, len(column)):
        others = tl.where(classes[i] == label[None, :], float("-inf"), column[i])
        second = tl.maximum(second, tl.max(others, 0))
    return second


@triton.jit
def exponentials(column, top, scale=1.0):
    """exp(scale * (column - top)) and its sum over the classes."""
    total = tl.zeros_like(top)
    powers = ()
    for i in tl.static_range(len(column)):
        powers = powers + (exp(column[i] - top[None, :], scale),)
        total += tl.sum(powers[i], 0)
    return powers, total


@triton.jit
def scaled(column, factor):
    tiles = ()
    for i in tl.static_range(len(column)):
        tiles = tiles + (column[i] * factor[None, :],)
    return tiles


@triton.jit
def teacher_pixel(y, classes, inverse_temperature, KIND: tl.constexpr, CLASSES: tl.constexpr):
    """Score and label of q = softmax(y / T), and q."""
    top = largest(y)
    label = first_of(y, classes, top)
    of_top = 1.0
    if KIND == "margin" and CLASSES > 1:
        of_top -= exp(largest_but(y, classes, label) - top, inverse_temperature)
    powers, total = exponentials(y, top, inverse_temperature)
    inverse = 1.0 / total
    score = of_top * inverse
    if KIND == "entropy" and CLASSES > 1:
        moment = tl.zeros_like(top)
        for i in tl.static_range(len(y)):
            x = (y[i] - top[None, :]) * inverse_temperature
            moment += tl.sum(powers[i] * tl.maximum(x, LOG_TINY), 0)
        score = entropy_score(tl.log(total) - moment * inverse, CLASSES)
    return score, label_of(label, total), scaled(powers, inverse)


@triton.jit
def entropy_score(entropy, CLASSES: tl.constexpr):
    score = 1.0 - entropy / tl.log(tl.full((), CLASSES, tl.float32))
    return tl.where(score < 0.0, 0.0, score)


@triton.jit
def add_member(q, y, inverse_temperature):
    """q + softmax(y / T) of one member of an ensemble; q is () before the first."""
    powers, total = exponentials(y, largest(y), inverse_temperature)
    member = scaled(powers, 1.0 / total)
    tiles = ()
    for i in tl.static_range(len(y)):
        tiles = tiles + (member[i] if len(q) == 0 else q[i] + member[i],)
    return tiles


@triton.jit
def ensemble_pixel(q, classes, MEMBERS: tl.constexpr, KIND: tl.constexpr, CLASSES: tl.constexpr):
    """Score and label of what the members of an ensemble have summed up in q, and its mean."""
    top = largest(q)
    label = first_of(q, classes, top)
    total = tl.zeros_like(top)
    for i in tl.static_range(len(q)):
        total += tl.sum(q[i], 0)
    score = top
    if KIND == "margin" and CLASSES > 1:
        score -= largest_but(q, classes, label)
    # Divided, as IEEE has it, so that certain members score exactly 1.
    score = tl.div_rn(score, tl.full(score.shape, MEMBERS, tl.float32))
    q = scaled(q, tl.full(top.shape, 1.0 / MEMBERS, tl.float32))
    if KIND == "entropy" and CLASSES > 1:
        entropy = tl.zeros_like(top)
        for i in tl.static_range(len(q)):
            entropy -= tl.sum(q[i] * log_positive(q[i]), 0)
        score = entropy_score(entropy, CLASSES)
    return score, label_of(label, total), q


@triton.jit
def consistency_pixel(z, q, label, classes, LOSS: tl.constexpr, CLASSES: tl.constexpr):
    """Loss between p = softmax(z) and q at each pixel, and its gradient."""
    if LOSS == "mse":
        return mse_pixel(z, q)
    elif LOSS == "ce":
        return ce_pixel(z, label, classes)
    elif LOSS == "bce":
        return bce_pixel(z, q, classes, CLASSES)
    elif LOSS == "js":
        return js_pixel(z, q)
    else:
        return soft_ce_pixel(z, q, LOSS)


@triton.jit
def mse_pixel(z, q):
    """sum (p - q)^2; its gradient 2 p ((p - q) - sum p (p - q))."""
    powers, total = exponentials(z, largest(z))
    p = scaled(powers, 1.0 / total)
    value, mean = tl.zeros_like(total), tl.zeros_like(total)
    for i in tl.static_range(len(z)):
        difference = p[i] - q[i]
        value += tl.sum(difference * difference, 0)
        mean += tl.sum(p[i] * difference, 0)
    gradient = ()
    for i in tl.static_range(len(z)):
        gradient = gradient + (2.0 * p[i] * (p[i] - q[i] - mean[None, :]),)
    return value, gradient


@triton.jit
def soft_ce_pixel(z, q, LOSS: tl.constexpr):
    """-sum q log p, plus sum q log q for "kl"; the gradient of both is p - q."""
    expected = tl.zeros_like(tl.max(z[0], 0))
    if LOSS == "kl":
        for i in tl.static_range(len(z)):
            expected -= tl.sum(q[i] * log_positive(q[i]), 0)
    top = largest(z)
    for i in tl.static_range(len(z)):
        expected += tl.sum(times(q[i], z[i] - top[None, :]), 0)
    powers, total = exponentials(z, top)
    p = scaled(powers, 1.0 / total)
    gradient = ()
    for i in tl.static_range(len(z)):
        gradient = gradient + (p[i] - q[i],)
    return tl.log(total) - expected, gradient


@triton.jit
def ce_pixel(z, label, classes):
    """-log p[label]; its gradient p - onehot."""
    top = largest(z)
    chosen = tl.zeros_like(top)
    for i in tl.static_range(len(z)):
        chosen += tl.sum(tl.where(classes[i] == label[None, :], z[i] - top[None, :], 0.0), 0)
    powers, total = exponentials(z, top)
    p = scaled(powers, 1.0 / total)
    gradient = ()
    for i in tl.static_range(len(z)):
        own = classes[i] == label[None, :]
        gradient = gradient + (tl.where(own, p[i] - 1.0, p[i]),)
    return tl.log(total) - chosen, gradient


@triton.jit
def weighted_ce_pixel(
    z, label, classes, class_weight, own_weight, mean_weight, smoothing, CLASSES: tl.constexpr
):
    """-sum w[c] t[c] log p[c] for the target t = (1 - smoothing) onehot + smoothing / C.

    class_weight holds w, one tile (rows, 1) a tile of z, 0 in the padding; own_weight is that of
    the label, mean_weight the mean of w; w and its mean are 0 where smoothing is.
    """
    top = largest(z)
    chosen, spread = tl.zeros_like(top), tl.zeros_like(top)
    for i in tl.static_range(len(z)):
        x = z[i] - top[None, :]
        chosen += tl.sum(tl.where(classes[i] == label[None, :], x, 0.0), 0)
        spread += tl.sum(times(class_weight[i], x), 0)
    powers, total = exponentials(z, top)
    share = own_weight * (1.0 - smoothing)
    mass = share + mean_weight * smoothing
    p = scaled(powers, mass / total)
    gradient = ()
    for i in tl.static_range(len(z)):
        own = tl.where(classes[i] == label[None, :], share[None, :], 0.0)
        gradient = gradient + (p[i] - (own + class_weight[i] * (smoothing / CLASSES)),)
    loss = mass * tl.log(total) - times(share, chosen) - times(smoothing / CLASSES, spread)
    return loss, gradient


@triton.jit
def bce_pixel(z, q, classes, CLASSES: tl.constexpr):
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
    rest = tl.zeros_like(top)
    expected = tl.zeros_like(top)
    q_top = tl.zeros_like(top)
    others = ()
    for i in tl.static_range(len(z)):
        is_top = classes[i] == label[None, :]
        other = tl.where(is_top, 0.0, exp(z[i] - second[None, :]))
        expected += tl.sum(times(q[i], z[i] - top[None, :]), 0)
        q_top += tl.sum(tl.where(is_top, q[i], 0.0), 0)
        rest += tl.sum(other, 0)
        others = others + (other,)
    total = 1.0 + rest * exp(gap)
    p_top = 1.0 / total
    p = scaled(others, exp(gap) * p_top)
    value = tl.log(total) - expected
    value -= times(1.0 - q_top, gap + tl.log(rest) - tl.log(total))
    odds = tl.zeros_like(top)  # sum over the other classes of -q + (1-q) p / (1-p)
    for i in tl.static_range(len(z)):
        counts = (classes[i] != label[None, :]) & (classes[i] < CLASSES)
        value -= tl.sum(tl.where(counts, (1.0 - q[i]) * log_one_minus(p[i]), 0.0), 0)
        odds += tl.sum(tl.where(counts, (1.0 - q[i]) * p[i] / (1.0 - p[i]) - q[i], 0.0), 0)
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
        gradient = gradient + (tl.where(is_top, gradient_top[None, :], other),)
    if CLASSES == 1:
        # 0, or NaN as a softmax would be.
        nothing = tl.where(classes[0] == 0, (z[0] - z[0]) + (q[0] - q[0]), 0.0)
        value = tl.sum(nothing, 0)
        gradient = (nothing,)
    return value, gradient


@triton.jit
def js_pixel(z, q):
    """KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2; its gradient p (g - sum p g), g = log(p/m) / 2."""
    powers, total = exponentials(z, largest(z))
    p = scaled(powers, 1.0 / total)
    value = tl.zeros_like(total)
    mean = tl.zeros_like(total)
    halves = ()
    for i in tl.static_range(len(z)):
        twice = 2.0 / at_least_tiny(p[i] + q[i])
        g = 0.5 * log_positive(p[i] * twice)
        mean += tl.sum(p[i] * g, 0)
        value += tl.sum(p[i] * g + 0.5 * q[i] * log_positive(q[i] * twice), 0)
        halves = halves + (g,)
    gradient = ()
    for i in tl.static_range(len(z)):
        gradient = gradient + (p[i] * (halves[i] - mean[None, :]),)
    return value, gradient
