"""The teacher on several processes: every rank alike, shards averaged locally, saved and loaded."""

from __future__ import annotations

import copy
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastmt import EMATeacher

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
STEPS, SECONDS = 50, 60


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def train(student: nn.Module, teacher: EMATeacher, steps: int, rank: int) -> None:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    teacher.attach(optimizer)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        student(torch.randn(8, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def started(rank: int, ranks: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=ranks
    )


def sharded_teacher(student: nn.Module, ranks: int) -> EMATeacher:
    teacher = EMATeacher(student, 0.9)
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(student, mesh=mesh)
    fully_shard(teacher.module, mesh=mesh)
    return teacher


def gathered(teacher: EMATeacher) -> dict[str, torch.Tensor]:
    state = teacher.state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def two_ranks(rank: int, folder: str) -> None:
    started(rank, 2, folder, "two")
    replicated = nn.parallel.DistributedDataParallel(network())
    teacher = EMATeacher(replicated, 0.9, buffers="keep")
    train(replicated, teacher, STEPS, rank)
    torch.save(teacher.state_dict(), f"{folder}/ddp{rank}.pt")

    student = network()
    teacher = sharded_teacher(student, 2)
    train(student, teacher, STEPS, 7)  # the same data on both: the gradient of one process
    with torch.no_grad():
        teacher.module(torch.zeros(2, 5))  # leaves the parameters gathered
    teacher.update()
    state = gathered(teacher)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/saved")
    if rank == 0:
        torch.save(state, f"{folder}/sharded.pt")

    student = network()
    teacher = EMATeacher(student)
    fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
    try:
        teacher.update()
    except ValueError as error:
        torch.save(str(error), f"{folder}/placed{rank}.pt")

    student = network()
    student[0].requires_grad_(False)
    teacher = sharded_teacher(student, 2)
    train(student, teacher, 2, 7)
    plan = teacher._plan
    train(student, teacher, 3, 8)  # each forward gathers the parameters
    torch.save((teacher._plan is plan, gathered(teacher)), f"{folder}/frozen{rank}.pt")
    narrow(rank, folder)
    forerunner(rank, folder)
    compensated(rank, folder)
    dist.destroy_process_group()


def narrow(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    student = nn.Linear(4, 4)
    teacher = EMATeacher(student)
    for sharded in (student, teacher.module):
        fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    teacher(torch.zeros(2, 4))  # leaves the parameters gathered, in bfloat16
    teacher.update()
    updates = teacher.updates
    state = get_model_state_dict(teacher)
    loaded = not any(set_model_state_dict(teacher, state))

    student = parallelize_module(nn.Linear(4, 4).bfloat16(), mesh, ColwiseParallel())
    dtypes = [
        {p.to_local().dtype for p in teacher.parameters()}
        for teacher in (EMATeacher(student), EMATeacher(student, dtype=torch.float64))
    ]
    torch.save((updates, list(state), loaded, dtypes), f"{folder}/narrow{rank}.pt")


def compensated(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    student = nn.Linear(5, 6)  # in equal shards, which could be taken for one another
    options = {"dtype": torch.bfloat16, "rounding": "kahan", "warmup": None}
    teachers = [EMATeacher(student, 0.9, **options) for _ in range(2)]
    for network in (student, *(teacher.module for teacher in teachers)):
        fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    train(student, teachers[0], 3, 7)
    saved, loaded = ({"now": t.state_dict(), "progress": t.progress()} for t in teachers)
    dcp.save(saved, checkpoint_id=f"{folder}/compensated")
    dcp.load(loaded, checkpoint_id=f"{folder}/compensated")
    teachers[1].load_state_dict(loaded["now"])
    teachers[1].load_progress(loaded["progress"])
    first, second = (teacher.compensation for teacher in teachers)
    same = first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    torch.save((any(t.any() for t in first.values()), same), f"{folder}/compensated{rank}.pt")


def forerunner(rank: int, folder: str) -> None:
    """By FullyShardedDataParallel, which has no DTensors."""
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    try:
        message = EMATeacher(FSDP(network(), **options)) and ""
    except TypeError as error:
        message = str(error)
    student = network()
    teacher = EMATeacher(student, 0.9)
    student, teacher.module = (FSDP(part, **options) for part in (student, teacher.module))
    train(student, teacher, STEPS, 7)
    teacher.update()
    with FSDP.summon_full_params(teacher.module):
        torch.save((message, list(teacher.module.parameters())), f"{folder}/forerunner{rank}.pt")
    torch.save(seen_of(student, teacher), f"{folder}/seen{rank}.pt")


@torch.no_grad()
def seen_of(student: nn.Module, teacher: EMATeacher) -> list[torch.Tensor]:
    """Outputs of the teacher before and after an update, the student before, in, after swapped."""
    student.eval()  # as the teacher is; each forward leaves the parameters gathered
    images = torch.ones(2, 5)
    seen = [teacher(images).clone()]
    teacher.update()
    seen += [teacher(images).clone(), student(images).clone()]
    with teacher.swapped(student):
        seen.append(student(images).clone())
    return [*seen, student(images).clone()]


def four_ranks(rank: int, folder: str) -> None:
    started(rank, 4, folder, "four")
    teacher = sharded_teacher(network(), 4)
    state = {"teacher": teacher.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/saved")
    teacher.load_state_dict(state["teacher"])
    state = gathered(teacher)
    if rank == 0:
        torch.save(state, f"{folder}/four.pt")
    dist.destroy_process_group()


# The imports take longer than the tests: a server makes them once, and forks.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "fastmt"]
)


def run(function, ranks: int, folder: str) -> None:
    context = mp.start_processes(
        function, args=(folder,), nprocs=ranks, join=False, start_method="forkserver"
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not context.join(timeout=1):  # returns early when one of the processes ends
            assert time.monotonic() < deadline, f"{function.__name__} took over {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    made = str(tmp_path_factory.mktemp("ranks"))
    run(two_ranks, 2, made)
    return made


def test_every_rank_of_ddp_holds_the_same_average_to_the_bit(folder):
    left, right = (torch.load(f"{folder}/ddp{rank}.pt") for rank in range(2))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not torch.equal(left["0.weight"], network()[0].weight)


def test_sharded_averages_gather_to_those_of_one_process(folder):
    student = network()
    teacher = EMATeacher(student, 0.9)
    train(student, teacher, STEPS, 7)
    teacher.update()
    sharded = torch.load(f"{folder}/sharded.pt")
    for name, expected in teacher.state_dict().items():
        torch.testing.assert_close(sharded[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_networks_under_the_forerunner_of_fully_shard_are_followed_where_wrapped_alike(
    folder, rank
):
    message, gathered = torch.load(f"{folder}/forerunner{rank}.pt")
    assert "make the teacher first, then shard student and teacher.module alike" in message
    student = network()
    teacher = EMATeacher(student, 0.9)
    train(student, teacher, STEPS, 7)
    teacher.update()
    for average, expected in zip(gathered, teacher.parameters(), strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_forerunner_has_gathered_is_not_taken_for_what_was_written_since(folder, rank):
    before, after, own, carried, own_again = torch.load(f"{folder}/seen{rank}.pt")
    assert not torch.equal(before, after)
    assert torch.equal(carried, after) and not torch.equal(carried, own)
    assert torch.equal(own_again, own)


def test_networks_that_are_not_sharded_alike_are_refused_by_name(folder):
    for rank in range(2):
        message = torch.load(f"{folder}/placed{rank}.pt")
        assert message.startswith("student: '0.weight' is placed as (Shard(dim=0),) on DeviceMesh")
        assert "the teacher as None" in message and "shard both networks alike" in message


@pytest.fixture(params=[0, 1])
def narrowed(folder, request) -> tuple:
    return torch.load(f"{folder}/narrow{request.param}.pt")


def test_what_a_mixed_precision_forward_gathered_is_not_taken_for_a_narrow_teacher(narrowed):
    assert narrowed[0] == 1


def test_the_state_dict_functions_of_distributed_checkpoints_read_and_load_a_teacher(narrowed):
    assert narrowed[1:3] == (["weight", "bias"], True)


def test_the_shards_of_a_teacher_have_the_dtype_that_it_tells(narrowed):
    assert narrowed[3] == [{torch.float32}, {torch.float64}]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_rounding_lost_of_each_shard_is_saved_and_loaded(folder, rank):
    assert torch.load(f"{folder}/compensated{rank}.pt") == (True, True)


def test_what_was_matched_under_fully_shard_is_kept_while_the_shards_are_the_same(folder):
    student = network()
    student[0].requires_grad_(False)
    teacher = EMATeacher(student, 0.9)
    train(student, teacher, 2, 7)
    train(student, teacher, 3, 8)
    for rank in range(2):
        kept, state = torch.load(f"{folder}/frozen{rank}.pt")
        assert kept
        for name, expected in teacher.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)


def test_saved_on_two_ranks_it_loads_on_one_and_on_four(folder):
    sharded = torch.load(f"{folder}/sharded.pt")
    teacher = EMATeacher(network(), 0.9)
    state = {"teacher": copy.copy(teacher.state_dict())}
    dcp.load(state, checkpoint_id=f"{folder}/saved", no_dist=True)
    teacher.load_state_dict(state["teacher"])
    assert all(torch.equal(t, sharded[n]) for n, t in teacher.state_dict().items())
    run(four_ranks, 4, folder)
    four = torch.load(f"{folder}/four.pt")
    assert all(torch.equal(four[name], sharded[name]) for name in sharded)
