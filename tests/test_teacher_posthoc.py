"""Averages made after training from snapshots of two tracks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmt import EMATeacher, decays, posthoc


def test_gamma_of_inverts_the_relative_width():
    for gamma in (0.5, 6.94, 16.97):
        width = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
        assert posthoc.gamma_of(width) == pytest.approx(gamma)


def test_a_snapshot_of_the_wanted_average_is_returned_whole():
    shares = posthoc.weights([50, 100, 100], [7.0, 7.0, 17.0], 100, 17.0)
    assert shares == pytest.approx([0, 0, 1], abs=1e-8)


def shared(one, other):
    """The integral of two profiles (g + 1) s^g / t^(g + 1), each up to its own time t."""
    (t, g), (u, h) = one, other
    exponent = g + h + 1
    return (g + 1) * (h + 1) * min(t, u) ** exponent / (t ** (g + 1) * u ** (h + 1) * exponent)


@pytest.mark.parametrize(("time", "end"), [(4, 8), (8, 4)])
def test_snapshots_weigh_as_least_squares_between_the_profiles_have_it(time, end):
    a, b, wanted = (time, 2.0), (6, 3.0), (end, 1.0)
    first = shared(a, wanted) * shared(b, b) - shared(b, wanted) * shared(a, b)
    second = shared(b, wanted) * shared(a, a) - shared(a, wanted) * shared(a, b)
    shares = posthoc.weights([a[0], b[0]], [a[1], b[1]], *wanted)
    assert shares == pytest.approx([first / (first + second), second / (first + second)])


@pytest.mark.parametrize("times", [[90], [300], [20, 50], [20, 50, 90]])
def test_a_student_that_stands_still_is_its_own_average(times):
    states = {"weight": torch.full((3,), 2.0)}
    snapshots = [posthoc.Snapshot(n, gamma, states) for n in times for gamma in (6.94, 16.97)]
    for some in (snapshots, snapshots[:1]):
        mixed = posthoc.average(some, 10.0, 100)
        torch.testing.assert_close(mixed, states)


def test_snapshots_of_which_the_wanted_average_has_nothing_are_refused():
    with pytest.raises(ValueError, match="^snapshots: got none with any weight .* after 100000 "):
        posthoc.weights([1, 2], [7.0, 7.0], 100000, 100.0)


def test_two_tracks_give_the_average_of_a_third_length():
    student, steps, wanted = nn.Linear(4, 4), 400, 10.0
    gammas = (6.94, 16.97)
    teachers = [EMATeacher(student, decays.PowerFunction(g)) for g in (*gammas, wanted)]
    generator, snapshots = torch.Generator().manual_seed(0), []
    for step in range(steps):
        with torch.no_grad():
            student.weight += 0.1 * torch.randn(4, 4, generator=generator)
        for teacher in teachers:
            teacher.update()
        if (step + 1) % 20 == 0:
            for gamma, teacher in zip(gammas, teachers, strict=False):
                state = {n: t.clone() for n, t in teacher.state_dict().items()}
                snapshots.append(posthoc.Snapshot(step + 1, gamma, state))
    mixed = posthoc.average(snapshots, wanted)["weight"]
    direct = teachers[2].module.weight
    spread = (direct - snapshots[-1].state["weight"]).abs().max()
    assert (mixed - direct).abs().max() < 0.05 * spread


def test_complex_entries_are_averaged_and_what_is_no_tensor_is_that_of_the_last_snapshot():
    early, last = (
        posthoc.Snapshot(n, 7.0, {"w": torch.tensor([n * (1 + 2j)]), "_extra_state": {"of": n}})
        for n in (50, 100)
    )
    (a, b), mixed = posthoc.weights([50, 100], [7, 7], 80, 7), posthoc.average([early, last], 7, 80)
    torch.testing.assert_close(mixed["w"], a * early.state["w"] + b * last.state["w"])
    assert mixed["_extra_state"] == {"of": 100}


@pytest.mark.parametrize(("track", "wanted"), [(7.0, -0.5), (-0.6, 7.0), (7.0, float("nan"))])
def test_a_gamma_whose_profile_has_no_square_integral_is_refused(track, wanted):
    with pytest.raises(ValueError, match="^gamma: got"):
        posthoc.average([posthoc.Snapshot(4, track, {"w": torch.ones(1)})], wanted)


def test_a_track_whose_first_student_would_outweigh_all_others_is_refused():
    with pytest.raises(ValueError, match="^gamma: got -1, expected a number above -1"):
        decays.PowerFunction(-1)


@pytest.mark.parametrize("option", ["inv_gamma", "power"])
def test_an_inverse_power_that_does_not_rise_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}: got 0.0, expected a positive finite number"):
        decays.InversePower(0.9, **{option: 0.0})


@pytest.mark.parametrize("width", [0, 0.3, float("nan")])
def test_a_width_that_no_power_function_has_is_refused(width):
    with pytest.raises(ValueError, match="^sigma_rel: got"):
        posthoc.gamma_of(width)


def test_an_average_of_parameters_is_no_part_of_a_graph():
    states = [dict(nn.Linear(2, 2).named_parameters()) for _ in range(2)]
    snapshots = [posthoc.Snapshot(10 * i + 10, 3.0, state) for i, state in enumerate(states)]
    assert not posthoc.average(snapshots, 5.0)["weight"].requires_grad


def test_no_snapshots_are_refused():
    with pytest.raises(ValueError, match="^snapshots: got none"):
        posthoc.average([], 3.0)


@pytest.mark.parametrize(
    ("times", "end", "name"), [((0, 4), None, "snapshots"), ((4,), 0, "updates")]
)
def test_a_time_before_the_first_update_is_refused(times, end, name):
    snapshots = [posthoc.Snapshot(t, 7.0, {"w": torch.ones(1)}) for t in times]
    with pytest.raises(ValueError, match=f"^{name}: got one after 0 updates"):
        posthoc.average(snapshots, 3.0, end)


@pytest.mark.parametrize(
    ("first", "found"), [({}, "nowhere"), ({"w": torch.ones(1)}, r"in shape \(1\)")]
)
def test_snapshots_of_different_networks_are_refused_by_the_entry(first, found):
    snapshots = [posthoc.Snapshot(t, 7.0, s) for t, s in ((4, first), (8, {"w": torch.ones(2)}))]
    named = rf"^snapshots: the one after 4 updates has 'w' {found}, expected \(2\) as in the last"
    with pytest.raises(ValueError, match=named):
        posthoc.average(snapshots, 3.0)
