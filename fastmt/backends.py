"""Which implementation answers a call, and the reason.

`auto` takes the fastest implementation that supports the call. Whatever is taken instead of what
was asked for has a stated reason: a warning, once a reason, or with `strict=True` an error.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmt import cpp_backend, triton_backend
from fastmt.environment import Variable
from fastmt.kinds import kinds_of

KERNELS = ("triton", "cpp")
BACKENDS = ("auto", "eager", *KERNELS)
MOST_ANSWERS = 4096  # that are remembered; training asks for the same few at every step
T = TypeVar("T")


class Choice(NamedTuple):
    """The implementation of one call and why it was taken."""

    backend: str  # "eager", "triton" or "cpp"
    reason: str


class _Request(NamedTuple):
    backend: str
    strict: bool


class _Answer(BaseException):
    """Carries a choice out of a call that is only being explained."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class _State(threading.local):
    """What this thread asks for: plain attributes, by which a compiled graph can be guarded."""

    def __init__(self) -> None:
        self.request: _Request | None = None
        self.explaining = False


_DEFAULT = Variable("FASTMT_BACKEND")
_state = _State()
_warned: set[str] = set()
_answers: dict[Hashable, Any] = {}


@contextlib.contextmanager
def backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Choose the implementation of every fastmt call in this context.

    Args:
        name: "auto" (the fastest that supports the call), "eager" (plain PyTorch), "triton" or
            "cpp". The environment variable FASTMT_BACKEND sets the default.
        strict: raise RuntimeError, instead of falling back to eager, where `name` cannot serve.

    Raises:
        ValueError: unknown name.
    """
    before = _state.request
    _state.request = _Request(_checked("backend", name), strict)
    try:
        yield
    finally:
        _state.request = before


def _checked(source: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def default_backend() -> str:
    """What FASTMT_BACKEND asks for; ValueError for an unknown name."""
    return _checked("FASTMT_BACKEND", _DEFAULT.value() or "auto")


def choose(
    operation: str,
    tensors: Sequence[Tensor],
    *,
    obstacle: str | None = None,
    upsampled: bool = False,
    loss: str = "",
) -> Choice:
    """The implementation for a call on these tensors.

    Args:
        operation: the public name of the operation, for messages.
        tensors: the logits (or parameters) that the kernels would read.
        obstacle: what in the other arguments no kernel supports yet, if anything.
        upsampled: the kernels would up-sample the logits.
        loss: of consistency_loss.
    """
    name, strict = _state.request or _Request(default_backend(), False)
    choice = _resolve(operation, name, tensors, obstacle, upsampled, loss)
    if _state.explaining:
        raise _Answer(choice)
    if choice.backend == "eager" and name != "eager":
        _report(operation, name, strict, choice.reason)
    return choice


def remembered(decide: Callable[..., T], *arguments: object) -> T:
    """decide(*arguments), asked once for all arguments of the same kinds.

    decide: checks the arguments, asking no tensor for strides or values, and chooses; its answer
        has a `backend`. One that is "eager" is not remembered, as choose() reports it.
    """
    kinds = None if _is_special() else kinds_of(arguments)
    if kinds is None:
        return decide(*arguments)
    key = (decide, _state.request or _DEFAULT.value(), kinds)
    answer = _answers.get(key)
    if answer is None:
        answer = decide(*arguments)
        if answer.backend != "eager":
            if len(_answers) >= MOST_ANSWERS:
                _answers.clear()
            _answers[key] = answer
    return answer


def _is_special() -> bool:
    """Whether a choice depends on more than its arguments."""
    compiling = torch.compiler.is_compiling()
    return compiling or torch._C._are_functorch_transforms_active() or _state.explaining


class Remembered:
    """choose() for tensors whose type, dtype and device stay as they are.

    It is asked anew in another context, and after an answer that it reports: eager. The environment
    is not read again: that takes longer than all else here.
    """

    def __init__(self, operation: str, tensors: Sequence[Tensor]) -> None:
        self._operation, self._tensors = operation, tensors
        self._backend, self._request = "eager", None

    def backend(self) -> str:
        request = _state.request
        if self._backend == "eager" or request is not self._request or _state.explaining:
            self._backend = choose(self._operation, self._tensors).backend
            self._request = request
        return self._backend


def _resolve(
    operation: str,
    name: str,
    tensors: Sequence[Tensor],
    obstacle: str | None,
    upsampled: bool,
    loss: str,
) -> Choice:
    if name == "eager":
        return Choice("eager", "eager was asked for")
    obstacle = _tensor_obstacle(tensors) or obstacle
    # Not bool(tensors): torch.compile of torch 2.11 does not trace that of a list.
    on_cuda = len(tensors) > 0 and tensors[0].is_cuda
    cpp = obstacle or cpp_backend.obstacle(tensors)
    if on_cuda:
        cpp = cpp or cpp_backend.cuda_obstacle(operation, tensors, upsampled)
        cpp = cpp or cpp_backend.cuda_launch_obstacle(tensors[0].get_device())
    slower = on_cuda and upsampled and cpp_backend.triton_is_faster(tensors[0].shape[1], loss)
    if name == "triton" or (name == "auto" and on_cuda and (cpp or slower)):
        reason = obstacle or triton_backend.obstacle(operation, tensors)
        if not reason:
            return Choice("triton", "Triton kernels serve this call")
        if name == "triton" or cpp:
            return Choice("eager", reason)
    if cpp:
        return Choice("eager", cpp)
    if on_cuda:
        return Choice("cpp", "CUDA C++ kernels serve this call")
    return Choice("cpp", f"C++ kernels ({cpp_backend.instruction_set()}) serve this call")


def operations(backend: str) -> Any:
    """What holds the operations of a backend, by the names and signatures of csrc/library.cpp."""
    return triton_backend.operations() if backend == "triton" else torch.ops.fastmt


def _tensor_obstacle(tensors: Sequence[Tensor]) -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "torch.func (grad, vmap, ...) transforms no kernel"
    device = tensors[0].device if tensors else None
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"no kernel for tensor subclass {type(tensor).__name__}"
        if tensor.device != device:
            return f"tensors on different devices: {device} and {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 is computed by the reference"
    return None


def _report(operation: str, name: str, strict: bool, reason: str) -> None:
    message = f"{operation}: {name!r} falls back to eager PyTorch: {reason}"
    if strict:
        raise RuntimeError(f"{operation}: backend {name!r} cannot serve this call: {reason}")
    _warn(message)


def warn_of_one_class(operation: str, logits: Tensor) -> None:
    """A softmax over one class is 1 everywhere: who has a sigmoid's logits would train nothing."""
    if not torch.compiler.is_compiling() and logits.shape[1] == 1:
        _warn(
            f"{operation}: one class alone teaches nothing; a sigmoid's one channel z is two "
            "classes, torch.cat([torch.zeros_like(z), z], 1)"
        )


def _warn(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=_callers())


def _callers() -> int:
    """How many frames of fastmt there are up to whoever called it, as warnings count."""
    frame, count = sys._getframe(1), 1
    while frame.f_back and _is_of_fastmt(frame.f_globals):
        frame, count = frame.f_back, count + 1
    return count


def _is_of_fastmt(scope: dict[str, object]) -> bool:
    """Not what exec() runs in a scope without a name."""
    return str(scope.get("__name__")).startswith("fastmt.")


def explain(function: Callable, *args: object, **kwargs: object) -> Choice:
    """Which implementation would run `function(*args, **kwargs)`, and why; nothing is computed.

    Args:
        function: a public operation (fastmt.consistency_loss, fastmt.cross_entropy,
            fastmt.softmax_confidence, fastmt.ema_update_), a module twin of one, or a partial. What
            else is of fastmt runs up to its first operation: fastmt.segment its network's forward.

    Returns:
        Choice(backend, reason).

    Raises:
        Whatever the call itself would raise for its arguments; TypeError if `function` is not of
        fastmt, or comes to no operation.
    """
    refusal = f"function: got {function!r}, expected an operation of fastmt"
    if not _is_own(function):  # to call it might do anything
        raise TypeError(refusal)
    before = _state.explaining
    _state.explaining = True
    try:
        function(*args, **kwargs)
    except _Answer as answer:
        return answer.choice
    finally:
        _state.explaining = before
    raise TypeError(refusal)


def _is_own(function: Callable) -> bool:
    """Whether a function, a method, or the class of a module is defined in fastmt."""
    while isinstance(function, functools.partial):
        function = function.func
    definitions = [function] if hasattr(function, "__name__") else type(function).__mro__
    return any(str(getattr(each, "__module__", "")).startswith("fastmt.") for each in definitions)
