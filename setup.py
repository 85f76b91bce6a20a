"""Builds the C++ kernels where it can; everything else about the package stands in pyproject.toml.

The library is no Python module and sees PyTorch only through its stable ABI, so one binary serves
every Python and every torch from TORCH_TARGET on. A machine that cannot build it gets the package
without it. FASTMT_BUILD_CPP=0 leaves the kernels out, =1 makes their absence an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (2, 10)
SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
LIBRARY, RECORD = "_C.abi3.so", "_build_info.json"
COST = "eager PyTorch runs on CPU instead, roughly an order of magnitude slower on the losses"

COMPILE_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
    "-Icsrc",
]
# An rpath would tie the library to the torch it was built against; `import torch` has loaded these.
LINK_FLAGS = ["-shared", "-ltorch_cpu", "-ltorch", "-lc10"]
if sys.platform == "linux":
    LINK_FLAGS += ["-Wl,-z,defs", "-Wl,--strip-debug"]


class LeftOutError(Exception):
    """The C++ kernels cannot be built; the message is one line."""


def request() -> str:
    """What FASTMT_BUILD_CPP asks for: "0", "1" or "auto"."""
    value = os.environ.get("FASTMT_BUILD_CPP") or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"FASTMT_BUILD_CPP: got {value!r}, expected 0, 1 or unset")
    return value


def find_compiler() -> list[str]:
    """The C++ compiler as the start of a command: CXX, else the first one on PATH."""
    if sys.platform not in ("linux", "darwin"):
        raise LeftOutError(f"the C++ kernels are built on Linux and macOS, not on {sys.platform}")
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise LeftOutError(f"no C++ compiler: CXX={named[0]} is not an executable")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise LeftOutError("no C++ compiler: none of c++, g++, clang++ is on PATH")


def find_torch() -> Path:
    """The torch to compile against, also from inside pip's isolated build environment."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    for folder in folders:
        if torch_version(folder) >= TORCH_TARGET:
            return folder
    raise LeftOutError(f"no headers of torch >= {target_text()} in {folders[0].parent}")


def torch_version(folder: Path) -> tuple[int, int]:
    """(major, minor) read without importing torch; (0, 0) where there is none."""
    if not (folder / "version.py").exists():
        return 0, 0
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def target_text() -> str:
    return ".".join(map(str, TORCH_TARGET))


def build_library(target: Path) -> str:
    """Compile and link the library `target`; returns the compiler's name and version."""
    if request() == "0":
        raise LeftOutError("the build ran with FASTMT_BUILD_CPP=0")
    compiler, torch = find_compiler(), find_torch()
    flags = [*COMPILE_FLAGS, f"-isystem{torch}/include", *shlex.split(os.getenv("CXXFLAGS", ""))]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        objects = [f"{scratch}/{index}.o" for index in range(len(SOURCES))]
        commands = [
            [*compiler, *flags, "-c", source, "-o", made]
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(run, commands))
        # Linked beside the target and renamed: a process that has the old library open keeps it.
        linked = target.with_name(target.name + ".new")
        run([*compiler, *objects, f"-L{torch}/lib", *LINK_FLAGS, "-o", str(linked)])
        linked.replace(target)
    return run([*compiler, "--version"]).splitlines()[0]


def run(command: list[str]) -> str:
    """The command's standard output; LeftOutError with its first complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        complaints = re.findall(r".*(?:error:|undefined reference).*", done.stderr)
        first = complaints[0] if complaints else f"exit status {done.returncode}"
        raise LeftOutError(f"{command[0]} failed: {first}")
    return done.stdout


class BuildKernels(build_ext):
    """Writes the library, and the record of how its build went, into the package."""

    cpp: bool | None = None  # None until the build has run

    def run(self) -> None:
        target = self._package() / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {"cpp": True, "reason": "", "compiler": "", "torch_target": target_text()}
        try:
            record["compiler"] = build_library(target)
        except LeftOutError as error:
            if request() == "1":
                raise SystemExit(f"fastmt: FASTMT_BUILD_CPP=1, but {error}") from None
            print(f"fastmt: C++ kernels left out: {error}; {COST}", file=sys.stderr)
            target.unlink(missing_ok=True)
            record |= {"cpp": False, "reason": str(error)}
        (target.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        self.cpp = bool(record["cpp"])

    def _package(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return Path("fastmt") if in_place else Path(self.build_lib, "fastmt")

    def get_outputs(self) -> list[str]:
        made = [self._package() / name for name in (LIBRARY, RECORD)]
        return [str(path) for path in made if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        in_place = self.inplace or self.editable_mode
        made = map(Path, self.get_outputs() if in_place else [])
        return {str(Path(self.build_lib, path)): str(path) for path in made}


class KernelsWheel(bdist_wheel):
    """A wheel with the library fits every Python 3.10 or newer; one without it fits any machine."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.get_finalized_command("build_ext").cpp is False:
            return "py3", "none", "any"
        # A free-threaded Python ("cp313t") takes no abi3 wheels.
        return (python, abi, platform) if abi.endswith("t") else ("cp310", "abi3", platform)


def build_requirements() -> list[str]:
    """What an isolated build must fetch: torch's headers, where they are wanted and not at hand."""
    if request() == "0":
        return []
    try:
        find_compiler()
    except LeftOutError:
        return []
    try:
        find_torch()
    except LeftOutError:
        return [f"torch>={target_text()}"]
    return []


setup(
    packages=[*find_packages(include=["fastmt", "fastmt.*"]), "fastmt.kernels"],
    package_dir={"fastmt.kernels": "kernels"},
    ext_modules=[Extension("fastmt._C", SOURCES, depends=HEADERS)],
    setup_requires=build_requirements(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelsWheel},
)
