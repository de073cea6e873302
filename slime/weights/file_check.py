"""Asks our receiver in SGLang servers what they hold of the files that they have loaded."""

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.engines.control import EngineControl
from slime.engines.rendezvous import listening_store, reserve_port
from slime.engines.sglang.file_check import FILES_KEY, check_key
from slime.engines.sglang.invitation import Invitation
from slime.errors import WeightSyncError
from slime.weights.receiver import Requests, sums_of

POLL_S = 0.005
_FIRST_SYNC = 0


class FileCheck:
    """Compares what SGLang servers made of files with the files; our receiver looks, in every rank.

    Args:
        control: the servers, whose --custom-weight-loader is our receiver; paused.
        host: address of this process that they can reach.
        timeout_s: deadline of one check, seconds.
    """

    def __init__(self, control: EngineControl, *, host: str, timeout_s: float) -> None:
        self._requests = Requests(control)
        self._host = host
        self._timeout_s = timeout_s

    def sums(self, folder: str | Path) -> list[dict[str, int]]:
        """Per server the checksum of each tensor in the files of `folder`, as all of its ranks read them.

        They are loaded once more, tensor by tensor, which has to change nothing.

        Raises:
            WeightSyncError: a rank could not read the files, two of them read different bytes, or what
                the server had made of them differs; names the parameters.
            EngineUnavailable: a server is dead.
        """
        ranks: list[range] = []
        end = 1
        for size in self._requests.sizes():
            ranks.append(range(end, end + size))
            end += size
        timeout = datetime.timedelta(seconds=self._timeout_s)
        port = reserve_port(self._host)
        store = listening_store(self._host, port, end, timeout)
        store.set(FILES_KEY, json.dumps(str(folder)))
        self._requests.start(
            [[self._invitation(port, rank, end) for rank in of_server] for of_server in ranks],
            flush=False,
        )
        answers = self._answers(store, range(1, end))
        self._requests.end()
        _check_unchanged(answers, folder)
        return [
            _sums([answers[rank - 1] for rank in of_server], url)
            for of_server, url in zip(ranks, self._requests.urls, strict=True)
        ]

    def _invitation(self, port: int, rank: int, world_size: int) -> Invitation:
        return Invitation(
            host=self._host,
            port=port,
            group="",
            rank=rank,
            world_size=world_size,
            way="file",
            sync=_FIRST_SYNC,
            compare=True,
            timeout_s=self._timeout_s,
        )

    def _answers(self, store: Any, ranks: Sequence[int]) -> list[dict[str, Any]]:
        keys = [check_key(rank) for rank in ranks]
        deadline = time.monotonic() + self._timeout_s
        while not store.check(keys):
            self._requests.check(may_have_ended=True)
            if time.monotonic() > deadline:
                raise WeightSyncError(
                    f"weight sync failed: the engines did not check their files within {self._timeout_s:.0f} s; "
                    "see their logs in the run folder"
                )
            time.sleep(POLL_S)
        answers: list[dict[str, Any]] = [json.loads(store.get(key)) for key in keys]
        for rank, answer in zip(ranks, answers, strict=True):
            if error := answer.get("error"):
                raise WeightSyncError(
                    f"weight sync failed: rank {rank} of {len(keys)} could not check its files: {error}. The "
                    "engines stay paused; their logs in the run folder tell more."
                )
        return answers


def _sums(answers: Sequence[dict[str, Any]], url: str) -> dict[str, int]:
    names = tuple(answers[0]["sums"])
    rows = [{"sums": [answer["sums"].get(name) for name in names]} for answer in answers]
    return sums_of(names, rows, url)


def _check_unchanged(answers: Sequence[dict[str, Any]], folder: str | Path) -> None:
    changed = sorted({name for answer in answers for name in answer["changed"]})
    if changed:
        raise WeightSyncError(
            f"SGLang made of the files in {folder} something else than of their tensors, one by one: "
            f"{len(changed)} of its parameters differ: {', '.join(changed[:8])}. So what a weight sync "
            "brings would not be what a checkpoint brings. Of weights in 8 bits it is so on cards where SGLang "
            "processes them after loading: give the bf16 model as --hf-checkpoint there. Otherwise report this "
            "with the model's config.json."
        )
