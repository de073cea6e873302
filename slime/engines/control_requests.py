"""Control requests of the engine protocol: abort, pause, memory, weight updates."""

import re
from dataclasses import dataclass
from typing import Any, cast

from slime.engines.json_fields import Fields
from slime.engines.protocol import MemoryTag, PauseMode
from slime.errors import EngineProtocolError

DEFAULT_GROUP = "weight_update_group"


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortRequest:
    """End requests whose id begins with `rid`, or all of them."""

    rid: str
    abort_all: bool

    @classmethod
    def from_json(cls, raw: object) -> "AbortRequest":
        """Raises EngineProtocolError when neither is given."""
        fields = Fields(raw, "abort_request")
        rid, abort_all = fields.string("rid", ""), fields.boolean("abort_all", False)
        if not rid and not abort_all:
            raise EngineProtocolError('abort_request needs `rid` or "abort_all": true')
        return cls(rid=rid, abort_all=abort_all)

    def matches(self, rid: str) -> bool:
        """Whether a request of this id is meant (children of n > 1 begin with their parent's
        id)."""
        return self.abort_all or rid.startswith(self.rid)


def pause_mode(raw: object) -> PauseMode:
    """The mode of a /pause_generation body; abort when not given, as in SGLang."""
    mode = Fields(raw, "pause_generation").string("mode", PauseMode.ABORT)
    if mode not in tuple(PauseMode):
        raise EngineProtocolError(f"pause mode {mode!r} is none of {', '.join(PauseMode)}")
    return PauseMode(mode)


def memory_tags(raw: object) -> frozenset[MemoryTag]:
    """The parts a release or resume names; all of them when none is named."""
    tags = Fields(raw, "memory").strings("tags")
    if unknown := set(tags) - set(MemoryTag):
        raise EngineProtocolError(
            f"memory tags {sorted(unknown)} are none of {', '.join(MemoryTag)}"
        )
    return frozenset(map(MemoryTag, tags)) or frozenset(MemoryTag)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsGroup:
    """How to join the process group that brings weights; the trainer is rank 0 and holds the store.

    Attributes:
        timeout_s: deadline of each broadcast, seconds.
        join_timeout_s: how long to wait for the other members.
    """

    master_address: str
    master_port: int
    rank: int
    world_size: int
    group_name: str
    timeout_s: float
    join_timeout_s: float

    @classmethod
    def from_json(cls, raw: object) -> "WeightsGroup":
        """Raises EngineProtocolError for a rank outside 1 .. world_size - 1 or a backend other than
        gloo."""
        fields = Fields(raw, "init_weights_update_group")
        backend = fields.string("backend", "gloo")
        if backend != "gloo":
            raise EngineProtocolError(
                f"the embedded engine runs on CPU and joins gloo groups, not {backend}"
            )
        world_size = fields.integer("world_size", None, low=2)
        timeout_s = fields.number("timeout_s", 600.0, low=0.1)
        return cls(
            master_address=fields.string("master_address", None),
            master_port=fields.integer("master_port", None, low=1, high=65535),
            rank=fields.integer("rank_offset", None, low=1, high=world_size - 1),
            world_size=world_size,
            group_name=fields.string("group_name", DEFAULT_GROUP),
            timeout_s=timeout_s,
            join_timeout_s=fields.number("join_timeout_s", timeout_s, low=0.1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateOptions:
    """What every weight update may carry beside its tensors.

    Attributes:
        weight_version: the version from now on; None keeps the present one.
    """

    weight_version: str | None
    abort_all_requests: bool

    @classmethod
    def from_fields(cls, fields: Fields) -> "UpdateOptions":
        """`flush_cache` needs no place here: this engine never keeps a prompt's KV over an
        update."""
        version = fields.raw.get("weight_version")
        return cls(
            weight_version=None if version is None else str(version),
            abort_all_requests=fields.boolean("abort_all_requests", False),
        )


# Load format: all tensors of the bucket as one.
FLATTENED = "flattened_bucket"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedUpdate:
    """Tensors that rank 0 of a group broadcasts in this order, each flat and contiguous.

    Attributes:
        is_flattened: they come in one broadcast, their bytes one after the other (SGLang's
            `load_format` "flattened_bucket").
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group_name: str
    is_flattened: bool
    options: UpdateOptions

    @classmethod
    def from_json(cls, raw: object) -> "DistributedUpdate":
        """Raises EngineProtocolError when the three lists do not fit together, or for a load format of another kind."""
        fields = Fields(raw, "update_weights_from_distributed")
        names, dtypes = fields.strings("names"), fields.strings("dtypes")
        shapes = fields.raw.get("shapes")
        rows = cast(list[Any], shapes) if isinstance(shapes, list) else []
        if not names or not len(names) == len(dtypes) == len(rows):
            raise EngineProtocolError(
                "update_weights_from_distributed needs names, dtypes and shapes of one length, "
                f"got {len(names)}, {len(dtypes)} and {len(rows)}"
            )
        load_format = fields.raw.get("load_format")
        if load_format not in (None, FLATTENED):
            raise EngineProtocolError(
                f"update_weights_from_distributed.load_format {load_format!r}: known is {FLATTENED}"
            )
        return cls(
            names=names,
            is_flattened=load_format == FLATTENED,
            dtypes=tuple(dtype.removeprefix("torch.") for dtype in dtypes),
            shapes=tuple(_shape(row) for row in rows),
            group_name=fields.string("group_name", DEFAULT_GROUP),
            options=UpdateOptions.from_fields(fields),
        )


def _shape(value: object) -> tuple[int, ...]:
    sizes = tuple(cast(list[Any], value)) if isinstance(value, list) else (None,)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise EngineProtocolError(f"a shape must be a list of sizes, got {value!r:.80}")
    return cast(tuple[int, ...], sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorUpdate:
    """Tensors inside the request: each part is the base64 of a safetensors file's bytes."""

    parts: tuple[str, ...]
    options: UpdateOptions

    @classmethod
    def from_json(cls, raw: object) -> "TensorUpdate":
        """Raises EngineProtocolError for SGLang's pickled formats: bytes from a network are never
        unpickled here."""
        fields = Fields(raw, "update_weights_from_tensor")
        load_format = fields.string("load_format", "safetensors")
        if load_format != "safetensors":
            raise EngineProtocolError(
                f"load_format {load_format!r}: the embedded engine does not unpickle bytes from "
                'the network; send safetensors bytes in base64, "load_format": "safetensors"'
            )
        parts = fields.strings("serialized_named_tensors")
        if not parts or not all(re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", part) for part in parts):
            raise EngineProtocolError(
                "serialized_named_tensors must be a list of base64 texts, each the bytes of a "
                "safetensors file"
            )
        return cls(parts=parts, options=UpdateOptions.from_fields(fields))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUpdate:
    """A folder with a whole model in safetensors files."""

    model_path: str
    options: UpdateOptions

    @classmethod
    def from_json(cls, raw: object) -> "DiskUpdate":
        """Raises EngineProtocolError when the path is missing."""
        fields = Fields(raw, "update_weights_from_disk")
        path = fields.string("model_path", None)
        return cls(model_path=path, options=UpdateOptions.from_fields(fields))
