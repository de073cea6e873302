"""The copy of the weights on an engine's host: made from a whole version, moved on by what changed."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from slime.checkpoint.hf import INDEX_NAME, read_index_metadata
from slime.checkpoint.safetensors_file import Stored, read_header
from slime.errors import CheckpointError
from slime.observability.disk import write_failure
from slime.weights.delta import Bytes, checksum_of, decode
from slime.weights.delta_versions import THREADS
from slime.weights.versions import METADATA

logger = logging.getLogger(__name__)

_STATE = "slime_copy.json"
# Differs after each start of the machine: what a crash left of a copy is not trusted.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Stale(Exception):
    """The copy cannot be moved on: it has to be made anew from a whole version. Says why."""


def copy_path(local_dir: str | Path) -> Path:
    """The folder that engines load, below `--update-weight-local-checkpoint-dir`."""
    return Path(local_dir) / "weights"


def bring(version: Path, local_dir: str | Path) -> None:
    """Make the copy that version; nothing, when it is already. Processes of one host take turns.

    While it changes the copy is marked as being of no version: an interrupted change is never taken for
    a whole one.

    Args:
        version: folder of a whole version, or of what changed since the one before.
        local_dir: `--update-weight-local-checkpoint-dir`.

    Raises:
        Stale: the version holds changes of another one than the copy is of, or they do not fit it.
        CheckpointError: the version cannot be read, or the copy not written.
    """
    copy = copy_path(local_dir)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _locked(copy.parent / "lock"):
            says = read_index_metadata(version).get(METADATA)
            if says is None:
                raise CheckpointError(
                    f"{version} is no version of weights that this host can see; is "
                    "--update-weight-disk-dir on a file system that all hosts share?"
                )
            run, number, base = says["run"], says["version"], says.get("base_version")
            state = _state(copy)
            if state == _state_of(run, number):
                return
            if base is None:
                _copy_whole(version, copy)
            elif state == _state_of(run, base):
                (copy / _STATE).unlink()
                _apply(version, says, copy)
            else:
                raise Stale(f"{copy} is of {_shown(state)}, not of version {base}")
            _write_state(copy, _state_of(run, number))
    except OSError as error:
        raise CheckpointError(f"{write_failure(copy, error)} (made from {version})") from error


def _copy_whole(version: Path, copy: Path) -> None:
    """Replace the copy; room for both is not asked of the disk."""
    partial = copy.with_name(f"{copy.name}.partial")
    for old in (copy, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    try:
        for file in sorted(version.iterdir()):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(copy)


def _apply(version: Path, says: dict[str, Any], copy: Path) -> None:
    """Write what changed where it changed.

    Raises:
        Stale: a tensor is not what the trainer has afterwards.
    """
    digests: dict[str, str] = says["checksums"]
    places = {
        name: (file, stored)
        for file in sorted(copy.glob("*.safetensors"))
        for name, stored in read_header(file).items()
    }
    if unknown := sorted(digests.keys() - places.keys()):
        raise Stale(f"{copy} has no {', '.join(unknown[:8])}")
    with ExitStack() as stack:
        files = {file: os.open(file, os.O_RDWR) for file in {places[name][0] for name in digests}}
        for handle in files.values():
            stack.callback(os.close, handle)

        def change(name: str, data: bytes) -> None:
            file, stored = places[name]
            old = _read(files[file], stored)
            try:
                new = decode(data, old, says["encoding"])
            except CheckpointError as error:
                raise Stale(f"{name} of {version}: {error}") from error
            if checksum_of(new, says["checksum"]) != digests[name]:
                raise Stale(f"{name} of {copy} does not become what the trainer has")
            _write(files[file], new, stored.start)

        with ThreadPoolExecutor(THREADS, thread_name_prefix="apply-weights") as pool:
            running = [pool.submit(change, *one) for one in _changes(version, digests)]
            for result in running:
                result.result()


def _changes(version: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, compressed change) of each tensor that changed."""
    index = json.loads((version / INDEX_NAME).read_text("utf-8"))["weight_map"]
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(index[name], []).append(name)
    for file, inside in by_file.items():
        try:
            with safe_open(version / file, framework="np") as opened:
                for name in inside:
                    yield name, opened.get_tensor(name).tobytes()
        except SafetensorError as error:
            raise CheckpointError(f"{version / file} cannot be read: {error}") from error


def _read(handle: int, stored: Stored) -> Bytes:
    data = bytearray(stored.end - stored.start)
    view, place = memoryview(data), stored.start
    while view:
        count = os.preadv(handle, [view], place)
        if not count:
            raise Stale("a file of the copy is cut short")
        view, place = view[count:], place + count
    return np.frombuffer(data, dtype=np.uint8)


def _write(handle: int, data: Bytes, place: int) -> None:
    view = memoryview(np.ascontiguousarray(data))
    while view:
        count = os.pwrite(handle, view, place)
        view, place = view[count:], place + count


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _state_of(run: str, number: str) -> dict[str, str]:
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return {"run": run, "version": number, "boot": boot}


def _state(copy: Path) -> Any:
    """What the copy is; None while it changes, or when there is none."""
    try:
        return json.loads((copy / _STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _write_state(copy: Path, state: dict[str, str]) -> None:
    draft = copy / f"{_STATE}.draft"
    draft.write_text(json.dumps(state), encoding="utf-8")
    draft.rename(copy / _STATE)


def _shown(state: Any) -> str:
    version = state.get("version") if isinstance(state, dict) else None
    return "no version" if version is None else f"version {version}, of this run or another"
