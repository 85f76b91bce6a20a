"""Compile what the benchmarks and tests launch on a GPU, where there is none, and pack it.

    python -m benchmarks.lent_gpu.pack [--arch sm_90] [--out runs/lent_gpu.tar.xz]

With a PyTorch that is built for CUDA 13, of the versions of torch and Triton that the GPU's machine
has, and fastmt installed with its CUDA kernels (`TORCH_CUDA_ARCH_LIST=9.0 pip install -e .`). What
is compiled is kept in runs/lent_gpu, so a second time takes less. There, in a checkout of the same
commit: benchmarks/lent_gpu/run.sh.

Triton's launchers, which depend on Python's version, are compiled there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path("runs/lent_gpu")  # relative: Triton writes its paths into the cache
# The GPU takes none of these, and most of a cache is text.
FOR_READERS = (".ttir", ".ttgir", ".llir", ".ptx", ".source")


def compile_all(arch: str) -> None:
    """What the benchmarks launch, on the stub of a GPU, then what the tests of the kernels do."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(CACHE)}
    stub = ("-m", "benchmarks.stub_gpu", "-m", "benchmarks.lent_gpu.launch")
    _run(stub, environment)
    tests = ("-m", "pytest", "-q", "--numprocesses", "auto", "tests/triton_kernels")
    compiling = {**environment, "FASTMT_COMPILE_FOR": arch, "OMP_NUM_THREADS": "1"}
    _run(tests, compiling, check=False)  # C++ answers them, and not always as a GPU would


def _run(arguments: Sequence[str], environment: dict[str, str], check: bool = True) -> None:
    subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, check=check)


def built() -> list[Path]:
    """The compiled C++ and CUDA kernels and what their build recorded."""
    package = ROOT / "fastmt"
    if not (package / "_CUDA.abi3.so").exists():
        raise SystemExit("benchmarks.lent_gpu: error: the CUDA kernels are not built")
    return [*package.glob("*.abi3.so"), package / "_build_info.json"]


def pack(files: Iterable[Path], out: Path) -> None:
    """Files of the checkout, those for readers empty: Triton looks for them by name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz", preset=2) as archive:
        for path in sorted(files):
            entry = archive.gettarinfo(path, arcname=str(path.resolve().relative_to(ROOT)))
            if path.suffix in FOR_READERS:
                entry.size = 0
            with path.open("rb") as content:
                archive.addfile(entry, content)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="of the GPU")
    parser.add_argument("--out", type=Path, default=ROOT / f"{CACHE}.tar.xz")
    options = parser.parse_args(arguments)
    kernels = built()
    compile_all(options.arch)
    pack([*kernels, *(p for p in (ROOT / CACHE).rglob("*") if p.is_file())], options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
