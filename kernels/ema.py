"""The moving average of many tensors in one launch, from a table of their addresses."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmt.kernels.launch import GIVEN, Launch, prepared
from fastmt.kernels.rounding import at_random, mixed, nearest, widened
from fastmt.kernels.views import blocks_in, device_of

CHUNK = 16 * 1024  # elements of one program, as in fastmt/ema_table.py
BLOCK = 4096  # elements at once of a full chunk: so many loads under way keep a GPU's memory busy
SMALL = 1024  # of one that is not full
# Of the table: addresses of teacher and student, length, types of teacher and student, which of the
# decays and draws are its, what it does (the modes of fastmt/ema_bound.py), its number, mixed, and
# the address of what rounding has lost.
COLUMNS = 9
COPY, STOCHASTIC, KAHAN = tl.constexpr(1), tl.constexpr(3), tl.constexpr(4)
BFLOAT16 = tl.constexpr(1)
BYTES = tl.constexpr(3)  # the type of what is copied as it is
ALIGNMENT = tl.constexpr(16)  # bytes of one access


@triton.jit
def row_of(chunk, starts, rows, BLOCK: tl.constexpr):
    """The row of the table that a chunk belongs to; starts[row] counts the chunks before it."""
    row = 0
    for first in range(0, rows, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        ends = tl.load(starts + 1 + lanes, mask=lanes < rows, other=2**62)
        row += tl.sum((ends <= chunk).to(tl.int32), 0)
    return row


@triton.jit
def lanes_of(BLOCK: tl.constexpr):
    """Four neighbours in a thread: one layout in registers for every dtype."""
    return tl.multiple_of(tl.max_contiguous(tl.arange(0, BLOCK), 4), 4)


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A typed pointer; a table cannot tell the compiler what its addresses are multiples of."""
    typed = address.to(tl.pointer_type(dtype), bitcast=True)
    return tl.multiple_of(typed, ALIGNMENT) if ALIGNED else typed


@triton.jit
def read(address, at, mask, kind, ALIGNED: tl.constexpr):
    if kind == 0:
        value = tl.load(pointer(address, tl.float32, ALIGNED) + at, mask=mask)
    elif kind == 1:
        value = tl.load(pointer(address, tl.bfloat16, ALIGNED) + at, mask=mask).to(tl.float32)
    else:
        value = tl.load(pointer(address, tl.float16, ALIGNED) + at, mask=mask).to(tl.float32)
    return value


@triton.jit
def write(address, at, mask, kind, value, ALIGNED: tl.constexpr):
    if kind == 0:
        tl.store(pointer(address, tl.float32, ALIGNED) + at, value, mask=mask)
    elif kind == 1:
        tl.store(pointer(address, tl.bfloat16, ALIGNED) + at, value.to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer(address, tl.float16, ALIGNED) + at, value.to(tl.float16), mask=mask)


@triton.jit
def average(teacher, student, teacher_kind, student_kind, at, mask, decay, ALIGNED: tl.constexpr):
    """As torch.lerp from the nearer end; decay 0 copies, whatever was there."""
    old = read(teacher, at, mask, teacher_kind, ALIGNED)
    new = read(student, at, mask, student_kind, ALIGNED)
    near_student = decay < 0.5
    step = tl.where(near_student, decay, 1.0 - decay).to(tl.float32)
    mixed = tl.where(near_student, new + step * (old - new), old + step * (new - old))
    write(teacher, at, mask, teacher_kind, tl.where(decay == 0, new, mixed), ALIGNED)


@triton.jit
def mean(old, new, decay):
    """In the words of the reference: torch.lerp by what 1 - decay is in float32."""
    share = (1.0 - decay).to(tl.float32)
    step = tl.where(share >= 0.5, share - 1.0, share)
    nearer = tl.where(share >= 0.5, new, old)
    return tl.where(share == 1, new, tl.fma(step, new - old, nearer))


@triton.jit
def stochastic(
    teacher, student, teacher_kind, student_kind, at, mask, decay, key, ALIGNED: tl.constexpr
):
    is_bfloat16 = teacher_kind == BFLOAT16
    place = pointer(teacher, tl.uint16, ALIGNED) + at
    old = widened(tl.load(place, mask=mask), is_bfloat16)
    after = mean(old, read(student, at, mask, student_kind, ALIGNED), decay)
    random = mixed(mixed(at.to(tl.uint32)) ^ key)
    tl.store(place, at_random(after, is_bfloat16, random), mask=mask)


@triton.jit
def kahan(
    teacher, student, lost, teacher_kind, student_kind, at, mask, decay, ALIGNED: tl.constexpr
):
    """With what the rounding loses kept; nothing beside what is not finite."""
    is_bfloat16 = teacher_kind == BFLOAT16
    place = pointer(teacher, tl.uint16, ALIGNED) + at
    beside = pointer(lost, tl.uint16, ALIGNED) + at
    old = widened(tl.load(place, mask=mask), is_bfloat16)
    old += widened(tl.load(beside, mask=mask), is_bfloat16)
    after = mean(old, read(student, at, mask, student_kind, ALIGNED), decay)
    rounded = nearest(after, is_bfloat16)
    rest = after - widened(rounded, is_bfloat16)
    tl.store(place, rounded, mask=mask)
    rest = tl.where(rest - rest == 0, rest, 0.0)
    tl.store(beside, nearest(rest, is_bfloat16), mask=mask)


@triton.jit
def rounded(entry, teacher, student, mode, draw, first, count, decay, BLOCK: tl.constexpr):
    """A chunk of an average in half precision that moves; lanes of its own, as a copy's."""
    teacher_kind = tl.load(entry + 3)
    student_kind = tl.load(entry + 4)
    key = mixed((draw ^ tl.load(entry + 7)).to(tl.uint32)) ^ (first >> 32).to(tl.uint32)
    lost = tl.load(entry + 8)
    lanes = lanes_of(BLOCK)
    aligned = (teacher | student | lost) % ALIGNMENT == 0
    whole = tl.where(aligned, count // BLOCK * BLOCK, 0)
    if mode == KAHAN:
        for offset in range(0, whole, BLOCK):
            at = first + offset + lanes
            kahan(teacher, student, lost, teacher_kind, student_kind, at, None, decay, True)
        for offset in range(whole, count, BLOCK):
            at = first + offset + lanes
            mask = at < first + count
            kahan(teacher, student, lost, teacher_kind, student_kind, at, mask, decay, False)
    else:
        for offset in range(0, whole, BLOCK):
            at = first + offset + lanes
            stochastic(teacher, student, teacher_kind, student_kind, at, None, decay, key, True)
        for offset in range(whole, count, BLOCK):
            at = first + offset + lanes
            mask = at < first + count
            stochastic(teacher, student, teacher_kind, student_kind, at, mask, decay, key, False)


@triton.jit
def copy(teacher, student, first, count, BLOCK: tl.constexpr):
    """Byte by byte: buffers are small, and lanes of their own leave the average its layout."""
    for offset in range(0, count, BLOCK):
        lanes = offset + tl.arange(0, BLOCK)
        value = tl.load(pointer(student, tl.uint8, False) + first + lanes, mask=lanes < count)
        tl.store(pointer(teacher, tl.uint8, False) + first + lanes, value, mask=lanes < count)


@triton.jit
def ema_kernel(
    table,
    starts,
    rows,
    decays,
    draws,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """teacher <- decay * teacher + (1 - decay) * student, chunk by chunk.

    Decay 1 keeps, whatever the student holds; a negative one changes nothing, copies included.
    """
    lanes, few = lanes_of(BLOCK), lanes_of(SMALL)
    for chunk in range(tl.program_id(0), tl.load(starts + rows), tl.num_programs(0)):
        row = row_of(chunk, starts, rows, LOOKUP)
        entry = table + row.to(tl.int64) * COLUMNS
        teacher = tl.load(entry)
        student = tl.load(entry + 1)
        teacher_kind = tl.load(entry + 3)
        student_kind = tl.load(entry + 4)
        stated = tl.load(decays + tl.load(entry + 5)).to(tl.float64)
        mode = tl.load(entry + 6)
        decay = tl.where((mode == COPY) & (stated >= 0), 0.0, stated)
        length = tl.load(entry + 2)
        first = (chunk - tl.load(starts + row)) * CHUNK
        keeps = (decay == 1) | (decay < 0)
        count = tl.where(keeps, 0, tl.minimum(CHUNK, length - first)).to(tl.int32)
        aligned = (teacher % ALIGNMENT == 0) & (student % ALIGNMENT == 0)
        if draws is not None:  # noqa: SIM102  what the compiler knows, and what a row says
            if mode >= STOCHASTIC:
                draw = tl.load(draws + tl.load(entry + 5))
                rounded(entry, teacher, student, mode, draw, first, count, decay, SMALL)
                count = 0
        if teacher_kind == BYTES:
            copy(teacher, student, first, count, SMALL)
        elif aligned & (count == CHUNK):
            for offset in range(0, CHUNK, BLOCK):
                at = first + offset + lanes
                average(teacher, student, teacher_kind, student_kind, at, None, decay, True)
        else:
            whole = tl.where(aligned, count // SMALL * SMALL, 0)
            for offset in range(0, whole, SMALL):
                at = first + offset + few
                average(teacher, student, teacher_kind, student_kind, at, None, decay, True)
            for offset in range(whole, count, SMALL):
                at = first + offset + few
                mask = at < length
                average(teacher, student, teacher_kind, student_kind, at, mask, decay, False)


def ema_update_(table: Tensor, starts: Tensor, decays: Tensor, draws: Tensor | None = None) -> None:
    """teacher <- decay * teacher + (1 - decay) * student for each row of the table, in place.

    draws: int64, one for each decay; where the table has modes that round. Without it these are
    left out of the code: what they take of registers is no matter of other averages.
    The number of chunks is read on the device; the grid only has to fill it.
    """
    rows = len(table)
    if rows:
        key = (ema_update_, rows, draws is None, table.get_device())
        with device_of(table):
            prepared(key, _averaging, rows, table.device)(table, starts, decays, draws)


def _averaging(rows: int, device: torch.device) -> Launch:
    """It is given (table, starts, decays, draws)."""
    return Launch(
        ema_kernel,
        programs_on(device, 16),  # who is done early makes room for the next
        GIVEN,
        GIVEN,
        rows,
        GIVEN,
        GIVEN,
        COLUMNS=COLUMNS,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        SMALL=SMALL,
        LOOKUP=1024,
        num_warps=8,
        num_stages=1,
    )


@functools.cache
def programs_on(device: torch.device, to_each: int = 8) -> int:
    """So many programs to each multiprocessor; eight of four warps fill it."""
    if device.type != "cuda":
        return 1
    return to_each * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def scale_kernel(data, elements, scale, factor, BLOCK: tl.constexpr):
    product = tl.load(scale) * tl.load(factor)
    if product != 1.0:
        for block in range(tl.program_id(0), blocks_in(elements, BLOCK), tl.num_programs(0)):
            at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
            mask = at < elements
            value = tl.load(data + at, mask=mask).to(tl.float32)
            scaled = tl.where(product == 0, 0.0, value * product)  # nothing to learn, even of NaN
            tl.store(data + at, scaled.to(data.dtype.element_ty), mask=mask)


def scale_(data: Tensor, scale: Tensor, factor: Tensor) -> None:
    """data *= scale * factor in place, for a dense tensor; both factors are 0-dim float32.

    Mostly they are 1, and what would take its time is to start a program for every block.
    """
    elements = data.numel()
    if elements:
        key = (scale_, elements, data.dtype, data.get_device())
        scaled = prepared(key, _scaling, elements, data.device)
        with device_of(data):
            scaled(data, scale, factor.resolve_neg())  # may be a view that negates its memory


def _scaling(elements: int, device: torch.device) -> Launch:
    programs = min(triton.cdiv(elements, BLOCK), programs_on(device))
    return Launch(scale_kernel, programs, GIVEN, elements, GIVEN, GIVEN, BLOCK=BLOCK)
