"""The trainer on several processes: replicas stay replicas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_teacher_distributed import pytestmark, run, started  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Net, make_batch

from fastmt.trainer import MeanTeacher


def mean_over_labelled(logits, labels):
    """As nn.CrossEntropyLoss: NaN with a gradient of 0 where no pixel has a label."""
    logits = nn.functional.interpolate(logits, labels.shape[1:])
    return nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)


def two_ranks(rank: int, folder: str) -> None:
    started(rank, 2, folder, "two")
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = MeanTeacher(student, optimizer, supervised=mean_over_labelled, seed=rank)
    for step in range(3):
        source, labels, target = make_batch(3 * rank + step)
        if (rank, step) == (0, 1):
            labels.fill_(255)
        report = trainer.step(source, labels, target)
    networks = [list(network.parameters()) for network in (student, trainer.teacher)]
    torch.save((report.item("skipped"), networks), f"{folder}/rank{rank}.pt")

    sharded = Net(norm=False)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    try:
        MeanTeacher(sharded, torch.optim.SGD(sharded.parameters()))
    except ValueError as error:
        torch.save(str(error), f"{folder}/sharded{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    made = str(tmp_path_factory.mktemp("ranks"))
    run(two_ranks, 2, made)
    return made


def test_a_step_that_one_process_leaves_out_every_process_leaves_out(folder):
    left, right = (torch.load(f"{folder}/rank{rank}.pt") for rank in range(2))
    assert left[0] == right[0] == 1
    for first, second in zip(left[1], right[1], strict=True):
        assert all(map(torch.equal, first, second))


def test_a_sharded_student_is_refused_before_the_first_step(folder):
    for rank in range(2):
        message = torch.load(f"{folder}/sharded{rank}.pt")
        assert message.startswith("student: got sharded parameters (DTensor), expected whole ones")
