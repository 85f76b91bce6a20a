"""Builds the C++ and CUDA kernels where it can; all else of the package stands in pyproject.toml.

The libraries are no Python modules and see PyTorch only through its stable ABI, so one binary
serves every Python and every torch from TORCH_TARGET on. A machine that cannot build one gets the
package without it. FASTMT_BUILD_CPP=0 or FASTMT_BUILD_CUDA=0 leaves kernels out, =1 makes their
absence an error. TORCH_CUDA_ARCH_LIST names the GPUs to compile for; none has to be here.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

TORCH_TARGET = (2, 10)
SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
CUDA_SOURCES = [*sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")), "csrc/cpu/host.cpp"]
LIBRARY, CUDA_LIBRARY, RECORD = "_C.abi3.so", "_CUDA.abi3.so", "_build_info.json"
COST = "eager PyTorch runs on CPU instead, roughly an order of magnitude slower on the losses"
CUDA_COST = "on a GPU only Triton's kernels run"
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")

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

# Division within 2 ulp is enough: what must be exact is a quotient() of csrc/cuda/lanes.h.
NVCC_FLAGS = ["-std=c++20", "-O3", "--prec-div=false", "-Xptxas=-v", "-Icsrc"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
# Only a CUDA build of torch defines all symbols, and its libtorch.so leads to them.
NVCC_LINK_FLAGS = ["-shared", "-Xlinker=--no-as-needed,--strip-debug", *LINK_FLAGS[1:4]]


class LeftOutError(Exception):
    """The kernels cannot be built; the message is one line."""


def request(variable: str = "FASTMT_BUILD_CPP") -> str:
    """What an environment variable asks for: "0", "1" or "auto"."""
    value = os.environ.get(variable) or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}: got {value!r}, expected 0, 1 or unset")
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


def find_nvcc() -> str:
    """The CUDA compiler: that of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise LeftOutError(f"no nvcc in {home}/bin" if home else "no nvcc on PATH")
    return nvcc


def architecture_flags(nvcc: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, or for its own default."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    flags = []
    for name in re.split(r"[;\s]+", asked) if asked else default_architectures(nvcc):
        if not (found := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)):
            raise LeftOutError(f"TORCH_CUDA_ARCH_LIST: got {name!r}, expected e.g. 8.0;9.0+PTX")
        number = found[1] + found[2]
        code = f"sm_{number}{found[3]}" + (f",compute_{number}" if found[4] else "")
        flags.append(f"-gencode=arch=compute_{number}{found[3]},code=[{code}]")
    return flags


def default_architectures(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHITECTURES that this nvcc knows, the last with PTX for the GPUs after it."""
    known = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))
    names = [name for name in CUDA_ARCHITECTURES if name.replace(".", "") in known]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]


def build_library(target: Path) -> str:
    """Compile and link the C++ library `target`; returns the compiler's name and version."""
    if request() == "0":
        raise LeftOutError("the build ran with FASTMT_BUILD_CPP=0")
    compiler, torch = find_compiler(), find_torch()
    link = [*compiler, f"-L{torch}/lib", *LINK_FLAGS]
    build(dict.fromkeys(SOURCES, (*compiler, *cpp_flags(torch))), link, target)
    return run([*compiler, "--version"]).splitlines()[0]


def build_cuda_library(target: Path) -> dict[str, object]:
    """Compile and link the CUDA library `target`; returns its compiler and what its kernels use."""
    if request("FASTMT_BUILD_CUDA") == "0":
        raise LeftOutError("the build ran with FASTMT_BUILD_CUDA=0")
    nvcc, compiler, torch = find_nvcc(), find_compiler(), find_torch()
    commands = {"cpp": [*compiler, *cpp_flags(torch)]}
    commands["cu"] = [nvcc, f"-ccbin={compiler[0]}", *NVCC_FLAGS, *architecture_flags(nvcc)]
    link = [nvcc, f"-ccbin={compiler[0]}", f"-L{torch}/lib", *NVCC_LINK_FLAGS]
    sources = {source: commands[source.rpartition(".")[2]] for source in CUDA_SOURCES}
    kernels = resources_of(build(sources, link, target))
    for kernel in kernels:
        if kernel["spilled"]:
            print(f"fastmt: a CUDA kernel spills registers: {kernel}", file=sys.stderr)
    return {"compiler": run([nvcc, "--version"]).splitlines()[-1], "kernels": kernels}


def cpp_flags(torch: Path) -> list[str]:
    return [*COMPILE_FLAGS, f"-isystem{torch}/include", *shlex.split(os.getenv("CXXFLAGS", ""))]


def build(sources: dict[str, Sequence[str]], link: list[str], target: Path) -> str:
    """Compile each source with its command and link all to `target`; what the compilers said."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        objects = [f"{scratch}/{index}.o" for index in range(len(sources))]
        commands = [
            [*command, "-c", source, "-o", made]
            for (source, command), made in zip(sources.items(), objects, strict=True)
        ]
        said = "".join(pool.map(run, commands))
        # Linked beside the target and renamed: a process that has the old library open keeps it.
        linked = target.with_name(target.name + ".new")
        run([link[0], *objects, *link[1:], "-o", str(linked)])
        linked.replace(target)
    return said


def run(command: list[str]) -> str:
    """The command's output; LeftOutError with its first complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "warning" in done.stderr:
        sys.stderr.write(done.stderr)
    if done.returncode:
        complaints = re.findall(r".*(?:error *:|undefined reference).*", done.stderr)
        first = complaints[0] if complaints else f"exit status {done.returncode}"
        raise LeftOutError(f"{command[0]} failed: {first}")
    return done.stdout + done.stderr


def resources_of(report: str) -> list[dict[str, object]]:
    """Registers and spilled bytes of each kernel and GPU, from what ptxas -v says."""
    variant = r"(?:ILi(\d+)|INS0_\d+Finish(Consistency|CrossEntropy))?"
    kernel = rf"entry function '\w*?4cuda\d+(\w+?_kernel){variant}\w*' for '(\w+)'"
    spills = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"{kernel}.*?{spills}.*?Used (\d+) registers", report, re.DOTALL)
    return [
        {
            "kernel": name,
            "variant": classes or finish,
            "architecture": architecture,
            "registers": int(registers),
            "spilled": int(stored) + int(loaded),
        }
        for name, classes, finish, architecture, stored, loaded, registers in found
    ]


class BuildKernels(build_ext):
    """Writes the libraries, and the record of how their build went, into the package."""

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
        record["cuda"] = self._cuda_record(bool(record["cpp"]))
        (target.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        self.cpp = bool(record["cpp"])

    def _cuda_record(self, cpp: bool) -> dict[str, object]:
        target = self._package() / CUDA_LIBRARY
        try:
            if not cpp:
                raise LeftOutError(
                    "it answers the operations of the C++ kernels, which are left out"
                )
            return {"built": True, "reason": "", **build_cuda_library(target)}
        except LeftOutError as error:
            if request("FASTMT_BUILD_CUDA") == "1":
                raise SystemExit(f"fastmt: FASTMT_BUILD_CUDA=1, but {error}") from None
            print(f"fastmt: CUDA kernels left out: {error}; {CUDA_COST}", file=sys.stderr)
            target.unlink(missing_ok=True)
            return {"built": False, "reason": str(error)}

    def _package(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return Path("fastmt") if in_place else Path(self.build_lib, "fastmt")

    def get_outputs(self) -> list[str]:
        made = [self._package() / name for name in (LIBRARY, CUDA_LIBRARY, RECORD)]
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


class KernelsEditable(editable_wheel):
    """An editable install that is found before any folder on the way is searched.

    A folder named fastmt, as a clone is beside somebody's script, would be taken for the package.
    """

    def _select_strategy(self, *arguments: object) -> object:
        strategy = super()._select_strategy(*arguments)
        files = getattr(strategy, "get_implementation", None)
        if files is not None:  # or it leads there by a path, which is asked for
            strategy.get_implementation = lambda: [
                (name, content.replace(b"meta_path.append(", b"meta_path.insert(0, "))
                for name, content in files()
            ]
        return strategy


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
    ext_modules=[Extension("fastmt._C", SOURCES, depends=[*HEADERS, *CUDA_SOURCES])],
    setup_requires=build_requirements(),
    cmdclass={
        "build_ext": BuildKernels,
        "bdist_wheel": KernelsWheel,
        "editable_wheel": KernelsEditable,
    },
)
