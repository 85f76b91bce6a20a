"""What can be done with a teacher: run, swap, save, copy, wrap, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from followed import Net, NoHostReads, advance, assert_same, follow
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from fastmt import EMATeacher, backend, teacher_network


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def test_forward_is_that_of_the_averaged_network_without_gradient(student):
    teacher = EMATeacher(student)
    x = torch.randn(5, 3, requires_grad=True)
    assert not teacher(x).requires_grad
    assert torch.equal(teacher(x), student.eval()(x))


def test_swapped_gives_the_student_the_teachers_weights_and_back_also_after_an_error(student):
    teacher = EMATeacher(student)
    advance(student, 0)
    own = copy.deepcopy(student)
    with teacher.swapped():
        assert_same(student, teacher.module)
    assert_same(student, own)
    with pytest.raises(KeyError, match="inside"), teacher.swapped():
        raise KeyError("inside")
    assert_same(student, own)
    assert student.tied is student.last.weight


def test_swapped_puts_back_what_it_can_where_entries_came_went_or_changed_size_inside(student):
    teacher = EMATeacher(student)
    advance(student, 0)
    own = copy.deepcopy(student)
    with teacher.swapped():
        student.register_buffer("cache", torch.ones(2), persistent=False)
    assert_same(student, own)
    del student.cache
    named = pytest.raises(ValueError, match="^student: 'first.bias' was removed or resized")
    with named, teacher.swapped():
        student.first.bias = nn.Parameter(torch.zeros(5))
    student.first.bias = own.first.bias
    assert_same(student, own)


def test_threads_that_swap_one_student_take_turns_or_are_refused(student, monkeypatch):
    teacher, own = EMATeacher(student), copy.deepcopy(student)
    teacher.module.first.weight.zero_()
    look = teacher_network._entries
    monkeypatch.setattr(teacher_network, "_entries", lambda net: time.sleep(1e-3) or look(net))

    def swap(_: int) -> None:
        with contextlib.suppress(RuntimeError), teacher.swapped():
            assert not student.first.weight.any()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(swap, range(50)))
    assert_same(student, own)


def test_copy_to_writes_the_average_into_any_network(student):
    teacher, other = EMATeacher(student), Net()
    teacher.copy_to(other)
    assert_same(other, student)


def test_the_state_dict_loads_into_the_plain_network_and_back(student):
    teacher = EMATeacher(student)
    follow(teacher, student, 2)
    plain = Net()
    plain.load_state_dict(teacher.state_dict())
    assert_same(plain, teacher.module)
    other = EMATeacher(Net())
    other.load_state_dict(plain.state_dict())
    assert_same(other.module, teacher.module)


class Compiled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._orig_mod = network


def test_a_network_that_holds_a_teacher_saves_and_loads(student):
    holder = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    state = copy.deepcopy(holder.state_dict())
    advance(holder["teacher"].module, 5)
    holder.load_state_dict(state)
    assert_same(holder["teacher"].module, student)


class Versioned(nn.Linear):
    """Refuses a state dict that does not tell its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


@pytest.mark.parametrize("student", [Versioned(2, 2), nn.Sequential(Versioned(2, 2))])
def test_the_versions_of_modules_are_loaded_with_them(student):
    teacher = EMATeacher(student)
    holder = nn.ModuleDict({"student": student, "teacher": teacher})
    holder.load_state_dict(holder.state_dict())
    for source in (teacher, student, AveragedModel(student), Compiled(student)):
        teacher.load_state_dict(source.state_dict())
    student.load_state_dict(teacher.state_dict())


def test_the_student_is_no_part_of_the_teacher_and_is_not_kept_alive():
    student = Net()
    teacher = EMATeacher(student)
    assert len(list(teacher.parameters())) == len(list(student.parameters()))
    del student
    gc.collect()
    with pytest.raises(ValueError, match="^student: the student of this teacher is gone"):
        teacher.update()
    teacher.update(student=Net())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_teacher_continues_the_average_with_a_student_given(student, clone):
    teacher = EMATeacher(student, decay=0.9)
    follow(teacher, student, 2)
    twin = clone(teacher)
    assert_same(twin.module, teacher.module)
    advance(student, 9)
    teacher.update()
    twin.update(student=student)
    assert_same(twin.module, teacher.module)
    assert twin.current_decay() == teacher.current_decay()


def test_a_compiled_teacher_is_pickled_as_any_module(student):
    teacher = EMATeacher(student)
    teacher.compile(backend="eager")
    assert_same(pickle.loads(pickle.dumps(teacher)).module, teacher.module)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        Compiled,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.DataParallel(Compiled(net)),
    ],
)
def test_wrappers_of_the_student_are_looked_through(student, wrap):
    wrapped = wrap(student)
    teacher = EMATeacher(wrapped)
    assert type(teacher.module) is Net
    advance(student, 0)
    teacher.update()
    assert_same(teacher.module, student)
    teacher.update(student=student)
    with teacher.swapped(wrapped):
        assert_same(student, teacher.module)


def test_parameters_that_appear_vanish_or_change_size_are_named(student):
    teacher = EMATeacher(student)
    student.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="^student: 'extra' is missing in the teacher"):
        teacher.update()
    del student.extra
    student.first.bias = None
    with pytest.raises(ValueError, match="^student: 'first.bias' is missing in the student"):
        teacher.update()
    student.first.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"^student: 'first.bias' has shape \(5\), the teacher"):
        teacher.update()


def test_copies_name_the_network_that_lacks_an_entry(student):
    teacher = EMATeacher(student)
    student.later, student.extra = nn.Linear(1, 1), nn.Linear(1, 1)
    for copies in (teacher.update, lambda: teacher.copy_to(student), teacher.swapped().__enter__):
        with pytest.raises(ValueError, match="^student: 'later.weight' is missing in the teacher"):
            copies()


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("remake", [nn.utils.weight_norm, nn.utils.spectral_norm, pruned])
def test_a_student_that_cannot_be_copied_is_refused_with_the_remedy_that_fits(remake):
    student = remake(nn.Linear(2, 2))
    student(torch.zeros(1, 2))
    remedy = "cannot be copied .* old weight_norm do; after a forward under torch.no_grad"
    with pytest.raises(TypeError, match=remedy) as refusal:
        EMATeacher(student)
    assert "shard" not in str(refusal.value)
    with torch.no_grad():
        student(torch.zeros(1, 2))
    teacher = EMATeacher(student, 0.5, warmup=None)
    with torch.no_grad():
        student.bias.add_(2)
    teacher.update()
    torch.testing.assert_close(teacher.module.bias, student.bias - 1)
    with teacher.swapped():
        assert torch.equal(student.eval()(torch.ones(1, 2)), teacher(torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "^decay: got 1.0"),
        ({"decay": -0.1}, "^decay: got -0.1"),
        ({"decay": "0.99"}, "^decay: got '0.99', expected a number"),
        ({"half_life": 0}, "^half_life: got 0"),
        ({"half_life": 1e30}, "^half_life: got 1e.30, expected less"),
        ({"half_life": 5, "decay": 0.9}, "^decay: got 0.9 beside half_life"),
        ({"half_life": 5, "images_per_step": 0}, "^images_per_step: got 0"),
        ({"half_life": 5, "images_per_step": -8}, "^images_per_step: got -8"),
        ({"images_per_step": 8}, "^images_per_step: got 8 without half_life"),
        ({"warmup": "linear"}, "^warmup: got 'linear'"),
        ({"buffers": "mean"}, "^buffers: got 'mean'"),
        ({"update_every": 0}, "^update_every: got 0, expected at least 1"),
        ({"start": -1}, "^start: got -1, expected at least 0"),
        ({"start": 2.5}, "^start: got 2.5, expected an integer"),
        ({"update_every": 1.5}, "^update_every: got 1.5, expected an integer"),
        ({"update_every": None}, "^update_every: got None, expected an integer"),
        ({"seed": None}, "^seed: got None, expected an integer"),
        ({"dtype": torch.bfloat16}, "^dtype: got torch.bfloat16"),
        ({"dtype": torch.int64}, "^dtype: got torch.int64"),
    ],
)
def test_options_out_of_range_are_named(student, options, message):
    with pytest.raises(ValueError, match=message):
        EMATeacher(student, **options)


def test_what_is_no_module_is_named(student):
    for wrong in (None, student.parameters()):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^student: got {kind}, expected a torch.nn.Module"):
            EMATeacher(wrong)
        with pytest.raises(TypeError, match=f"^network: got {kind}, expected a torch.nn.Module"):
            EMATeacher(student).copy_to(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"finite": True}, "^finite: got bool, expected a 0-dim bool tensor"),
        ({"finite": torch.ones(2, dtype=torch.bool)}, r"^finite: got torch.bool of shape \(2\)"),
        ({"finite": torch.tensor(1.0)}, r"^finite: got torch.float32 of shape \(\)"),
        ({"decay": 0.5}, "^decay: got float, expected a 0-dim float64 tensor"),
        ({"decay": torch.tensor([0.5, 0.5]).double()}, r"^decay: got torch.float64 of shape \(2\)"),
    ],
)
def test_what_is_no_scalar_on_the_device_is_named_and_nothing_changes(student, given, message):
    teacher = EMATeacher(student)
    before = copy.deepcopy(teacher.module)
    advance(student, 0)
    with pytest.raises(TypeError, match=message):
        teacher.update(**given)
    assert_same(teacher.module, before)
    assert teacher.calls == 0


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": 0.8, "warmup": None, "update_every": 3, "start": 2},
        {"decay": 0.9, "dtype": torch.bfloat16, "rounding": "stochastic"},
        {"decay": 0.9, "dtype": torch.float16, "rounding": "kahan"},
        {"decay": 0.9, "buffers": "ema"},
    ],
)
def test_the_devices_half_of_an_update_replayed_after_advance_keeps_the_schedule(
    student, monkeypatch, options
):
    expected, teacher = EMATeacher(student, **options), EMATeacher(student, **options)
    for seed in range(8):
        advance(student, seed)
        with backend("eager"):
            expected.update()
            teacher.advance()
            with monkeypatch.context() as patch, NoHostReads():
                patch.setattr("fastmt.teacher_update.is_capturing", lambda: True)
                teacher.update()  # what a graph would hold, and do again
    assert_same(teacher.module, expected.module)
    assert (teacher.calls, teacher.updates) == (expected.calls, expected.updates)


def test_capture_without_a_decay_on_the_device_is_refused(student, monkeypatch):
    teacher = EMATeacher(student)
    monkeypatch.setattr("fastmt.teacher_update.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^update: the first one cannot be captured; call adv"):
        teacher.update()
