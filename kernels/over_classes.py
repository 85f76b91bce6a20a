"""Over the classes of each pixel: sum, largest, first, the value of one; columns as in pixel.py.

Each thread first goes over the rows that it holds of all tiles, so that threads which share a pixel
exchange once for a column, not once for a tile of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_CLASS = tl.constexpr(2**30)


@triton.jit
def layers(tile, column):
    """A tile (rows, BLOCK) as (layers, rows of the last tile, BLOCK).

    Each thread holds its rows of every layer.
    """
    rows: tl.constexpr = column[len(column) - 1].shape[0]
    return tl.reshape(tile, (tile.shape[0] // rows, rows, tile.shape[1]))


@triton.jit
def added(parts, tile, column):
    """The parts of a sum over the classes, (rows of a layer, BLOCK), and a tile of the column more.

    None before the first; after the last tl.sum(parts, 0) is the sum.
    """
    own = tl.sum(layers(tile, column), 0)
    if parts is None:
        return own
    else:
        return parts + own


@triton.jit
def largest(column):
    top = tl.max(layers(column[0], column), 0)
    for i in tl.static_range(1, len(column)):
        top = tl.maximum(top, tl.max(layers(column[i], column), 0))
    return tl.max(top, 0)


@triton.jit
def first_of(column, classes, top):
    """The first class whose value is `top`; never one that is NaN."""
    found = tl.where(column[0] >= top[None, :], classes[0], NO_CLASS)
    label = tl.min(layers(found, column), 0)
    for i in tl.static_range(1, len(column)):
        found = tl.where(column[i] >= top[None, :], classes[i], NO_CLASS)
        label = tl.minimum(label, tl.min(layers(found, column), 0))
    return tl.min(label, 0)


@triton.jit
def largest_but(column, classes, label):
    """The largest value of the other classes."""
    others = ()
    for i in tl.static_range(len(column)):
        others = others + (tl.where(classes[i] == label[None, :], float("-inf"), column[i]),)
    return largest(others)


@triton.jit
def value_at(column, classes, label):
    """The value of one class."""
    own = None
    for i in tl.static_range(len(column)):
        own = added(own, tl.where(classes[i] == label[None, :], column[i], 0.0), column)
    return tl.sum(own, 0)
