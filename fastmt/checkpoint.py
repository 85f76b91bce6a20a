"""Checkpoints: written whole or not at all, and read without ever running code from the file."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastmt.arguments import first_line
from fastmt.checkpoint_entries import check_dense, plain
from fastmt.files import replacing

__all__ = [
    "CheckpointError",
    "check_architecture",
    "load",
    "load_weights",
    "save",
    "save_weights",
]

_FORMAT = "fastmt-checkpoint"
_VERSION = 1
_FOLDER = 0x10  # attribute of a record of which torch.load reads nothing, and says nothing


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; one line naming the file and the remedy."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to `path`, which at any moment holds the old checkpoint or the new one, whole.

    state: nested dicts, lists and tuples of tensors, numbers (NumPy's come back as Python's),
    strings, booleans and None. The bytes go to a temporary file in the same folder, reach the disk,
    and take the place of `path` in one rename; missing folders are made. A process killed half way
    leaves `path` as it was, and a `.<name>.*.tmp` beside it.

    Raises TypeError naming the entry that `load` would refuse or that has no memory, as on the meta
    device; CheckpointError when the file cannot be written (disk full, no permission): the former
    checkpoint is then intact and the temporary file gone.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state: got {type(state).__name__}, expected a dict")
    payload = {"format": _FORMAT, "version": _VERSION, "state": plain(state, "state")}
    _write_atomically(path, lambda file: _torch_save(payload, file))


def load(
    path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read the state that `save` wrote; its tensors arrive on `map_location`.

    Checksums are verified and objects other than tensors and plain values are refused, not built:
    nothing in the file is executed. Raises CheckpointError when the file is missing, truncated,
    damaged, of another kind or of a newer version, or when `map_location` is not available.
    """
    path = Path(path)
    _check_archive(path)
    try:
        payload = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects other than tensors and plain values, which are never loaded; "
            "use a checkpoint written by fastmt"
        ) from error
    except Exception as error:  # of a sound archive: a foreign layout or a missing device
        raise CheckpointError(
            f"{path}: cannot be loaded onto {map_location} ({first_line(error)}); "
            "check map_location, or use a checkpoint written by fastmt"
        ) from error
    return _unwrap(payload, path)


def check_architecture(
    module_state: Mapping[str, Tensor],
    loaded_state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    owner: str = "network",
) -> None:
    """Raise CheckpointError naming the first entry of a loaded state dict that does not fit.

    module_state: `module.state_dict()`; loaded_state: the state dict from the file; path: that
    file, and owner: what the module is, for the message. Entries of the module that are missing, or
    of another shape or dtype (which loading would round), are named before unexpected ones.
    """
    remedy = f"build the {owner} with the settings it was trained with"
    for name, tensor in module_state.items():
        if name not in loaded_state:
            raise CheckpointError(f"{path}: entry {name!r} of the {owner} is missing; {remedy}")
        expected, found = _describe(tensor), _describe(loaded_state[name])
        if expected != found:
            raise CheckpointError(
                f"{path}: entry {name!r} has {found}, the {owner} expects {expected}; {remedy}"
            )
    for name in loaded_state:
        if name not in module_state:
            raise CheckpointError(f"{path}: entry {name!r} is unknown to the {owner}; {remedy}")


def save_weights(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor]) -> None:
    """Write a flat state dict as a safetensors file, as atomically as `save`.

    Tied tensors are written once a name. Raises TypeError naming an entry that is no dense tensor
    or of a dtype that safetensors lacks, CheckpointError when the file cannot be written,
    ImportError when safetensors is not installed.
    """
    safetensors_torch = _import_safetensors()
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise TypeError(f"state_dict: got {kind}, expected a state dict, as module.state_dict()")
    for name, tensor in state_dict.items():
        check_dense(name, tensor)
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in state_dict.items()
    }
    try:
        content = safetensors_torch.save(tensors, metadata={"format": "pt"})
    except KeyError as error:  # of its table of dtypes
        name = next(name for name, tensor in tensors.items() if tensor.dtype in error.args)
        kind = tensors[name].dtype
        raise TypeError(f"state_dict[{name!r}]: is {kind}, which safetensors lacks") from error
    _write_atomically(path, lambda file: file.write(content))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, of fastmt or not, into a state dict on the CPU.

    Raises CheckpointError when the file is missing or is no complete safetensors file, ImportError
    when safetensors is not installed.
    """
    safetensors_torch = _import_safetensors()
    path = Path(path)
    _check_file(path)
    try:
        return safetensors_torch.load_file(path, device="cpu")
    except Exception as error:  # SafetensorError derives from Exception directly
        raise CheckpointError(
            f"{path}: is truncated or no safetensors file ({first_line(error)}); "
            "restore a complete copy"
        ) from error


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"type {type(value).__name__}"


class _Sink:
    """A file that keeps its first error: torch.save would bury it, also Ctrl-C, under its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        self._attempt(lambda: self.file.write(data))
        return len(data)

    def flush(self) -> None:
        self._attempt(self.file.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except BaseException as error:
                self.error = error


def _torch_save(payload: dict[str, Any], file: BinaryIO) -> None:
    sink = _Sink(file)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # `load` verifies them
    try:
        torch.save(payload, sink)
    finally:
        torch.serialization.set_crc32_options(checksums)
    if sink.error is not None:
        raise sink.error


def _write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); free space on the disk or "
            "choose a writable path (a checkpoint that was there is still complete)"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it
            raise
    finally:
        os.close(descriptor)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the checkpoint file itself")


def _check_archive(path: Path) -> None:
    _check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            folders = (r.filename for r in archive.infolist() if r.external_attr & _FOLDER)
            damaged = archive.testzip() or next(folders, None)
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read; change its permissions") from error
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise CheckpointError(
            f"{path}: is truncated or no checkpoint of fastmt; restore a complete copy"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: is damaged (record {damaged}); restore an intact copy")


def _unwrap(payload: Any, path: Path) -> dict[str, Any]:
    if not isinstance(payload, dict) or payload.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: is no checkpoint of fastmt (format tag {_FORMAT!r} missing); "
            "use a file written by fastmt.checkpoint.save"
        )
    version = payload.get("version")
    if version != _VERSION:
        raise CheckpointError(
            f"{path}: has checkpoint version {version}, this fastmt reads {_VERSION}; "
            "use the fastmt that wrote it"
        )
    if not isinstance(payload.get("state"), dict):
        raise CheckpointError(f"{path}: holds no state; restore an intact copy")
    return payload["state"]


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'safetensors is not installed; install it with pip install "fastmt[train]"'
        ) from error
    return safetensors.torch
