"""EngineControl endpoints of the embedded server: everything that is not generation."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from slime.engines.control_requests import (
    AbortRequest,
    DiskUpdate,
    DistributedUpdate,
    TensorUpdate,
    UpdateOptions,
    WeightsGroup,
    memory_tags,
    pause_mode,
)
from slime.engines.embedded.engine import EngineLoop
from slime.engines.embedded.requests import Request
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.embedded.weight_groups import WeightGroups
from slime.engines.embedded.weights import ParameterStore
from slime.engines.json_fields import Fields
from slime.engines.protocol import Json, MemoryTag, PauseMode, update_answer
from slime.errors import CheckpointError, EngineProtocolError

Loader = Callable[[], dict[str, int]]


class Controller:
    """Answers control requests; each method takes a decoded body and returns the answer.

    Attributes:
        released: parts of the memory that are released; generation is refused meanwhile.
    """

    def __init__(self, loop: EngineLoop, store: ParameterStore) -> None:
        self._loop = loop
        self._store = store
        self._groups = WeightGroups()
        self.released: frozenset[MemoryTag] = frozenset()

    async def abort(self, body: Json) -> Json:
        """End requests by id, or all."""
        wanted = AbortRequest.from_json(body)
        count = await self._run(lambda s: s.abort(lambda r: wanted.matches(r.rid), "aborted"))
        return {"success": True, "num_aborted": count}

    async def pause(self, body: Json) -> Json:
        """Stop generating."""
        mode: PauseMode = pause_mode(body)
        await self._run(lambda s: s.pause(mode))
        return {"status": "ok", "message": f"paused, mode {mode}"}

    async def resume(self, body: Json) -> Json:
        """Go on generating."""
        await self._run(Scheduler.resume)
        return {"status": "ok", "message": "generation goes on"}

    async def flush_cache(self, body: Json) -> Json:
        """Forget cached prompts; refused while any request waits or runs."""
        await self._run(partial(_when_idle, "flush_cache", lambda s: s.shared.clear()))
        return {"success": True, "message": "cache flushed"}

    async def release_memory(self, body: Json) -> Json:
        """Free keys and values and refuse to generate until `resume_memory`.

        Weights stay where they are: on a CPU there is nobody to hand their memory to.
        """
        tags = memory_tags(body)
        await self._run(partial(_when_idle, "release_memory_occupation", partial(_release, tags)))
        self.released |= tags
        return {"success": True, "message": f"released {', '.join(sorted(tags))}"}

    async def resume_memory(self, body: Json) -> Json:
        """Take released parts back."""
        self.released -= memory_tags(body)
        return {"success": True, "message": f"still released: {sorted(self.released)}"}

    async def init_group(self, body: Json) -> Json:
        """Join a process group that will bring weights."""
        request = WeightsGroup.from_json(body)
        await asyncio.to_thread(self._groups.join, request)
        return update_answer(True, f"joined {request.group_name} as rank {request.rank}")

    async def destroy_group(self, body: Json) -> Json:
        """Leave a process group."""
        name = Fields(body, "destroy_weights_update_group").string("group_name", "")
        was_member = self._groups.leave(name)
        return update_answer(was_member, f"{'left' if was_member else 'never joined'} {name!r}")

    async def update_from_distributed(self, body: Json) -> Json:
        """Load tensors that rank 0 of a group broadcasts."""
        update = DistributedUpdate.from_json(body)
        return await self._update(partial(self._load_distributed, update), update.options)

    async def update_from_tensor(self, body: Json) -> Json:
        """Load tensors from the request's body."""
        update = TensorUpdate.from_json(body)
        return await self._update(partial(self._store.load_parts, update.parts), update.options)

    async def update_from_disk(self, body: Json) -> Json:
        """Load a folder."""
        update = DiskUpdate.from_json(body)
        return await self._update(
            partial(self._store.load_files, update.model_path), update.options
        )

    async def update_version(self, body: Json) -> Json:
        """Stamp another version on answers from now on."""
        fields = Fields(body, "update_weight_version")
        version = fields.raw.get("new_version")
        if version is None:
            raise EngineProtocolError("update_weight_version.new_version is missing")
        if fields.boolean("abort_all_requests", False):
            await self._run(lambda s: s.abort(_anything, "aborted by a new weight version"))
        await self._run(lambda s: s.weights_changed(str(version)))
        return {"success": True, "message": "weight version set", "new_version": str(version)}

    def _load_distributed(self, update: DistributedUpdate) -> dict[str, int]:
        problem: CheckpointError | None = None
        for name, shape in zip(update.names, update.shapes, strict=True):
            try:
                self._store.check(name, shape)
            except CheckpointError as error:
                problem = problem or error
        # Received even when refused: the other engines and the trainer wait in this collective.
        tensors = self._groups.receive(update)
        if problem is not None:
            raise problem
        return self._store.load(tensors)

    async def _update(self, load: Loader, options: UpdateOptions) -> Json:
        """Load between two steps of the engine; requests go on with the KV they have."""

        def work(scheduler: Scheduler) -> dict[str, int]:
            if options.abort_all_requests:
                scheduler.abort(_anything, "aborted by a weight update")
            sums = load()
            scheduler.weights_changed(options.weight_version)
            scheduler.stats.weight_updates += 1
            return sums

        sums = await self._run(work)
        return update_answer(True, f"loaded {len(sums)} tensors", sums)

    async def _run[T](self, work: Callable[[Scheduler], T]) -> T:
        return await asyncio.wrap_future(self._loop.call(work))


def _anything(_: Request) -> bool:
    return True


def _release(tags: frozenset[MemoryTag], scheduler: Scheduler) -> None:
    if MemoryTag.KV_CACHE in tags:
        scheduler.release_memory()


def _when_idle(name: str, work: Callable[[Scheduler], Any], scheduler: Scheduler) -> None:
    if not scheduler.is_idle:
        raise EngineProtocolError(
            f"{name} needs an idle engine; {scheduler.table.active} requests run and "
            f"{len(scheduler.waiting)} wait: abort them or wait for them first"
        )
    work(scheduler)
