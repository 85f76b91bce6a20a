"""Scores from the confusion matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmt.metrics import ConfusionMatrix


def brute_force_iou(predicted, labels, num_classes, ignore_index=255):
    counted = labels != ignore_index
    scores = []
    for c in range(num_classes):
        guess, truth = (predicted == c) & counted, (labels == c) & counted
        union = (guess | truth).sum().item()
        scores.append((guess & truth).sum().item() / union if union else math.nan)
    return torch.tensor(scores, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 2**31), st.booleans())
def test_iou_equals_set_arithmetic(num_classes, pixels, seed, with_void):
    rng = torch.Generator().manual_seed(seed)
    predicted = torch.randint(num_classes, (pixels,), generator=rng)
    labels = torch.randint(num_classes, (pixels,), generator=rng)
    if with_void:
        labels[torch.rand(pixels, generator=rng) < 0.3] = 255
    matrix = ConfusionMatrix(num_classes)
    matrix.update(predicted, labels.to(torch.uint8))
    expected = brute_force_iou(predicted, labels, num_classes)
    torch.testing.assert_close(matrix.iou(), expected, rtol=0, atol=0, equal_nan=True)
    counted = labels != 255
    if counted.any():
        assert matrix.miou() == pytest.approx(expected.nanmean().item())
        right = (predicted == labels)[counted].double().mean().item()
        assert matrix.pixel_accuracy() == pytest.approx(right)


def test_rows_are_truth_and_columns_prediction():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[2, 2]]), torch.tensor([[0, 1]]))
    assert matrix.matrix.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_a_class_absent_from_truth_and_prediction_is_nan_and_left_out_of_the_mean():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert matrix.iou().isnan().tolist() == [False, False, True]
    assert matrix.miou() == 1.0


def test_a_class_only_predicted_scores_zero():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert matrix.iou().tolist() == [0.5, 0.0]


def test_nothing_counted_scores_nan():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 99]), torch.tensor([255, 255]))
    assert math.isnan(matrix.miou()) and math.isnan(matrix.pixel_accuracy())


def test_updates_and_merges_add_up():
    rng = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(4, (2, 3, 8, 8), generator=rng).unbind(0)
    whole, first, second = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(predicted, labels)
    for p, y in zip(predicted[:2], labels[:2], strict=True):
        first.update(p, y)
    second.update(predicted[2], labels[2])
    first.merge(second)
    assert torch.equal(first.matrix, whole.matrix)
    assert second.matrix.sum() == 64
    first.reset()
    assert first.matrix.sum() == 0


def test_counts_of_inference_mode_go_on_outside_of_it():
    with torch.inference_mode():
        matrix = ConfusionMatrix(2)
        matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    matrix.update(torch.tensor([1]), torch.tensor([1]))
    matrix.merge(matrix)
    assert matrix.matrix.tolist() == [[2, 2], [0, 2]]


def test_a_negative_ignore_index_works_with_uint8_labels():
    matrix = ConfusionMatrix(200, ignore_index=-100)
    matrix.update(torch.tensor([156]), torch.tensor([156], dtype=torch.uint8))
    assert matrix.matrix[156, 156] == 1


def test_reading_the_matrix_hands_out_a_copy():
    matrix = ConfusionMatrix(2)
    matrix.matrix.fill_(7)
    assert matrix.matrix.sum() == 0


@pytest.mark.parametrize(
    ("predicted", "labels", "error", "message"),
    [
        ([0, 1], [0, 7], ValueError, "^labels: got label 7, expected 0..2 or ignore_index=255"),
        ([0, 1], [-1, 0], ValueError, "^labels: got label -1"),
        ([3, 1], [0, 0], ValueError, "^predicted: got 3, expected 0..2"),
        ([0], [0, 0], ValueError, r"^predicted: got shape \(1\), expected \(2\) as labels"),
        ([0.0], [0], TypeError, "^predicted: got torch.float32, expected integers"),
    ],
)
def test_unusable_pixels_are_named_and_not_counted(predicted, labels, error, message):
    matrix = ConfusionMatrix(3)
    with pytest.raises(error, match=message):
        matrix.update(torch.tensor(predicted), torch.tensor(labels))
    assert matrix.matrix.sum() == 0


def test_matrices_of_other_classes_do_not_merge():
    with pytest.raises(ValueError, match="^other: got a matrix of 3 classes, expected 2"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_updates_match_the_cpu_without_waiting_and_report_bad_labels_when_read():
    rng = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(5, (2, 64, 64), generator=rng).unbind(0)
    on_cpu, on_gpu = ConfusionMatrix(5), ConfusionMatrix(5, device="cuda")
    on_cpu.update(predicted, labels)
    moved = predicted.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_gpu.matrix.cpu(), on_cpu.matrix)
    on_gpu.update(moved[0], moved[1] + 100)
    with pytest.raises(ValueError, match="^predicted, labels: got 4096 pixels out of range"):
        on_gpu.iou()


def test_arrays_are_named():
    with pytest.raises(TypeError, match="^predicted: got ndarray, expected a tensor"):
        ConfusionMatrix(2).update(torch.zeros(2, dtype=torch.int64).numpy(), torch.zeros(2).long())
