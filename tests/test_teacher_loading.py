"""What a state dict that comes from elsewhere does to a teacher: names, ties, counts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from followed import Net, assert_same, follow
from torch import nn

from fastmt import EMATeacher
from fastmt.teacher import update_together


class Tied(nn.Module):
    """A language model's head: one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture(params=[Net, Tied])
def network(request):
    torch.manual_seed(0)
    return request.param


def averaged(network: nn.Module) -> EMATeacher:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return EMATeacher(network)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("saved", ["teacher", "network"])
def test_safetensors_saves_and_loads_a_model_with_tied_parameters(network, tmp_path, held, saved):
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = averaged(network()), averaged(network())
    source = first if saved == "teacher" else first.module
    if held:
        source, target = nn.ModuleDict({"t": source}), nn.ModuleDict({"t": second})
    else:
        target = second
    safetensors.save_model(source, tmp_path / "model.safetensors")
    missing, unexpected = safetensors.load_model(target, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert_same(second.module, first.module)


class Wrapper(nn.Module):
    """With a child called module, as wrappers have, and entries of its own beside the child's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("n_averaged", torch.tensor(7))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("wrapped", [lambda network: network, nn.DataParallel, torch.compile])
def test_a_child_called_module_is_told_from_what_wrappers_add_to_names(held, wrapped):
    first, second = averaged(Wrapper()), averaged(Wrapper())
    source, target = wrapped(first.module), second
    if held:
        source, target = nn.ModuleDict({"t": source}), nn.ModuleDict({"t": target})
    target.load_state_dict(source.state_dict())
    assert_same(second.module, first.module)


def test_the_version_of_a_child_called_module_is_not_taken_for_its_parents():
    teacher, seen = EMATeacher(Wrapper()), {}
    for name, module in teacher.module.named_modules():
        look = module._register_load_state_dict_pre_hook
        look(lambda state, prefix, told, *_, name=name: seen.update({name: told.get("version")}))
    teacher.load_state_dict(Wrapper().state_dict())
    assert seen == {"": 1, "module": 2}


@pytest.mark.parametrize("prefix", ["", "t."])
def test_entries_that_fail_are_named_as_the_plain_network_names_them(prefix):
    teacher = EMATeacher(Net())
    target = nn.ModuleDict({"t": teacher}) if prefix else teacher
    state = {prefix + name: entry for name, entry in Net().state_dict().items()}
    state[f"{prefix}other"] = state.pop(f"{prefix}first.bias")
    failed = target.load_state_dict(state, strict=False)
    assert failed.missing_keys == [f"{prefix}first.bias"]
    assert failed.unexpected_keys == [f"{prefix}other"]
    with pytest.raises(RuntimeError, match=f'Missing key.* "{prefix}first.bias"'):
        target.load_state_dict(state)


def test_what_is_no_state_or_no_progress_is_named_and_changes_nothing(network):
    student = network()
    teacher = EMATeacher(student)
    teacher.update()
    with pytest.raises(TypeError, match="state_dict .*NoneType"):
        teacher.load_state_dict(None)
    wrong = {"NoneType, expected a mapping": None, "no 'calls'": {}, "no 'updates'": {"calls": 7}}
    for message, progress in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^progress: got {message}"):
            teacher.load_progress(progress)
    assert (teacher.calls, teacher.updates) == (1, 1)


def test_what_is_assigned_is_tied_as_before(network):
    student = network()
    first, second = EMATeacher(student, 0.9), EMATeacher(network(), 0.9)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state, assign=True)
    assert len(list(second.parameters())) == len(list(first.parameters()))
    second.load_progress(first.progress())
    for teacher in (first, second):
        teacher.update(student=student)
    assert_same(second.module, first.module)
    assert_same(pickle.loads(pickle.dumps(second)).module, first.module)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_of_tied_names_the_one_that_was_assigned_counts(name):
    teacher = EMATeacher(Tied())
    teacher.load_state_dict({name: torch.ones(5, 4)}, strict=False, assign=True)
    assert teacher.module.head.weight is teacher.module.embedding.weight
    assert (teacher.module.head.weight == 1).all()


class Renamed(nn.Module):
    """Takes checkpoints of a former version, in which its layer had another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace("old.", "layer.")] = state.pop(name)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "rounding": "kahan"}])
def test_what_an_assigned_state_ties_by_storage_is_averaged_once_until_it_is_untied(options):
    student = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    student[1].weight.data = student[0].weight.data.fill_(1.0)
    tied, other = (EMATeacher(student, 0.5, warmup=None, **options) for _ in range(2))
    entry = tied.module[0].weight.detach().clone()
    tied.load_state_dict({"0.weight": entry, "1.weight": entry.view(3, 3)}, assign=True)
    student[0].weight.data.fill_(3.0)
    update_together([tied, other])
    for teacher in (tied, other):
        assert all((layer.weight == 2).all() for layer in teacher.module)
    tied.module[1].weight.data = tied.module[1].weight.data.clone()
    update_together([tied, other])
    for teacher in (tied, other):
        assert all((layer.weight == 2.5).all() for layer in teacher.module)


def test_an_average_that_a_hook_of_the_network_renames_stays():
    student = Renamed()
    teacher = EMATeacher(student)
    ones = torch.ones(2, 2)
    teacher.load_state_dict({"old.weight": ones, "old.bias": torch.ones(2)})
    teacher.update()
    torch.testing.assert_close(teacher.module.layer.weight, ones, atol=0.01, rtol=0)


def test_a_load_that_brings_no_parameter_begins_no_average():
    student = Net()
    teacher = EMATeacher(student)
    teacher.load_state_dict({"other": torch.ones(1)}, strict=False)
    assert teacher.updates == 0
    follow(teacher, student, 1)
    assert_same(teacher.module, student)
