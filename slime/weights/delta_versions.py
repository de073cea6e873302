"""Versions of which only the first is whole: the next ones are what changed since the one before."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.engines.checksum import checksum
from slime.errors import WeightSyncError
from slime.observability.disk import folder_bytes
from slime.weights.delta import Bytes, Change, Checksum, Encoding, checksum_of, encode
from slime.weights.versions import Version, VersionFolder, check_same, with_sums

# Encoding is numpy and zstd, which run beside each other. Twice as many tensors are held.
THREADS = 4


@dataclass
class _Kept:
    """A tensor as the last version has it."""

    data: Bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Kept":
        return cls(_bytes(tensor), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.data).view(self.dtype).view(self.shape)


class DeltaVersions:
    """As `Versions`; keeps a copy of all weights in host memory, which the next ones are compared with.

    Args:
        folder: where to.
        encoding: `--update-weight-delta-encoding`.
        checksum: `--update-weight-delta-checksum`.
    """

    def __init__(self, folder: VersionFolder, *, encoding: Encoding, checksum: Checksum) -> None:
        self._folder = folder
        self._encoding: Encoding = encoding
        self._checksum: Checksum = checksum
        self._kept: dict[str, _Kept] = {}
        self._last: Version | None = None
        self._whole: Path | None = None

    def publish(self, named: Iterable[tuple[str, Tensor]], number: str) -> Version:
        """As `Versions`."""
        last = self._last
        if last is not None and last.number == number:
            check_same(last, {name: checksum(tensor) for name, tensor in named})
            return last
        # What an error leaves half-way is nothing to go on from: the next version is whole then.
        self._last = self._whole = None
        self._last = (
            self._write_first(named, number)
            if last is None
            else self._write_next(named, number, last)
        )
        return self._last

    def whole(self) -> Path:
        """As `Versions`."""
        assert self._last is not None, "publish() comes first"
        if self._whole is None or not self._whole.is_dir():
            tensors = ((name, kept.tensor()) for name, kept in self._kept.items())
            number, sums = self._last.number, self._last.sums
            self._whole = self._folder.write(
                tensors, number, suffix="-whole", metadata=lambda: {"checksums": sums}
            )
        return self._whole

    def taken(self) -> None:
        """As `Versions`."""
        assert self._last is not None, "publish() comes first"
        whole = () if self._whole is None else (self._whole,)
        self._folder.keep_only(self._last.folder, *whole)

    def _write_first(self, named: Iterable[tuple[str, Tensor]], number: str) -> Version:
        sums: dict[str, int] = {}
        self._kept = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in with_sums(named, sums):
                self._kept[name] = _Kept.of(tensor)
                yield name, self._kept[name].tensor()

        folder = self._folder.write(tensors(), number, metadata=lambda: {"checksums": sums})
        self._whole = folder
        return Version(number, folder, sums, folder_bytes(folder))

    def _write_next(
        self, named: Iterable[tuple[str, Tensor]], number: str, last: Version
    ) -> Version:
        sums: dict[str, int] = {}
        digests: dict[str, str] = {}
        num_changed = 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_changed
            with ThreadPoolExecutor(THREADS, thread_name_prefix="encode-weights") as pool:
                for name, found in _in_order(pool, self._encoded, with_sums(named, sums)):
                    if found is not None:
                        change, digests[name] = found
                        num_changed += change.num_changed
                        yield name, torch.frombuffer(bytearray(change.data), dtype=torch.uint8)

        folder = self._folder.write(
            tensors(),
            number,
            metadata=lambda: {
                "base_version": last.number,
                "encoding": self._encoding,
                "compression": "zstd",
                "checksum": self._checksum,
                "checksums": digests,
            },
        )
        if missing := sorted(self._kept.keys() - sums.keys()):
            raise WeightSyncError(
                f"version {number} lacks {', '.join(missing[:8])}, which version {last.number} has; "
                "report this with the train rank's log."
            )
        total = sum(len(kept.data) for kept in self._kept.values())
        return Version(number, folder, sums, folder_bytes(folder), num_changed / max(total, 1))

    def _encoded(self, name: str, new: Bytes) -> tuple[Change, str] | None:
        """What changed in a tensor, and the checksum it has now; the kept copy changes with it."""
        kept = self._kept.get(name)
        if kept is None or len(kept.data) != len(new):
            raise WeightSyncError(
                f"{name} has {len(new)} bytes, and in the version before "
                f"{'none' if kept is None else len(kept.data)}; report this with the train rank's log."
            )
        change = encode(kept.data, new, self._encoding)
        if change is None:
            return None
        kept.data[:] = new
        return change, checksum_of(new, self._checksum)


def _in_order(
    pool: ThreadPoolExecutor,
    encoded: Callable[[str, Bytes], Any],
    named: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Any]]:
    """(name, what `encoded` returns) of each tensor in its order, some of them at once."""
    running: list[tuple[str, Future[Any]]] = []
    for name, tensor in named:
        running.append((name, pool.submit(encoded, name, _bytes(tensor))))
        if len(running) >= 2 * THREADS:
            first, result = running.pop(0)
            yield first, result.result()
    for name, result in running:
        yield name, result.result()


def _bytes(tensor: Tensor) -> Bytes:
    """[n] bytes of a tensor, on the host, in memory of their own."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    found: Bytes = flat.numpy()
    return found.copy() if tensor.device.type == "cpu" else found
