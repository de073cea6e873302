"""Trainer and engines on the same devices: who has the memory when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from slime.engines.protocol import MemoryTag
from slime.observability.phases import Phase, phase
from slime.orchestration.train_group import TrainGroup

# After the weights, which land before the cache takes what is free.
_TO_GENERATE = (MemoryTag.KV_CACHE, MemoryTag.CUDA_GRAPH)

Wait = Callable[[Any, str], Any]


class Turns:
    """Memory of shared devices handed from one side to the other; nothing happens where neither leaves.

    On a CPU SGLang's part has no effect; the trainer sleeps there too, so that one path is tested.

    A round: engines generate, trainer sleeping; engines leave and the trainer wakes up; it trains;
    engines take memory for weights, get them, the trainer sleeps, and engines take the rest.

    Args:
        manager: handle of the rollout manager.
        group: the trainers.
        trainer_leaves: `--offload-train`.
        engines_leave: `--offload-rollout`.
        wait: waits for a call of the manager, (call, what it does).
    """

    def __init__(
        self,
        manager: Any,
        group: TrainGroup,
        *,
        trainer_leaves: bool,
        engines_leave: bool,
        wait: Wait,
    ) -> None:
        self._manager = manager
        self._group = group
        self._trainer_leaves = trainer_leaves
        self._engines_leave = engines_leave
        self._wait = wait
        self._trainer_is_away = False
        self._engines_are_away = False

    def trainers(self) -> None:
        """The trainer's turn, with all of the engines' memory."""
        if self._engines_leave and not self._engines_are_away:
            self._release()
            self._engines_are_away = True
        self._wake_trainer()

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Both sides have their weights inside; afterwards it is the engines' turn."""
        self._wake_trainer()
        if self._engines_are_away:
            self._resume(MemoryTag.WEIGHTS)
        yield
        self._send_trainer_to_sleep()
        if self._engines_are_away:
            self._resume(*_TO_GENERATE)
            self._engines_are_away = False

    @contextmanager
    def save(self) -> Iterator[None]:
        """The trainer has its state inside; engines keep their weights, but not what they cached."""
        if not self._trainer_is_away:
            yield
            return
        if self._engines_leave:
            self._release(*_TO_GENERATE)
        self._wake_trainer()
        yield
        self._send_trainer_to_sleep()
        if self._engines_leave:
            self._resume(*_TO_GENERATE)

    def _wake_trainer(self) -> None:
        if self._trainer_is_away:
            with phase(Phase.OFFLOAD):
                self._group.wake_up()
            self._trainer_is_away = False

    def _send_trainer_to_sleep(self) -> None:
        if self._trainer_leaves:
            with phase(Phase.OFFLOAD):
                self._group.sleep()
            self._trainer_is_away = True

    def _release(self, *tags: MemoryTag) -> None:
        with phase(Phase.OFFLOAD):
            self._wait(self._manager.release_engines.remote(tags), "release the engines' memory")

    def _resume(self, *tags: MemoryTag) -> None:
        with phase(Phase.OFFLOAD):
            self._wait(self._manager.resume_engines.remote(tags), "resume the engines' memory")
