"""Which tensors a teacher follows, and what it says of those that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmt import EMATeacher, backend, ema_update_
from fastmt.teacher import update_together

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantize|Sparse).*")
UNUSUAL = {
    "torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "torch.qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.fixture(params=["auto", "eager"], autouse=True)
def backends(request):
    with backend(request.param):
        yield


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    student = nn.Linear(3, 2)
    student.register_buffer("extra", buffer)
    return student


@torch.no_grad()
def assert_follows(teacher: EMATeacher, student: nn.Module) -> None:
    teacher.update()
    student.weight.fill_(3.0)
    expected = teacher.module.weight.lerp(student.weight, 1 - teacher.current_decay())
    teacher.update()
    torch.testing.assert_close(teacher.module.weight, expected)


def test_a_network_without_memory_is_named_as_such_and_followed_once_it_has_some():
    with torch.device("meta"):
        student = nn.Linear(3, 2)
    teacher = EMATeacher(student)
    with pytest.raises(ValueError, match="student: 'weight' is on the meta device"):
        teacher.update()
    student.to_empty(device="cpu")
    with pytest.raises(ValueError, match="teacher: 'weight' is on the meta device"):
        teacher.update()
    teacher.to_empty(device="cpu")
    for network in (student, teacher.module):
        network.reset_parameters()
    assert_follows(teacher, student)


@pytest.mark.parametrize(
    "lazy", [lambda: nn.LazyLinear(2), lambda: nn.LazyBatchNorm1d(affine=False)]
)
def test_a_student_that_has_no_shapes_yet_is_named_as_such_and_followed_once_it_has(lazy):
    student = nn.Sequential(lazy())
    with pytest.raises(ValueError, match="^student: '0..*' has no shape yet, expected .* batch"):
        EMATeacher(student)
    student(torch.randn(4, 3))
    EMATeacher(student).update()


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_buffer_that_is_not_dense_is_named_and_left_alone_where_buffers_are_kept(kind):
    student = with_buffer(UNUSUAL[kind]())
    teacher = EMATeacher(student)
    with pytest.raises(TypeError, match=f"student: 'extra' is {kind}.*buffers='keep'"):
        teacher.update()
    assert_follows(EMATeacher(student, buffers="keep"), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 1])
def test_memory_that_a_student_shares_after_updates_is_refused(dtype, place):
    student = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)).to(dtype)
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.update()
    student[1].weight.data = teacher.module[place].weight.data
    for _ in range(2):
        with pytest.raises(ValueError, match="^student: '1.weight' shares storage"):
            teacher.update()


@pytest.mark.parametrize("kept_too", [False, True])
def test_a_tensor_that_was_empty_is_followed_or_named_once_it_is_not(kept_too):
    student = with_buffer(torch.zeros(0))
    student.later = nn.Parameter(torch.zeros(2, 0))
    teacher, kept = EMATeacher(student), EMATeacher(student, buffers="keep")
    teachers = [teacher, kept] if kept_too else [teacher]
    update_together(teachers)
    student.later.data = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^student: 'later' has shape \(2, 3\)"):
        update_together(teachers)
    for each in teachers:
        each.module.later.data = torch.zeros(2, 3)
    update_together(teachers)
    student.extra.resize_(2).fill_(3)
    with pytest.raises(ValueError, match=r"^student: 'extra' has shape \(2\), the teacher \(0\)"):
        update_together(teachers)
    teacher.module.extra.resize_(2)
    update_together(teachers)
    assert (teacher.module.extra == 3).all() and teacher.module.later.all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
@pytest.mark.parametrize("finite", [None, True, False])
def test_what_has_no_average_is_copied_also_where_it_is_a_parameter(dtype, finite, monkeypatch):
    monkeypatch.setattr("fastmt.teacher_update._is_on_host", lambda finite: False)
    student = with_buffer(torch.ones(3).to(dtype))
    student.frozen = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    teacher = EMATeacher(student, 0.5, warmup=None, buffers="ema")
    expected = teacher.module.weight.detach() + (0 if finite is False else 1)
    with torch.no_grad():
        student.weight.add_(2)
    student.extra = student.frozen.data = torch.full((3,), 3.0).to(dtype)
    teacher.update(finite=None if finite is None else torch.tensor(finite))
    torch.testing.assert_close(teacher.module.weight, expected, check_dtype=False)
    for average in (teacher.module.extra, teacher.module.frozen):
        assert average.dtype == dtype
        assert (average.float() == (1.0 if finite is False else 3.0)).all()
    with teacher.swapped():
        assert torch.equal(student.frozen.float(), teacher.module.frozen.float())


def test_a_buffer_that_is_conjugated_when_it_is_read_is_followed():
    student = with_buffer(torch.tensor([1 + 2j, 3 - 1j]).conj())
    teacher = EMATeacher(student)
    for _ in range(2):
        student.extra.mul_(2)
        teacher.update()
        assert torch.equal(teacher.module.extra, student.extra)


def made_of_two() -> nn.Module:
    """With a parameter of a subclass that has no memory of its own, as torchao's."""
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    student[0].weight = nn.Parameter(two.TwoTensor(torch.ones(4, 3), torch.full((4, 3), 5.0)))
    return student


def test_a_parameter_that_is_made_of_other_tensors_is_averaged():
    student, other = made_of_two(), made_of_two()
    teacher = EMATeacher(student, 0.5, warmup=None)
    with torch.no_grad():
        student[0].weight.add_(4)
    teacher.update()
    average = teacher.module[0].weight
    assert (average.a == 3).all() and (average.b == 7).all()
    with teacher.swapped():
        assert (student[0].weight.b == 7).all()
    assert (student[0].weight.b == 9).all()
    other.load_state_dict(teacher.state_dict())
    assert (other[0].weight.a == 3).all()
    ema_update_([average], [student[0].weight], 0.5)
    assert (average.a == 4).all() and (average.b == 8).all()
    teacher.module[0].weight = student[0].weight
    with pytest.raises(ValueError, match="^student: '0.weight' shares storage"):
        teacher.update()


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr])
def test_a_sparse_parameter_is_named(sparse):
    student = nn.Linear(3, 2)
    student.extra = nn.Parameter(sparse(torch.eye(3)))
    with pytest.raises(
        TypeError, match="cannot be copied .*; 'extra' is torch.sparse_.*, expected"
    ):
        EMATeacher(student)


def add_cache(student: nn.Module) -> None:
    student.register_buffer("cache", torch.ones(4))


def drop(student: nn.Module) -> None:
    del student.extra


def resize(student: nn.Module) -> None:
    student.extra = torch.ones(5)


def retype(student: nn.Module) -> None:
    student.extra = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize("change", [add_cache, drop, resize, retype])
def test_a_student_may_make_buffers_of_its_own_where_buffers_are_kept(change):
    student = with_buffer(torch.zeros(3))
    student.register_buffer("both", torch.zeros(1))
    teacher = EMATeacher(student, buffers="keep")
    change(student)
    student.both.fill_(1.0)
    own = {name: buffer.clone() for name, buffer in student.named_buffers()}
    assert_follows(teacher, student)
    with teacher.swapped():
        assert student.both == 0
        assert torch.equal(student.weight, teacher.module.weight)
        others = [name for name in own if name != "both"]
        assert all(torch.equal(student.get_buffer(name), own[name]) for name in others)
    assert all(torch.equal(student.get_buffer(name), own[name]) for name in own)
    teacher.copy_to(student)
    assert student.both == 0


@pytest.mark.parametrize("is_kept_first", [True, False])
@pytest.mark.parametrize("change", [add_cache, drop, resize, retype])
def test_kept_buffers_need_not_match_beside_a_teacher_that_copies(change, is_kept_first):
    student = with_buffer(torch.zeros(3))
    kept = EMATeacher(student, buffers="keep")
    change(student)
    student.register_buffer("both", torch.zeros(2))
    copying = EMATeacher(student)
    student.both.fill_(2.0)
    own = [(name, buffer.clone()) for name, buffer in kept.module.named_buffers()]
    update_together([kept, copying] if is_kept_first else [copying, kept])
    assert_follows(kept, student)
    assert (copying.module.both == 2).all() and kept.updates == 3
    for name, buffer in own:
        assert torch.equal(kept.module.get_buffer(name), buffer)


def test_a_buffer_that_is_left_alone_may_grow_in_swapped():
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student, buffers="keep")
    add_cache(student)
    with teacher.swapped():
        student.cache = torch.ones(8)
    assert len(student.cache) == 8


def test_swapped_and_copy_to_write_buffers_whose_elements_are_one_place_in_memory():
    student = with_buffer(torch.zeros(2, 1).expand(2, 3))
    teacher = EMATeacher(student, 0.5, warmup=None)
    student.extra = torch.tensor([[2.0], [4.0]]).expand(2, 3)
    with teacher.swapped():
        assert (student.extra == 0).all()
    assert torch.equal(student.extra, torch.tensor([[2.0], [4.0]]).expand(2, 3))
    teacher.copy_to(student)
    assert (student.extra == 0).all()


def test_an_average_is_not_lost_to_a_network_without_memory():
    teacher = EMATeacher(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="^network: 'weight' is on the meta device"):
        teacher.copy_to(nn.Linear(3, 2, device="meta"))


@pytest.mark.parametrize("rule", ["copy", "ema", "keep"])
def test_a_parameter_that_is_a_buffer_as_well_is_averaged_once(rule):
    student = nn.Linear(3, 2)
    student.register_buffer("again", student.weight)
    teacher = EMATeacher(student, buffers=rule)
    assert_follows(teacher, student)
    assert teacher.module.again is teacher.module.weight
