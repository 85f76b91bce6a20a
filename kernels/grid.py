"""Low-resolution logits at output pixels: bilinear interpolation and its transpose, in registers.

An axis is (size, step, start, unit) in whole numbers: output position o lies at
(o * step + start) / unit low-resolution positions, as in F.interpolate but without its rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

Axis = tuple[int, int, int, int]
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides (N, C, H, W) of logits
Grid = tuple[Axis, Axis, tuple[int, ...]]  # row axis, column axis and strides of logits


def axis_of(size: int, out: int, align_corners: bool) -> Axis:
    if align_corners:
        return size, max(size - 1, 1), 0, max(out - 1, 1)
    return size, 2 * size, size - out, 2 * out


def grid_of(layout: Layout, size: tuple[int, int], align_corners: bool) -> Grid:
    rows, columns = (
        axis_of(low, out, align_corners) for low, out in zip(layout[0][2:], size, strict=True)
    )
    return rows, columns, layout[1]


@triton.jit
def neighbours(position, axis):
    """The low-resolution position before an output position, and the distance t from there, < 1."""
    place = tl.maximum(position * axis[1] + axis[2], 0)
    before = place // axis[3]
    t = (place - before * axis[3]).to(tl.float32) / axis[3]
    last = axis[0] - 1
    return tl.minimum(before, last), tl.where(before < last, t, 0.0)


@triton.jit
def corners(columns, axis):
    """The low-resolution columns on both sides of output columns, and the share t of the second.

    A logit of weight 0 does not count, whatever it holds: where only the first has any weight it
    is both of them, half each.
    """
    before, t = neighbours(columns, axis)
    return before, tl.where(t == 0, before, before + 1), tl.where(t == 0, 0.5, t)


@triton.jit
def first_beyond(before, axis, out):
    """The first output position whose neighbour before it is `before` or a later one."""
    position = (tl.maximum(before * axis[3] - axis[2], 0) + axis[1] - 1) // axis[1]
    position = tl.where(before <= 0, 0, tl.minimum(position, out))
    return tl.where(before >= axis[0], out, position)


@triton.jit
def row_of(
    image, row, strides, before, after, t, classes, APART: tl.constexpr, CLASSES: tl.constexpr
):
    """A low-resolution row at the output columns of a block; 0 in the padding.

    The first APART tiles are loaded one after the other, or the compiler holds the addresses and
    corners of all of them beside what the registers hold already, which spills.
    """
    data = image + row.to(tl.int64) * strides[2]
    column = ()
    for i in tl.static_range(len(classes)):
        if i < APART:
            tl.debug_barrier()
        at = data + classes[i] * strides[1]
        left = along_columns(at, before * strides[3])
        right = along_columns(at, after * strides[3])
        if i == len(classes) - 1:
            exists = (classes[i] < CLASSES) & (before >= 0)[None, :]
            left = tl.load(left, mask=exists, other=0).to(tl.float32)
            right = tl.load(right, mask=exists, other=0).to(tl.float32)
        else:
            left = tl.load(left).to(tl.float32)
            right = tl.load(right).to(tl.float32)
        column = column + ((1.0 - t)[None, :] * left + t[None, :] * right,)
    return column


@triton.jit
def along_columns(rows, offsets):
    """Addresses (rows, BLOCK) whose loads give neighbouring threads neighbouring columns.

    Triton 3.6 would give them the rows, as it knows of no two addresses that lie together, and then
    move what is loaded between threads anew for each row of pixels. So it is told of two, which
    need not be, and that nothing is known of where they begin: no access becomes wider by it.
    """
    return tl.max_contiguous(tl.multiple_of(rows + offsets[None, :], (1, 1)), (1, 2))


@triton.jit
def band_of(image, row, grid, before, after, t, classes, CLASSES: tl.constexpr):
    """The rows `row` and the next at the output columns of a block: the first, and the step."""
    upper = row_of(image, row, grid[2], before, after, t, classes, 0, CLASSES)
    below = tl.minimum(row + 1, grid[0][0] - 1)
    lower = row_of(image, below, grid[2], before, after, t, classes, 2, CLASSES)
    step = ()
    for i in tl.static_range(len(classes)):
        stays = (upper[i] == float("-inf")) & (lower[i] < float("inf"))  # -inf - -inf is NaN
        step = step + (tl.where(stays, 0.0, lower[i] - upper[i]),)
    return upper, step


@triton.jit
def between(upper, step, t, classes, CLASSES: tl.constexpr):
    """The column of output pixels at distance t below the upper row; -inf in the padding.

    The lower row does not count where t is 0, whatever it holds.
    """
    column = upper
    if t != 0:
        column = add_scaled(upper, t, step)
    tiles = ()
    for i in tl.static_range(len(classes)):
        tile = column[i]
        if i == len(classes) - 1:
            tile = tl.where(classes[i] < CLASSES, tile, float("-inf"))
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def add_scaled(sums, factor, column):
    tiles = ()
    for i in tl.static_range(len(sums)):
        tiles = tiles + (sums[i] + factor * column[i],)
    return tiles


@triton.jit
def share_of(column, before, after, t):
    """How much of a gradient at an output column each low-resolution column receives."""
    return tl.where(before == column, 1.0 - t, 0.0) + tl.where(after == column, t, 0.0)


@triton.jit
def put_strip(
    scratch,
    rows,
    begin,
    before,
    after,
    t,
    axis,
    span,
    classes,
    CLASSES: tl.constexpr,
    STRIP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The transposed interpolation of rows at the columns of a strip, or of a piece of it.

    scratch: (rows, C, span) of each program, from the first low-resolution column it touches on.
    """
    to = scratch + tl.program_id(0).to(tl.int64) * (len(rows) * CLASSES * span)
    first, _ = neighbours(begin, axis)
    if before.shape[0] < STRIP:
        touched = tl.min(before, 0), tl.max(after, 0) + 1
        add_rows(to, rows, first, touched, before, after, t, span, classes, CLASSES, True)
        tl.debug_barrier()  # the next piece reads what this one has written
    elif are_finite(rows):
        put_rows(to, rows, first, before, after, t, span, classes, CLASSES, WINDOW, PRECISION)
    else:  # in a product what is not finite would reach all columns: 0 * NaN
        touched = first, first + span
        add_rows(to, rows, first, touched, before, after, t, span, classes, CLASSES, False)


@triton.jit
def are_finite(rows):
    """Whether the gradients of all pixels are."""
    totals = tl.zeros((rows[0][0].shape[1],), tl.float32)
    for r in tl.static_range(len(rows)):
        for i in tl.static_range(len(rows[r])):
            totals += tl.sum(rows[r][i], 0)
    return tl.max((totals - totals != 0).to(tl.int32), 0) == 0


@triton.jit
def put_rows(
    scratch,
    rows,
    first,
    before,
    after,
    t,
    span,
    classes,
    CLASSES: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills (rows, C, span) of a program: gradients at output columns to low-resolution ones.

    The longer side of a product is its first, as tensor cores have it.
    """
    for begin in range(0, span, WINDOW):
        lanes = begin + tl.arange(0, WINDOW)
        column = (first + lanes)[None, :]
        share = share_of(column, before[:, None], after[:, None], t[:, None])
        for r in tl.static_range(len(rows)):
            to = scratch + r * CLASSES * span
            for i in tl.static_range(len(classes)):
                if classes[i].shape[0] > WINDOW:
                    part = tl.dot(rows[r][i], share, input_precision=PRECISION)
                else:
                    columns = tl.trans(rows[r][i])
                    part = tl.dot(tl.trans(share), columns, input_precision=PRECISION).trans()
                mask = (classes[i] < CLASSES) & (lanes < span)[None, :]
                tl.store(to + classes[i] * span + lanes[None, :], part, mask=mask)


@triton.jit
def add_rows(
    scratch,
    rows,
    first,
    touched,
    before,
    after,
    t,
    span,
    classes,
    CLASSES: tl.constexpr,
    ADDS: tl.constexpr,
):
    """The same without a product, for the low-resolution columns from touched[0] to touched[1].

    ADDS: to what earlier pieces of the strip have left there.
    """
    for column in range(touched[0], touched[1]):
        share = share_of(column, before, after, t)[None, :]
        for r in tl.static_range(len(rows)):
            to = scratch + r * CLASSES * span + (column - first)
            for i in tl.static_range(len(classes)):
                part = tl.where(share != 0, rows[r][i] * share, 0.0)
                part = tl.sum(part, 1)[:, None]
                mask = classes[i] < CLASSES
                at = to + classes[i] * span
                if ADDS:
                    part += tl.load(at, mask=mask, other=0.0)
                tl.store(at, part, mask=mask)
