"""The module twins: options given once, overridden at a call, presets of published methods."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from operands import random_logits

import fastmt
from fastmt import ConsistencyLoss, CrossEntropy
from fastmt.consistency import PRESETS

SHAPE = (2, 5, 9, 11)
STUDENT, TEACHER = random_logits(SHAPE, 1), random_logits(SHAPE, 2, 6.0)
LABELS = torch.arange(198).view(2, 9, 11) % 5
MAX_PROB, ENTROPY = (
    fastmt.softmax_confidence(TEACHER, kind=k).score for k in ("max_prob", "entropy")
)


def test_the_module_is_the_function_with_its_options():
    options = {
        "loss": "js",
        "class_reduction": "mean",
        "confidence": "margin",
        "weight": "confidence",
        "threshold": 0.3,
        "strict": True,
        "temperature": 2.0,
        "normalize": "weight",
    }
    expected = fastmt.consistency_loss(STUDENT, TEACHER, **options)
    assert torch.equal(ConsistencyLoss(**options)(STUDENT, TEACHER), expected)
    assert expected != fastmt.consistency_loss(STUDENT, TEACHER)
    assert torch.equal(
        ConsistencyLoss()(STUDENT, TEACHER), fastmt.consistency_loss(STUDENT, TEACHER)
    )


def test_a_threshold_by_class_moves_with_the_module():
    threshold = torch.linspace(0.3, 0.9, 5)
    module = ConsistencyLoss(threshold=threshold)
    expected = fastmt.consistency_loss(STUDENT, TEACHER, threshold=threshold)
    assert torch.equal(module(STUDENT, TEACHER), expected)
    assert copy.deepcopy(module).to("meta").options["threshold"].device.type == "meta"
    other = ConsistencyLoss(threshold=torch.zeros(5))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(STUDENT, TEACHER), expected)
    assert not ConsistencyLoss(threshold=0.5).state_dict()


def test_a_call_overrides_an_option_and_adds_maps_for_itself_only():
    module = ConsistencyLoss(threshold=0.9)
    valid = LABELS > 1
    once = module(STUDENT, TEACHER, threshold=0.2, valid=valid)
    assert torch.equal(once, fastmt.consistency_loss(STUDENT, TEACHER, threshold=0.2, valid=valid))
    assert torch.equal(
        module(STUDENT, TEACHER), fastmt.consistency_loss(STUDENT, TEACHER, threshold=0.9)
    )


def test_statistics_are_an_option():
    loss, stats = ConsistencyLoss(return_stats=True, threshold=0.5)(STUDENT, TEACHER)
    assert loss == fastmt.consistency_loss(STUDENT, TEACHER, threshold=0.5)
    torch.testing.assert_close(stats.selected, (MAX_PROB >= 0.5).float().mean())


def pixel_cross_entropy():
    labels = TEACHER.argmax(1)
    return torch.nn.functional.cross_entropy(STUDENT, labels, reduction="none")


def squares():
    return (STUDENT.softmax(1) - TEACHER.softmax(1)).square().mean(1)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("mean_teacher", lambda: squares().mean()),
        ("uamt", lambda: squares()[ENTROPY > 0.25].mean()),
        ("dacs", lambda: pixel_cross_entropy().mean() * (MAX_PROB >= 0.968).float().mean()),
        ("daformer", lambda: pixel_cross_entropy().mean() * (MAX_PROB >= 0.968).float().mean()),
        ("unimatch", lambda: (pixel_cross_entropy() * (MAX_PROB >= 0.95)).mean()),
    ],
)
def test_a_preset_is_the_formula_of_its_paper(name, formula):
    value = ConsistencyLoss.preset(name)(STUDENT, TEACHER)
    assert 0.05 < (MAX_PROB >= 0.95).float().mean() < 0.95
    torch.testing.assert_close(value, formula(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_overrides_and_stays_as_it_is(name):
    module = ConsistencyLoss.preset(name, threshold=0.5)
    assert module.options["threshold"] == 0.5
    assert module.options["loss"] == PRESETS[name]["loss"]
    assert PRESETS[name].get("threshold") != 0.5


def test_unimatch_divides_by_the_valid_pixels():
    valid = LABELS > 0
    value = ConsistencyLoss.preset("unimatch")(STUDENT, TEACHER, valid=valid)
    expected = (pixel_cross_entropy() * (MAX_PROB >= 0.95))[valid].mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [0, 50, 80])
def test_uamt_with_a_pass_of_its_own_as_target_is_that_of_its_code(step):
    passes = [0.2 * TEACHER + 0.1 * random_logits(SHAPE, 3 + i) for i in range(8)]
    threshold = fastmt.schedules.UncertaintyThreshold(100)(step)
    sure = fastmt.softmax_confidence(passes, kind="entropy").score > threshold
    options = {"weight": "none", "normalize": "valid", "valid": sure}
    value = ConsistencyLoss.preset("uamt")(STUDENT, TEACHER, **options)

    entropy = torch.special.entr(torch.stack(passes).softmax(2).mean(0)).sum(1)
    ramp = math.exp(-5 * (1 - step / 100) ** 2)
    mask = entropy < (0.75 + 0.25 * ramp) * math.log(SHAPE[1])
    assert 0 < mask.float().mean() < 1
    torch.testing.assert_close(value, squares()[mask].mean(), rtol=1e-5, atol=0)


def test_unknown_presets_options_and_choices_are_named_when_the_module_is_made():
    with pytest.raises(ValueError, match="^preset: got 'fixmatch', expected one of"):
        ConsistencyLoss.preset("fixmatch")
    with pytest.raises(TypeError, match="^treshold: not an option; expected loss, "):
        ConsistencyLoss(treshold=0.5)
    with pytest.raises(ValueError, match="^weight: got 'hard'"):
        ConsistencyLoss(weight="hard")
    with pytest.raises(TypeError, match="^loss: not an option; expected ignore_index, "):
        CrossEntropy(loss="ce")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (ConsistencyLoss, {"temperature": -1.0}),
        (ConsistencyLoss, {"normalize": "sum"}),
        (CrossEntropy, {"normalize": "sum"}),
        (ConsistencyLoss, {"threshold": "0.9"}),
        (ConsistencyLoss, {"strict": "yes"}),
        (CrossEntropy, {"label_smoothing": 1.5}),
        (CrossEntropy, {"align_corners": "yes"}),
    ],
)
def test_a_wrong_option_is_refused_when_the_module_is_made(module, options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
        module(**options)


def test_cross_entropy_module_is_the_function_with_its_options():
    weight = torch.rand(5, generator=torch.Generator().manual_seed(0))
    options = {"ignore_index": 3, "label_smoothing": 0.1, "normalize": "weight"}
    module = CrossEntropy(class_weight=weight, **options)
    expected = fastmt.cross_entropy(STUDENT, LABELS, class_weight=weight, **options)
    assert torch.equal(module(STUDENT, LABELS), expected)
    assert torch.equal(
        module(STUDENT, LABELS, class_weight=None, normalize="valid"),
        fastmt.cross_entropy(STUDENT, LABELS, ignore_index=3, label_smoothing=0.1),
    )


def test_class_weights_move_and_are_saved_with_the_module():
    module = CrossEntropy(class_weight=torch.ones(5))
    assert module.to(torch.float64).class_weight.dtype == torch.float64
    assert list(module.state_dict()) == ["class_weight"]
    assert not list(module.parameters())
    assert torch.equal(copy.deepcopy(module).class_weight, module.class_weight)


def test_modules_show_their_options():
    assert "loss='ce'" in repr(ConsistencyLoss.preset("unimatch"))
    assert "ignore_index=255" in repr(CrossEntropy())
