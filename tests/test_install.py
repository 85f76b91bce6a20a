"""The package as others get it: a wheel, an editable install, a machine without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGING = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SHIPPED, NOT_SHIPPED = ("fastmt", "kernels", "csrc"), ("tests", "benchmarks", "examples")
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(distributions(name="pip")),
    reason="builds Linux wheels with pip",
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)

TRAIN = """
import importlib.util, json, torch, fastmt
torch.manual_seed(0)
student = torch.randn(2, 5, 8, 8, requires_grad=True)
teacher = 4 * torch.randn(2, 5, 8, 8)
call = lambda: fastmt.consistency_loss(student, teacher, threshold=0.5)
loss = call()
loss.backward()
with fastmt.backend("eager"):
    expected, = torch.autograd.grad(call(), student)
choice = fastmt.explain(fastmt.consistency_loss, student, teacher, threshold=0.5)
print(json.dumps({
    "folders": [fastmt.__file__, importlib.util.find_spec("fastmt.kernels").origin],
    "version": fastmt.__version__,
    "backend": choice.backend,
    "reason": choice.reason,
    "gradient": student.grad.norm().item(),
    "error": (student.grad - expected).abs().max().item(),
}))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_source(tmp_path / "source")


@pytest.fixture(scope="module")
def kernels_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the C++ kernels, compiled once for all tests."""
    folder = copy_source(tmp_path_factory.mktemp("wheel") / "source")
    return built(build_wheel(folder, FASTMT_BUILD_CPP="1"), folder)


def copy_source(folder: Path) -> Path:
    folder.mkdir()
    for name in PACKAGING:
        shutil.copy(ROOT / name, folder)
    for name in (*SHIPPED, *NOT_SHIPPED):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=GENERATED)
    return folder


def python(
    *arguments: str, folder: Path, executable: Path | str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with nothing of this checkout and its settings in the environment."""
    ours = ("FASTMT_", "PYTHONPATH", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean["FASTMT_BUILD_CUDA"] = "0"  # where it is the point, it is asked for
    return subprocess.run(
        [str(executable), *arguments],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hook that every installer calls, without the isolation that needs downloads."""
    hook = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    return python("-c", hook, folder=source, **environment)


def built(run: subprocess.CompletedProcess[str], source: Path) -> Path:
    assert run.returncode == 0, run.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def record(wheel: Path) -> dict[str, object]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fastmt/_build_info.json"))


def clean_environment(folder: Path) -> Path:
    """The Python of a new environment with this one's packages, but without this checkout.

    The editable install of the checkout is a hook in a .pth file here; the .pth files of a folder
    that is itself named in a .pth file are ignored.
    """
    made = python("-m", "venv", "--without-pip", str(folder), folder=folder.parent)
    assert made.returncode == 0, made.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    folders = (distribution(name).locate_file("") for name in ("torch", "numpy", "pip"))
    packages.joinpath("packages.pth").write_text("\n".join(dict.fromkeys(map(str, folders))))
    return folder / "bin/python"


def install(executable: Path, *what: str, **environment: str) -> None:
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation")
    done = python(
        *pip,
        "--ignore-installed",
        *what,
        folder=executable.parents[1],
        executable=executable,
        **environment,
    )
    assert done.returncode == 0, done.stderr


def train(executable: Path) -> dict[str, object]:
    """One consistency loss and its gradient in that environment, far from this checkout."""
    done = python("-c", TRAIN, folder=executable.parents[1], executable=executable)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["gradient"] > 0
    assert report["error"] < 1e-6
    return report


@needs_compiler
def test_wheel_with_kernels_fits_every_python_from_3_10(kernels_wheel):
    python_tag, abi, platform = kernels_wheel.stem.split("-")[-3:]
    assert (python_tag, abi) == ("cp310", "abi3")
    assert platform.startswith("linux_")
    assert record(kernels_wheel)["cpp"] is True
    assert record(kernels_wheel)["torch_target"] == "2.10"


@needs_compiler
def test_wheel_holds_the_whole_package_and_nothing_else(kernels_wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastmt/**/*.py")}
    modules |= {f"fastmt/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("kernels/*.py")}
    with zipfile.ZipFile(kernels_wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert modules <= names
    assert "fastmt/_C.abi3.so" in names
    assert {name.split("/")[0] for name in names} == {"fastmt"}
    assert {Path(name).suffix for name in names} <= {".py", ".so", ".json", ".typed"}


@needs_compiler
def test_installed_wheel_trains_with_the_cpp_kernels(kernels_wheel, tmp_path):
    executable = clean_environment(tmp_path / "env")
    install(executable, str(kernels_wheel))
    report = train(executable)
    assert all(Path(file).is_relative_to(tmp_path) for file in report["folders"])
    assert report["version"] == kernels_wheel.stem.split("-")[1]
    assert report["backend"] == "cpp"


def test_editable_install_serves_the_checkout_and_states_why_kernels_are_absent(source, tmp_path):
    executable = clean_environment(tmp_path / "env")
    install(executable, "--editable", str(source), FASTMT_BUILD_CPP="0")
    report = train(executable)
    assert report["folders"] == [
        str(source / "fastmt/__init__.py"),
        str(source / "kernels/__init__.py"),
    ]
    assert report["backend"] == "eager"
    assert "FASTMT_BUILD_CPP=0" in report["reason"]


def test_editable_install_serves_a_script_beside_the_clone(tmp_path):
    clone, executable = copy_source(tmp_path / "fastmt"), clean_environment(tmp_path / "env")
    install(executable, "--editable", str(clone), FASTMT_BUILD_CPP="0")
    # Found, not imported: that needs Triton.
    script = """from importlib.util import find_spec
print(find_spec("fastmt").origin, find_spec("fastmt.kernels").origin)"""
    done = python("-c", script, folder=tmp_path, executable=executable)
    files = [clone / "fastmt/__init__.py", clone / "kernels/__init__.py"]
    assert done.stdout.split() == list(map(str, files)), done.stderr


@needs_compiler
def test_editable_install_compiles_where_python_started_in_the_checkout_looks(source, tmp_path):
    only_a_stub(source)
    install(clean_environment(tmp_path / "env"), "--editable", str(source), FASTMT_BUILD_CPP="1")
    assert (source / "fastmt/_C.abi3.so").exists()


def test_build_without_kernels_fits_any_machine_and_records_its_reason(source):
    wheel = built(build_wheel(source, FASTMT_BUILD_CPP="0"), source)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert record(wheel)["cpp"] is False
    assert "FASTMT_BUILD_CPP=0" in record(wheel)["reason"]


def test_build_without_a_compiler_succeeds_and_says_what_is_left_out(source):
    run = build_wheel(source, CC="/nonexistent", CXX="/nonexistent")
    wheel = built(run, source)
    assert "C++ kernels left out: no C++ compiler: CXX=/nonexistent" in run.stderr
    assert "slower" in run.stderr
    assert "no C++ compiler" in record(wheel)["reason"]


@needs_compiler
def test_build_with_a_broken_source_succeeds_and_names_the_error(source):
    shutil.rmtree(source / "csrc")
    (source / "csrc").mkdir()
    (source / "csrc/broken.cpp").write_text("int broken = ;\n")
    wheel = built(build_wheel(source), source)
    assert record(wheel)["cpp"] is False
    assert "csrc/broken.cpp:1" in record(wheel)["reason"]


@needs_compiler
@pytest.mark.parametrize("broken", ["", "no architecture"])
def test_build_without_cuda_kernels_succeeds_and_says_what_is_left_out(source, tmp_path, broken):
    tools = {"CUDA_HOME": str(tmp_path)}
    if broken:
        if shutil.which("nvcc") is None:
            pytest.skip("no nvcc")
        tools = {"TORCH_CUDA_ARCH_LIST": broken}
    only_a_stub(source)
    run = build_wheel(source, FASTMT_BUILD_CUDA="", **tools)
    left_out = record(built(run, source))["cuda"]
    assert left_out["built"] is False
    assert ("TORCH_CUDA_ARCH_LIST: got 'no'" if broken else "no nvcc in") in left_out["reason"]
    assert f"CUDA kernels left out: {left_out['reason']}; on a GPU only Triton" in run.stderr
    required = build_wheel(source, FASTMT_BUILD_CUDA="1", **tools)
    assert required.returncode != 0
    assert f"FASTMT_BUILD_CUDA=1, but {left_out['reason']}" in required.stderr


@needs_compiler
@pytest.mark.parametrize(("known", "newest"), [("80 90", 90), ("80 90 100 120", 100)])
def test_the_newest_default_gpu_that_nvcc_knows_carries_the_code_for_later_ones(
    source, tmp_path, known, newest
):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\n[ $1 = --list-gpu-arch ] || {{ echo "$*" >> {tmp_path}/asked; exit 1; }}\n'
        f"printf 'compute_%s\\n' {known}\n"
    )
    nvcc.chmod(0o755)
    only_a_stub(source)
    built(build_wheel(source, FASTMT_BUILD_CUDA="", CUDA_HOME=str(tmp_path)), source)
    codes = re.findall(r"code=\[(\S+)\]", (tmp_path / "asked").read_text().splitlines()[0])
    assert [codes[0], codes[-1]] == ["sm_80", f"sm_{newest},compute_{newest}"]


def only_a_stub(source: Path) -> None:
    """C++ sources that compile in no time, where it is not they that are tested."""
    for path in source.glob("csrc/**/*.cpp"):
        path.write_text("")


def test_required_kernels_make_a_missing_compiler_an_error(source):
    run = build_wheel(source, CXX="/nonexistent", FASTMT_BUILD_CPP="1")
    assert run.returncode != 0
    assert "FASTMT_BUILD_CPP=1, but no C++ compiler: CXX=/nonexistent" in run.stderr
    assert not list(source.glob("dist/*.whl"))


@needs_compiler
@pytest.mark.parametrize(
    ("installed", "request_", "expected"),
    [("", "", ["torch>=2.10"]), ("2.9.1", "", ["torch>=2.10"]), ("2.10.0", "", []), ("", "0", [])],
)
def test_isolated_build_fetches_torch_only_where_its_headers_are_missing(
    source, tmp_path, installed, request_, expected
):
    executable = tmp_path / "env/bin/python"
    python("-m", "venv", "--without-pip", str(tmp_path / "env"), folder=tmp_path)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    ours = Path(distribution("setuptools").locate_file(""))
    for path in (ours / "setuptools", ours / "_distutils_hack", *ours.glob("setuptools-*")):
        (packages / path.name).symlink_to(path)
    if installed:
        (packages / "torch").mkdir()
        (packages / "torch/version.py").write_text(f"__version__ = '{installed}'\n")
    hook = "import json, setuptools.build_meta as b; r = b.get_requires_for_build_wheel(); "
    hook += "print('REQUIRES', json.dumps(r))"
    done = python("-c", hook, folder=source, executable=executable, FASTMT_BUILD_CPP=request_)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.rpartition("REQUIRES")[2]) == expected
