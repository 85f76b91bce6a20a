"""The doctor: what is installed, what serves each operation and why, and whether it is right."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmt import backends, cpp_backend, selftest
from fastmt.selftest import Sizes

TIMED = Sizes(low=(64, 64), out=(256, 256))
_ROUNDS = 7


@dataclass(frozen=True)
class Finding:
    """One operation on one device, by one implementation."""

    operation: str
    device: str
    backend: str  # "eager" where no kernel serves it
    reason: str
    errors: dict[str, float]  # by dtype, relative to the largest value of the float64 reference
    failure: str | None  # what the self-test found wrong
    fused_s: float | None  # None where it was not timed
    eager_s: float | None


@dataclass(frozen=True, repr=False)
class Report:
    """What the doctor found; `print` shows it as text.

    versions, build and devices are texts by name; findings has one entry for each operation,
    device and implementation.
    """

    versions: dict[str, str]
    build: dict[str, str]
    devices: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every self-test passed."""
        return all(finding.failure is None for finding in self.findings)

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def doctor(*, timing: bool = True) -> Report:
    """Look at the installation and test every operation on every device.

    Args:
        timing: also time the kernels against eager PyTorch, for about two seconds a device.

    Returns:
        Report with `ok`, and a repr for people.

    A self-test compares loss and gradient (score and label, average) of float32 and bfloat16 inputs
    with the reference in float64, on dense logits and with up-sampling inside.
    """
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        devices[f"cuda:{index}"] = f"{properties.name}, {capability}"
    findings = [
        _examine(operation, torch.device(device), backend, timing)
        for device in devices
        for operation, build in selftest.PLAIN.items()
        for backend in selftest.serving(build, torch.device(device)) or ["eager"]
    ]
    return Report(_versions(), _build(), devices, tuple(findings))


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """The parser of `fastmt doctor`."""
    command = commands.add_parser(
        "doctor",
        help="what is installed, what serves each operation, and whether it is right",
        description="Show versions and devices, test every operation against the reference in"
        " float64, and time it against eager PyTorch. Exit status 1 when a test fails.",
    )
    command.set_defaults(run=run_doctor, check=lambda *_: None, out=None)
    command.add_argument("--no-timing", action="store_true", help="only test")


def run_doctor(args: argparse.Namespace, _: str) -> int:
    report = doctor(timing=not args.no_timing)
    print(report)
    return 0 if report.ok else 1


def _examine(operation: str, device: torch.device, backend: str, timing: bool) -> Finding:
    build = selftest.PLAIN[operation]
    # What falls back to eager tells why only where it was not asked for.
    with backends.backend("auto" if backend == "eager" else backend):
        reason = build(device, torch.float32, Sizes()).choice().reason
    errors, failure = {}, None
    fused_s = eager_s = None
    with backends.backend(backend):
        try:
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                errors[name] = build(device, dtype, Sizes()).error()
                if not errors[name] <= selftest.TOLERANCE[dtype]:  # also where it is NaN
                    failure = f"{name}: error above {selftest.TOLERANCE[dtype]:g}"
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if timing and backend != "eager" and failure is None:
        trial = build(device, torch.float32, TIMED)
        fused_s, eager_s = _time(trial.run, device, (backend, "eager"))
    return Finding(operation, str(device), backend, reason, errors, failure, fused_s, eager_s)


def _time(run: Callable[[], object], device: torch.device, names: Sequence[str]) -> list[float]:
    """Median seconds of a call by each backend; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(_ROUNDS + 1):
        for name in names:
            with backends.backend(name):
                _wait(device)
                begin = time.perf_counter()
                run()
                _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return [statistics.median(seconds[name]) for name in names]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions() -> dict[str, str]:
    import fastmt

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        # Started in a checkout, Python imports it and no kernels that are installed elsewhere.
        "fastmt": f"{fastmt.__version__} in {Path(fastmt.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none in this torch",
        "triton": triton,
    }


def _build() -> dict[str, str]:
    """What the build recorded, whether its libraries load, and whether calls ask for others."""
    found = {
        "kernels": cpp_backend.missing() or f"loaded, {cpp_backend.instruction_set()}",
        "CUDA kernels": cpp_backend.cuda_missing() or "loaded",
    }
    if (asked := backends.default_backend()) != "auto":
        found["FASTMT_BACKEND"] = f"{asked}, which calls take instead of what is tested here"
    recorded = cpp_backend.build_info()
    for prefix, part in (("", recorded), ("CUDA ", recorded.get("cuda", {}))):
        for name in ("compiler", "torch_target"):
            if part.get(name):
                found[prefix + name] = str(part[name])
    return found


def _lines(report: Report) -> list[str]:
    lines = []
    for part in (report.versions, report.build, report.devices):
        lines += [f"{name:<14} {text}" for name, text in part.items()] + [""]
    rows = [["operation", "device", "runs as", "float32", "bfloat16", "test", "fused", "eager"]]
    for finding in report.findings:
        errors = [f"{e:.1e}" for e in finding.errors.values()]
        times = [_milliseconds(s) for s in (finding.fused_s, finding.eager_s)]
        verdict = "ok" if finding.failure is None else "FAILED"
        errors += ["-"] * (2 - len(errors))
        rows.append([finding.operation, finding.device, finding.backend, *errors, verdict, *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    reasons = {f"{f.backend} on {f.device}: {f.reason}": None for f in report.findings}
    failed = [f for f in report.findings if f.failure is not None]
    lines += ["", "Why:", *(f"  {reason}" for reason in reasons)]
    lines += ["", "Errors are relative to the largest value of the reference in float64."]
    lines += [f"FAILED: {f.operation} on {f.device} ({f.backend}): {f.failure}" for f in failed]
    return lines


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms"
