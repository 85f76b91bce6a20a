"""What only a GPU can show: right results there, no wait for it, graphs, repeatability."""

from __future__ import annotations

import pytest
import torch

import fastmt
from benchmarks import gpu_checks
from fastmt import selftest

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name", gpu_checks.trials())
def test_every_operation_is_the_reference_on_a_gpu_and_repeats_to_the_bit(name):
    build, dtypes = gpu_checks.trials()[name]
    for backend in gpu_checks.serving(build, GPU):
        for dtype in dtypes:
            gpu_checks.is_right(build, dtype, backend, GPU)


@pytest.mark.parametrize("check", gpu_checks.BEHAVIOUR, ids=lambda check: check.__name__)
def test_behaviour_on_a_gpu(check):
    check(GPU)


def test_kernels_serve_every_operation_on_a_gpu():
    for name, build in selftest.PLAIN.items():
        choice = build(GPU, torch.float32, selftest.Sizes()).choice()
        assert choice.backend != "eager", f"{name}: {choice.reason}"


def test_the_doctor_finds_the_gpu_well():
    report = fastmt.doctor(timing=False)
    assert report.ok, report
    assert "cuda:0" in report.devices


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_loss_is_the_eager_one_on_a_gpu(mode):
    torch.compiler.reset()
    sizes = selftest.Sizes()

    def objective(student, teacher, threshold, labels):
        consistency = fastmt.consistency_loss(student, teacher, threshold=threshold, size=sizes.out)
        return consistency + fastmt.cross_entropy(student, labels)

    student, [teacher] = selftest.consistency(GPU, torch.float32, sizes, upsampled=True).arguments
    labels = selftest.labelled(GPU, torch.float32, sizes).arguments[1]
    function = torch.compile(objective, fullgraph=True, mode=mode)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.compiler.config.patch(force_disable_caches=True),
    ):
        for limit in (0.3, 0.5, 0.7):
            threshold = torch.full((), limit, device=GPU)
            results = []
            for f in (function, objective):
                loss = f(student, teacher, threshold, labels)
                (gradient,) = torch.autograd.grad(loss, student)
                results.append((loss.detach().clone(), gradient.clone()))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_tensors_on_two_devices_are_refused_by_name():
    sizes = selftest.Sizes()
    student, [teacher] = selftest.consistency(GPU, torch.float32, sizes).arguments
    with pytest.raises(ValueError, match="^teacher: got a tensor on cpu, expected cuda:0"):
        fastmt.consistency_loss(student, teacher.cpu())
    labels = torch.zeros(sizes.batch, *sizes.out, dtype=torch.int64)
    with pytest.raises(ValueError, match="^labels: got a tensor on cpu, expected cuda:0"):
        fastmt.cross_entropy(student, labels)


@pytest.mark.parametrize(("size", "marked"), [(None, 400 * 400), ((64, 64), 1)])
def test_classes_that_lie_2_to_the_31_elements_apart_are_addressed(size, marked):
    if torch.cuda.mem_get_info(GPU)[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    side = 23_200  # the last of 5 classes begins at 4 * side**2 > 2^31
    logits = torch.zeros((1, 5, side, side), dtype=torch.bfloat16, device=GPU)
    logits[0, 4, -400:, -400:] = 8.0
    score, label = fastmt.softmax_confidence(logits, size=size)
    assert label.count_nonzero() == marked
    assert label[0, -1, -1] == 4
    assert score[0, -1, -1] > 0.99
    assert score[0, 0, 0].item() == pytest.approx(0.2)
