"""Which implementation answers, the stated reason, and what strict refuses."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from operands import random_logits
from torch._subclasses import FakeTensorMode

import fastmt
from fastmt import backends, cpp_backend

STUDENT, TEACHER = random_logits((2, 5, 6, 7), 1), random_logits((2, 5, 6, 7), 2)
LABELS = torch.zeros(2, 6, 7, dtype=torch.uint8)
CALLS = {
    "consistency_loss": (fastmt.consistency_loss, STUDENT, TEACHER),
    "cross_entropy": (fastmt.cross_entropy, STUDENT, LABELS),
    "softmax_confidence": (fastmt.softmax_confidence, TEACHER),
    "ema_update_": (fastmt.ema_update_, [torch.zeros(3)], [torch.ones(3)], 0.5),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
built = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)
pytestmark = pytest.mark.usefixtures("forgotten_warnings")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTMT_BACKEND", raising=False)


def doubled(argument):
    if isinstance(argument, list):
        return [doubled(item) for item in argument]
    return argument.double() if torch.is_tensor(argument) and argument is not LABELS else argument


@built
@each_call
def test_the_kernels_serve_plain_calls_and_say_so(call):
    name = cpp_backend.instruction_set()
    assert fastmt.explain(*call) == ("cpp", f"C++ kernels ({name}) serve this call")
    with fastmt.backend("cpp", strict=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        call[0](*call[1:])


@built
@each_call
def test_eager_is_what_was_asked_for_and_warns_of_nothing(call):
    with fastmt.backend("eager", strict=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastmt.explain(*call) == ("eager", "eager was asked for")
        call[0](*call[1:])


@built
@each_call
def test_float64_goes_to_the_reference_with_one_warning_and_strict_refuses(call):
    function, *arguments = call
    arguments = [doubled(argument) for argument in arguments]
    assert fastmt.explain(function, *arguments) == (
        "eager",
        "float64 is computed by the reference",
    )
    with pytest.warns(RuntimeWarning, match="falls back to eager PyTorch: float64"):
        function(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*arguments)
    with (
        fastmt.backend("cpp", strict=True),
        pytest.raises(RuntimeError, match=f"^{function.__name__}: backend 'cpp' cannot serve"),
    ):
        function(*arguments)


@pytest.mark.parametrize("scope", [{"__name__": "script"}, {}], ids=["a module", "exec"])
def test_the_warning_points_at_who_called(scope):
    code = compile("fastmt.softmax_confidence(logits)", "script.py", "exec")
    with pytest.warns(RuntimeWarning, match="float64") as caught:
        exec(code, {"fastmt": fastmt, "logits": torch.zeros(1, 3, 2, 2).double(), **scope})
    assert [warning.filename for warning in caught] == ["script.py"]


@built
def test_upsampling_is_served_in_2_d_and_before_the_kernels_in_3_d():
    assert fastmt.explain(fastmt.softmax_confidence, TEACHER, size=(12, 14)).backend == "cpp"
    volume = torch.zeros(1, 3, 4, 4, 4)
    calls = [
        (fastmt.softmax_confidence, {"size": (8, 8, 8)}, volume),
        (fastmt.consistency_loss, {"size": (8, 8, 8)}, volume, volume),
        (fastmt.cross_entropy, {}, volume, torch.zeros(1, 8, 8, 8, dtype=torch.uint8)),
    ]
    for function, options, *tensors in calls:
        assert fastmt.explain(function, *tensors, **options).backend == "cpp"


@built
def test_transforms_of_torch_func_are_a_stated_reason_and_taken_by_the_reference():
    def each_loss(student, teacher, labels):
        student = student.unsqueeze(0)
        agreement = fastmt.consistency_loss(student, teacher.unsqueeze(0), weight="none")
        return agreement + fastmt.cross_entropy(student, labels.unsqueeze(0))

    with pytest.warns(RuntimeWarning, match="falls back to eager PyTorch: torch.func"):
        gradients = torch.func.vmap(torch.func.grad(each_loss))(STUDENT, TEACHER, LABELS)
    student = STUDENT.clone().requires_grad_()
    sum(map(each_loss, student, TEACHER, LABELS)).backward()
    torch.testing.assert_close(gradients, student.grad)
    assert fastmt.explain(fastmt.cross_entropy, STUDENT, LABELS).backend == "cpp"


@pytest.mark.filterwarnings("ignore:.* falls back to eager PyTorch")
@pytest.mark.parametrize("loss", [fastmt.consistency_loss, fastmt.cross_entropy])
def test_fake_tensors_without_values_pass_through_a_loss_and_its_backward_pass(loss):
    with FakeTensorMode() as mode:  # to estimate the memory of a step
        student, teacher, labels = map(mode.from_tensor, (STUDENT, TEACHER, LABELS))
        student.requires_grad_()
        loss(student, teacher if loss is fastmt.consistency_loss else labels).backward()
    assert student.grad.shape == STUDENT.shape


def test_too_many_classes_are_a_stated_reason():
    many, labels = torch.zeros(1, 4097), torch.zeros(1, dtype=torch.int64)
    reason = "4097 classes are more than the 4096 that the kernels hold"
    assert fastmt.explain(fastmt.softmax_confidence, many) == ("eager", reason)
    assert fastmt.explain(fastmt.consistency_loss, many, many) == ("eager", reason)
    assert fastmt.explain(fastmt.cross_entropy, many, labels) == ("eager", reason)


@built
def test_more_dimensions_than_the_kernels_walk_are_a_stated_reason():
    pixels = (2,) * 9
    many, labels = random_logits((2, 3, *pixels[1:]), 0), torch.zeros(pixels, dtype=torch.uint8)
    reason = "9 dimensions of pixels are more than the 8 that the kernels walk"
    assert fastmt.explain(fastmt.softmax_confidence, many) == ("eager", reason)
    assert fastmt.explain(fastmt.consistency_loss, many, many) == ("eager", reason)
    assert fastmt.explain(fastmt.cross_entropy, many, labels) == ("eager", reason)
    with fastmt.backend("cpp", strict=True):  # dimensions of size 1 are not walked
        score, _ = fastmt.softmax_confidence(many[:1].transpose(2, 9))
    assert torch.equal(score, fastmt.softmax_confidence(many[:1])[0].transpose(1, 8))


@each_call
def test_a_device_without_kernels_is_a_stated_reason(call):
    arguments = [t.to("meta") if torch.is_tensor(t) else t for t in call[1:]]
    if call[0] is fastmt.ema_update_:
        arguments[:2] = [[t.to("meta") for t in tensors] for tensors in arguments[:2]]
    choice = fastmt.explain(call[0], *arguments)
    assert choice.backend == "eager"
    assert cpp_backend.missing() or choice.reason == "no kernel for device 'meta'"


@each_call
def test_missing_kernels_are_stated_with_what_the_build_said(call, monkeypatch):
    reason = "the C++ kernels are not built: no compiler"
    monkeypatch.setattr(cpp_backend, "missing", lambda: reason)
    assert fastmt.explain(*call) == ("eager", reason)
    with pytest.warns(RuntimeWarning, match="not built: no compiler"):
        call[0](*call[1:])
    with (
        fastmt.backend("cpp", strict=True),
        pytest.raises(RuntimeError, match="not built: no compiler"),
    ):
        call[0](*call[1:])


def test_a_library_that_is_absent_or_broken_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_backend, "_PACKAGE", tmp_path)
    look = cpp_backend._load.__wrapped__
    assert look() == "the C++ kernels are not built: no build record"
    (tmp_path / "_build_info.json").write_text('{"reason": "FASTMT_BUILD_CPP=0"}')
    assert look() == "the C++ kernels are not built: FASTMT_BUILD_CPP=0"
    (tmp_path / "_C.abi3.so").write_text("not a library")
    assert look().startswith("the C++ kernels do not load: ")


def test_the_environment_sets_the_default_and_the_context_overrides_it(monkeypatch):
    call = CALLS["consistency_loss"]
    monkeypatch.setenv("FASTMT_BACKEND", "eager")
    assert fastmt.explain(*call) == ("eager", "eager was asked for")
    with fastmt.backend("auto"):
        assert fastmt.explain(*call).reason != "eager was asked for"
    monkeypatch.setenv("FASTMT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="^FASTMT_BACKEND: got 'cuda', expected one of auto, e"):
        fastmt.consistency_loss(STUDENT, TEACHER)


def test_contexts_nest_and_end_also_with_an_error():
    call = CALLS["cross_entropy"]
    outside = fastmt.explain(*call)
    with fastmt.backend("eager"):
        with pytest.raises(KeyError), fastmt.backend("auto"):
            assert fastmt.explain(*call) == outside
            raise KeyError
        assert fastmt.explain(*call).reason == "eager was asked for"
    assert fastmt.explain(*call) == outside


def test_a_remembered_choice_follows_the_context_and_reports_each_time():
    served = backends.Remembered("ema_update_", [torch.ones(3)])
    wide = backends.Remembered("ema_update_", [torch.ones(3, dtype=torch.float64)])
    outside = served.backend()
    with fastmt.backend("eager"):
        assert served.backend() == wide.backend() == "eager"
    assert served.backend() == outside
    with fastmt.backend("cpp", strict=True):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="float64 is computed by the reference"):
                wide.backend()
    with pytest.raises(TypeError, match="expected an operation"):
        fastmt.explain(list)
    assert fastmt.explain(served.backend).backend == outside


def test_unknown_backends_are_refused_by_name():
    with pytest.raises(ValueError, match="^backend: got 'cuda'"), fastmt.backend("cuda"):
        pass


def test_explain_computes_nothing_and_checks_the_arguments():
    teacher = torch.zeros(3)
    fastmt.explain(fastmt.ema_update_, [teacher], [torch.ones(3)], 0.5)
    assert not teacher.any()
    with pytest.raises(ValueError, match="^loss: got 'l1'"):
        fastmt.explain(fastmt.consistency_loss, STUDENT, TEACHER, loss="l1")
    with pytest.raises(TypeError, match="^function: "):
        fastmt.explain(torch.add, STUDENT, TEACHER)
    with pytest.raises(TypeError, match="^function: got .*, expected an operation of fastmt"):
        fastmt.explain(fastmt.decays.Constant(0.9), 1)
    called = []
    for foreign in (called.append, lambda value: called.append(value)):
        with pytest.raises(TypeError, match="^function: got .*, expected an operation of fastmt"):
            fastmt.explain(foreign, 1)
    assert not called


def test_module_twins_are_explained_too():
    for module, arguments in (
        (fastmt.ConsistencyLoss(), (STUDENT, TEACHER)),
        (fastmt.CrossEntropy(), (STUDENT, LABELS)),
    ):
        with fastmt.backend("eager"):
            assert fastmt.explain(module, *arguments).backend == "eager"
            assert fastmt.explain(partial(module, *arguments)).backend == "eager"


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_loss_of_one_class_tells_once_that_it_teaches_nothing(backend):
    one = STUDENT[:, :1]
    for function, other in ((fastmt.consistency_loss, one), (fastmt.cross_entropy, LABELS)):
        with fastmt.backend(backend):
            with pytest.warns(RuntimeWarning, match="one class alone teaches nothing") as told:
                assert function(one, other) == 0
            assert [warning.filename for warning in told] == [__file__]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                function(one, other)
                function(STUDENT, TEACHER if other is one else LABELS)
