"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file for the block to write, which takes the place of `path` in one rename.

    After an error in the block `path` is as it was, and the temporary file gone.
    """
    target = Path(os.path.realpath(path))  # a rename would replace a symbolic link, not its file
    start = target.name[:40]  # all of it might leave no room for what is added
    temporary = target.with_name(f".{start}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # the error that led here is the one to report
            temporary.unlink(missing_ok=True)
