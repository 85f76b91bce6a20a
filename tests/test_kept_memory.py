"""Memory of large results is used again, and never while anything still has it."""

import contextlib
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from operands import random_logits

import fastmt
from fastmt import cpp_backend, kept_memory

SHAPE = (1, 5, 512, 512)  # 5 MiB: above what the kernels take from PyTorch's allocator


@pytest.fixture(autouse=True)
def kernels_and_nothing_kept():
    if missing := cpp_backend.missing():
        pytest.skip(missing)
    kept_memory.release()
    with fastmt.backend("cpp", strict=True):
        yield
    kept_memory.release()


def gradient(seed=0):
    student = random_logits(SHAPE, seed).requires_grad_()
    fastmt.consistency_loss(student, random_logits(SHAPE, 9), threshold=0.5).backward()
    return student.grad


def test_memory_of_a_gradient_is_used_again_when_it_is_gone():
    first = gradient()
    address, value = first.data_ptr(), first.clone()
    del first
    again = gradient()
    assert again.data_ptr() == address
    assert torch.equal(again, value)


def test_gradients_that_are_held_keep_their_values():
    held = [gradient(seed) for seed in range(2 * kept_memory.MOST)]
    copies = [each.clone() for each in held]
    gradient(99)
    assert len({each.data_ptr() for each in held}) == len(held)
    assert all(torch.equal(each, copy) for each, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("keep", [lambda g: g.numpy(), lambda g: g[0, 1], lambda g: g.detach()])
def test_a_view_keeps_the_memory_of_its_gradient(keep):
    view = keep(gradient(1))
    copy = view.copy() if hasattr(view, "copy") else view.clone()
    gradient(2)
    gradient(3)
    assert (torch.as_tensor(view) == torch.as_tensor(copy)).all()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("keep", [lambda g: g.untyped_storage(), lambda g: g.storage()])
def test_a_storage_that_is_held_without_its_tensor_keeps_its_values(keep):
    storage = keep(gradient(1))
    gradient(2)
    gradient(3)
    assert torch.equal(torch.empty(0).set_(storage.untyped()).view(SHAPE), gradient(1))


def test_threads_get_memory_of_their_own():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(gradient, range(8)))
    for seed, result in enumerate(results):
        assert torch.equal(result, gradient(seed))


def test_two_threads_at_once_never_take_the_same_stretch(monkeypatch):
    gradient()
    meeting, count = threading.Barrier(2), kept_memory._use_count

    def count_together(storage):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.05)
        return count(storage)

    monkeypatch.setattr(kept_memory, "_use_count", count_together)
    like = torch.empty(SHAPE)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: torch.ops.fastmt.output_like(like), range(2)))
    assert outputs[0].data_ptr() != outputs[1].data_ptr()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, as the workers of a loader do")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_forked_while_a_thread_takes_memory_takes_its_own():
    take = partial(kept_memory.output_like, torch.empty(SHAPE))
    child = multiprocessing.get_context("fork").Process(target=take)
    with kept_memory._lock:
        child.start()
    child.join(20)
    waits = child.is_alive()
    child.kill()
    assert not waits


def test_memory_that_another_process_may_read_is_not_used_again():
    address = gradient().share_memory_().data_ptr()
    assert gradient().data_ptr() != address
    assert all(not storage.is_shared() for storage in kept_memory._kept)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return fastmt.perturb.gaussian_noise(torch.full(SHAPE, float(index)))


def test_batches_of_a_loaders_worker_keep_their_values():
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=None, num_workers=1)
    assert [round(batch.mean().item()) for batch in list(loader)] == list(range(6))


def test_the_few_last_stretches_are_kept_and_given_back_on_request():
    for channels in range(5, 5 + 2 * kept_memory.MOST):
        torch.ops.fastmt.output_like(torch.empty(1, channels, 512, 512))
    assert len(kept_memory._kept) == kept_memory.MOST
    kept_memory.release()
    assert not kept_memory._kept


def test_nothing_is_kept_when_it_is_turned_off(monkeypatch):
    monkeypatch.setenv("FASTMT_KEEP_MEMORY", "0")
    gradient()
    assert not kept_memory._kept


def test_a_kept_stretch_takes_the_layout_that_is_asked_for():
    like = torch.empty(1, 5, 512, 512)
    address = torch.ops.fastmt.output_like(like).data_ptr()
    other = like.to(memory_format=torch.channels_last)
    output = torch.ops.fastmt.output_like(other)
    assert output.data_ptr() == address
    assert output.stride() == other.stride() and output.shape == other.shape
