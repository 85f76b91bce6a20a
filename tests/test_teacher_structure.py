"""Whatever a student or a teacher exchanges between two updates is noticed, by each way to look."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from followed import Net, advance
from torch import nn

from fastmt import EMATeacher, backends, cpp_backend, matching, native

needs_kernels = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="calls the C++ library"
)


@pytest.fixture(
    params=[
        pytest.param("C++", marks=needs_kernels),
        pytest.param("dictionaries by Python", marks=needs_kernels),
        "no extension",
    ],
    autouse=True,
)
def looked_at(request, monkeypatch):
    if request.param == "dictionaries by Python":  # as in a Python without its lock
        monkeypatch.setattr(native, "dictionaries_hold", lambda: None)
    if request.param == "no extension":
        monkeypatch.setattr(cpp_backend, "missing", lambda: "no compiler")
    with backends.backend("eager" if request.param == "no extension" else "auto"):
        yield request.param


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def fresh() -> nn.Parameter:
    return nn.Parameter(torch.full((4,), 7.0))


def replace_parameter(net: Net) -> None:
    net.first.bias = fresh()


def write_dictionary(net: Net) -> None:
    net.first._parameters["bias"] = fresh()


def reorder(net: Net) -> None:
    net.first._parameters["weight"] = net.first._parameters.pop("weight")
    net.first.bias = fresh()


def replace_module(net: Net) -> None:
    net.first = nn.Linear(3, 4)


def initialise_module_again(net: Net) -> None:
    net.first.__init__(3, 4)


def replace_nested_modules(net: Net) -> None:
    net._modules.update(Net()._modules)
    net.tied = net.last.weight


def replace_buffer(net: Net) -> None:
    net.norm.running_mean = torch.full((4,), 7.0)


def assign_state(net: Net) -> None:
    net.load_state_dict(Net().state_dict(), assign=True)
    net.tied = net.last.weight


def assign_data(net: Net) -> None:
    net.first.bias.data = torch.full((4,), 7.0)


@torch.no_grad()
def set_storage(net: Net) -> None:
    net.first.bias.set_(torch.full((4,), 7.0))


@torch.no_grad()
def free_and_allocate(net: Net) -> None:
    storage = net.first.bias.untyped_storage()
    held = storage.nbytes()
    storage.resize_(0)
    storage.resize_(held)
    net.first.bias.fill_(7)


def convert(net: Net) -> None:
    net.to(torch.bfloat16)


def change_memory_order(net: Net) -> None:
    net.last.weight.data = net.last.weight.data.t().contiguous().t()


CHANGES = (
    replace_parameter,
    write_dictionary,
    reorder,
    replace_module,
    initialise_module_again,
    replace_nested_modules,
    replace_buffer,
    assign_state,
    assign_data,
    set_storage,
    free_and_allocate,
    convert,
    change_memory_order,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("whose", ["student's", "teacher's"])
def test_what_is_exchanged_is_followed_from_the_next_update_on(student, change, whose):
    if whose == "teacher's" and change is convert:
        pytest.skip("a teacher in half precision is refused")
    teacher = EMATeacher(student, 0.0, warmup=None)
    teacher.update()
    change(student if whose == "student's" else teacher.module)
    for seed in range(2):
        advance(student, seed)
        teacher.update()
        assert_same_values(teacher.module, student)


def test_another_network_in_the_place_of_the_teachers_is_the_one_that_is_averaged(student):
    teacher = EMATeacher(student, 0.0, warmup=None)
    teacher.update()
    teacher.module = copy.deepcopy(teacher.module)
    advance(student, 0)
    teacher.update()
    assert_same_values(teacher.module, student)


def test_no_teacher_averages_a_network_of_which_a_part_carries_a_teachers_weights(student):
    whole, part = EMATeacher(student, 0.5), EMATeacher(student.first)
    advance(student, 0)
    for swapping, other in ((whole, part), (part, whole)):
        with swapping.swapped(), pytest.raises(RuntimeError, match="^update: the student carries"):
            other.update()
        with swapping.swapped():
            EMATeacher(Net()).update(student=Net())
    whole.update()
    assert_same_values(whole.module, student)


def assert_same_values(left: nn.Module, right: nn.Module) -> None:
    expected = right.state_dict()
    for name, average in left.state_dict().items():
        assert torch.equal(average, expected[name].to(average.dtype)), name


def add_parameter(net: Net) -> None:
    net.first.scale = nn.Parameter(torch.ones(1))


def add_module(net: Net) -> None:
    net.norm.adapter = nn.Linear(1, 1, bias=False)


def delete_parameter(net: Net) -> None:
    del net.first.bias


def delete_buffer(net: Net) -> None:
    del net.flag


@torch.no_grad()
def resize(net: Net) -> None:
    net.first.bias.requires_grad_(False).resize_(3)


@torch.no_grad()
def transpose(net: Net) -> None:
    net.first.weight.t_()


MISFITS = {
    add_parameter: "'first.scale' is missing in the teacher",
    add_module: "'norm.adapter.weight' is missing in the teacher",
    delete_parameter: "'first.bias' is missing in the student",
    delete_buffer: "'flag' is missing in the student",
    resize: r"'first.bias' has shape \(3\), the teacher \(4\)",
    transpose: r"'first.weight' has shape \(3, 4\), the teacher \(4, 3\)",
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda change: change.__name__)
def test_what_fits_no_more_is_named_and_nothing_is_averaged(student, change):
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.update()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    advance(student, 1)
    change(student)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^student: {MISFITS[change]}"):
            teacher.update()
    assert teacher.calls == 1
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_freed_storage_is_named_and_never_read(student):
    teacher = EMATeacher(student, 0.5, warmup=None)
    teacher.update()
    student.first.bias.untyped_storage().resize_(0)
    before = teacher.module.first.bias.clone()
    with pytest.raises(ValueError, match="^student: the storage of 'first.bias' was freed"):
        teacher.update()
    assert torch.equal(teacher.module.first.bias, before)


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_only_what_was_written_has_another_version(student, buffers):
    teacher = EMATeacher(student, 0.5, warmup=None, buffers=buffers)
    teacher.update()
    tensors = [*teacher.module.parameters(), *teacher.module.buffers()]
    before = [tensor._version for tensor in (*tensors, *student.parameters())]
    teacher.update()
    after = [tensor._version for tensor in (*tensors, *student.parameters())]
    kept = {id(tensor) for tensor in teacher.module.buffers()} if buffers == "keep" else set()
    written = [id(tensor) not in kept for tensor in tensors] + [False] * len(before[len(tensors) :])
    assert [new > old for new, old in zip(after, before, strict=True)] == written


def test_a_new_object_at_the_address_of_an_old_one_is_noticed():
    module = nn.Linear(2, 2)
    for _ in range(5):
        structure = matching.Structure([module])
        assert structure.holds()
        module.bias = None
        gc.collect()
        module.bias = nn.Parameter(torch.ones(2))
        assert not structure.holds()


@needs_kernels
def test_tensors_that_were_released_hold_no_more():
    assert not native.ema_holds()(0)
    assert not native.ema_run()(0, None, None)


@pytest.mark.parametrize("again", [copy.copy, lambda network: pickle.loads(pickle.dumps(network))])
def test_all_dictionaries_of_a_deep_tree_are_compared(again):
    network = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()) for _ in range(40)))
    network = again(network)  # unpickled attributes have names that are not interned
    structure = matching.Structure([network])
    for module in network.modules():
        for entries in (module._parameters, module._buffers, module._modules):
            entries["other"] = None
            assert not structure.holds()
            del entries["other"]
            assert structure.holds()
