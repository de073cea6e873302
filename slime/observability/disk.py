"""Writing that failed: one message for a full disk, with what is free and what is needed."""

import errno
import os
import shutil
from pathlib import Path

# No space, over the quota, past a limit on file sizes.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_failure(path: Path, error: BaseException, *, needed_bytes: int | None = None) -> str:
    """`cannot write PATH: No space left on device; 12 MB are free there, about 40 MB needed: ...`.

    Args:
        path: what was to be written.
        error: why it was not; an OSError somewhere behind it tells the reason.
        needed_bytes: size of the whole file or folder, when it is known.
    """
    cause = os_error_behind(error)
    reason = cause.strerror or str(cause) if cause is not None else str(error)
    needed = "" if needed_bytes is None else f", about {_megabytes(needed_bytes)} needed"
    advice = "make room or name a folder on another disk"
    if cause is not None and cause.errno not in FULL:
        advice = "may this user write there, and is the disk in order?"
    return f"cannot write {path}: {reason}; {_free(path)} free there{needed}; {advice}"


def os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that `error` is or was raised from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; 0 when there is none."""
    return sum(
        os.path.getsize(os.path.join(root, name))
        for root, _, names in os.walk(folder)
        for name in names
    )


def _free(path: Path) -> str:
    existing = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    return _megabytes(shutil.disk_usage(existing).free)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
