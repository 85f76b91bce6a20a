"""python -m benchmarks.stub_gpu ARGUMENTS: runs `python ARGUMENTS` on a stub of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import stub_gpu


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            variables = stub_gpu.build(Path(folder), runtime=True)
            if not stub_gpu.is_preloaded(variables):
                raise stub_gpu.Missing("nothing is preloaded in this system")
        except stub_gpu.Missing as reason:
            print(reason, file=sys.stderr)
            return 2
        command = [sys.executable, *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
