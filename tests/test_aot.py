"""What the compilers make of the Triton kernels is what the committed table says."""

from __future__ import annotations

import json
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  where Triton is

from benchmarks import aot  # noqa: E402
from fastmt import kernels  # noqa: E402
from fastmt.kernels.cells import PRODUCT_CLASSES, strips_for  # noqa: E402
from fastmt.kernels.columns import blocks_for  # noqa: E402

RESULTS = json.loads((aot.RESULTS / "aot.json").read_text())
ROWS = {aot.key_of(row): row for row in RESULTS["rows"]}
QUICK = (
    *("dense consistency mse", "dense confidence max_prob", "cells cross_entropy"),
    *("ema_update_", "ema_update_ rounding"),
    *("resample_slices bfloat16", "resample_slices_backward"),
)
OF_LABELS = ("cross_entropy_weight_kernel", "cross_entropy_denominator_kernel")
same_compiler = pytest.mark.skipif(
    RESULTS["triton"] != triton.__version__,
    reason=f"the table is of Triton {RESULTS['triton']}, here is {triton.__version__}",
)


@same_compiler
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiling_again_gives_the_committed_figures(target):
    rows = aot.measured(target, [19], ["bfloat16"], wanted=QUICK.__contains__)
    assert len(rows) == len(QUICK) + 1  # the gradients of cells are joined by a second kernel
    for row in rows:
        assert row == ROWS[aot.key_of(row)]


def test_the_table_covers_every_target_number_of_classes_and_dtype():
    found = {(row["target"], row["classes"], row["dtype"]) for row in ROWS.values()}
    for target in aot.TARGETS:
        for classes in aot.CLASSES:
            for dtype in aot.DTYPES:
                assert (target, classes, dtype) in found


def test_the_table_is_written_from_the_figures():
    assert (aot.RESULTS / "aot.md").read_text() == aot.table(RESULTS)


def test_logits_and_gradients_at_output_resolution_move_in_vectors():
    for row in ROWS.values():
        if row["call"].startswith(("dense", "scale")) and row["kernel"] not in OF_LABELS:
            half = row["dtype"] == "bfloat16" and not row["call"].startswith("scale")
            width = 8 if half else 16
            if half and "confidence" in row["call"]:  # by what was measured (benchmarks/gpu_choice)
                width = {19: 4, 21: 4, 81: 8, 150: 16}[row["classes"]]
            assert row["load"] == width
            assert row["store"] >= 8


def test_slices_move_in_vectors():
    rows = [row for row in ROWS.values() if row["call"].startswith("resample_slices")]
    assert len(rows) == 3 * len(aot.TARGETS)
    for row in rows:
        apart = (row["target"], row["call"]) == ("gfx942", "resample_slices bfloat16")
        assert (row["load"], row["store"]) == (8 if apart else 16, 16)


@pytest.mark.parametrize("operation", ["consistency", "confidence", "cross_entropy"])
@pytest.mark.parametrize("shape", [(300, 5), (2, 19, 8, 10)])
def test_classes_side_by_side_in_memory_are_not_taken_for_aligned(operation, shape):
    logits = aot.meta(*shape)
    if logits.ndim == 4:
        logits = logits.to(memory_format=torch.channels_last)
    labels = aot.meta(shape[0], *shape[2:], dtype=torch.uint8)
    with aot.compiling("sm_90") as launches:
        if operation == "consistency":
            options = (aot.meta(1), None, None, [0] * 6, 1.0, None, False, True)
            kernels.consistency_loss(logits, [logits], *options)
        elif operation == "confidence":
            kernels.softmax_confidence([logits], 0, 1.0, None, False)
        else:
            kernels.cross_entropy(logits, labels, None, None, [255, 1], 0.0, False, True)
    ptx = launches[0].compiled.asm["ptx"]
    assert "ld.global" in ptx
    assert not re.search(r"ld\.global[\w.:]*?\.v[248]\.", ptx)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_threads_that_up_sample_take_columns_and_exchange_no_logits(layout):
    logits = aot.meta(2, 16, 16, 16).to(memory_format=layout)
    with aot.compiling("sm_90") as launches:
        kernels.softmax_confidence([logits], 0, 1.0, [64, 64], False)
    ptx = launches[0].compiled.asm["ptx"]
    assert "ld.global" in ptx
    assert not re.search(r"ld\.global[\w.:]*?\.v[248]\.", ptx)
    assert "shfl" not in ptx


@pytest.mark.parametrize(
    ("classes", "dtype", "fetched"),
    [
        (19, torch.bfloat16, True),
        (81, torch.float16, True),
        (150, torch.bfloat16, False),
        (19, torch.float32, False),
    ],
)
def test_logits_of_half_precision_are_fetched_before_they_are_loaded(classes, dtype, fetched):
    logits, labels = aot.meta(2, classes, 64, 64, dtype=dtype), aot.meta(2, 64, 64).byte()
    with aot.compiling("sm_90") as launches:
        kernels.consistency_loss(logits, [logits], 0.9, None, None, [0] * 6, 1.0, None, False, True)
        kernels.cross_entropy(logits, labels, None, None, [255, 0], 0.0, False, True)
    found = {made.kernel: made.compiled.asm["ptx"] for made in launches}
    for kernel in ("consistency_kernel", "cross_entropy_kernel"):
        assert ("prefetch.global.L2" in found[kernel]) == fetched


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("apart", [False, True])
def test_no_tile_of_a_column_is_lower_than_the_threads_that_share_a_pixel(target, apart):
    width = aot.TARGETS[target].warp_size
    with aot.compiling(target):
        for classes in (1, 2, 5, 19, 21, 81, 150, 1000, 4096):
            pixels, warps, tiles, vector = blocks_for(classes, 2, 2, apart)
            assert sum(tiles) >= classes
            assert min(tiles) >= width * warps * vector // pixels


def test_no_kernel_spills():
    assert [row for row in ROWS.values() if row["stack"]] == []


@same_compiler
@pytest.mark.parametrize(("target", "limit"), [("sm_75", 64), ("sm_89", 99)])
def test_the_largest_product_fits_into_the_shared_memory_of_small_gpus(target, limit, monkeypatch):
    monkeypatch.setitem(aot.TARGETS, target, GPUTarget("cuda", int(target[3:]), 32))
    rows = aot.measured(target, [PRODUCT_CLASSES], ["float32"], wanted="cells cross_entropy".__eq__)
    assert all(row["shared"] <= limit * 1024 for row in rows)
    strip = strips_for(PRODUCT_CLASSES + 1, 6)
    assert strip.piece < strip.pixels


@same_compiler
def test_more_classes_than_registers_hold_are_taken_in_pieces_that_do_not_spill():
    calls = ("cells consistency mse", "cells confidence max_prob")
    rows = aot.measured("sm_80", [1000], ["float32"], wanted=calls.__contains__)
    assert len(rows) == len(calls) + 1
    assert [row for row in rows if row["stack"]] == []
