"""WeightsConfig: how the trainer's weights reach the engines."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weight sync."""

    update_weight_mode: Literal["full", "delta"] = flag(
        "full", "Send all weights, or only what changed, through files."
    )
    update_weight_transport: Literal["nccl", "disk"] = flag(
        "nccl", "Collectives of the device (NCCL on CUDA, gloo on CPU), or files."
    )
    update_weight_buffer_size: int = flag(512 * 1024 * 1024, "Bytes per bucket.", at_least=1)
    update_weights_interval: int = flag(1, "Rounds between syncs in train_async.py.", at_least=1)
    update_weights_in_flight: bool = flag(
        False,
        "train_async.py: sync in the middle of the round that is being generated, instead of after it; "
        "its answers go on with the new weights, and version_spans of each sample tells.",
    )
    update_weight_pause_mode: Literal["abort", "retract", "in_place"] | None = flag(
        None,
        "What a sync does with running requests. abort: their tokens are asked to go on afterwards; "
        "retract: the engine reads their tokens anew; in_place: it keeps what it has read with the old "
        "weights. By default retract on the embedded engine, abort on SGLang: both exact.",
    )
    verify_weight_sync: bool = flag(
        True, "Compare checksums of trainer and engines after each bucket."
    )
    weight_sync_timeout_s: float = flag(600.0, "Deadline of one sync, in seconds.", above=0)
    check_weight_update_equal: bool = flag(
        False, "Check after the first sync that the engines' weights are those they loaded."
    )
    update_weight_disk_dir: str | None = flag(
        None, "Folder of versions, weight_v000001 ...: one that trainer and engines share."
    )
    update_weight_disk_keep_files: bool = flag(
        False, "Keep old versions; without it the last one stays."
    )
    update_weight_delta_encoding: Literal["xor", "overwrite"] = flag(
        "xor", "How changed bytes are written: as a difference, or their places and values."
    )
    update_weight_delta_checksum: Literal["xxh3-128", "blake3", "adler32"] = flag(
        "xxh3-128", "Checksum of each tensor that changed, compared on the engines' hosts."
    )
    custom_update_weight_post_write_path: str | None = flag(
        None,
        "Function called on all training ranks when a version is written, before engines load it: "
        "fn(args, version_dir, engines' addresses).",
    )
    update_weight_local_checkpoint_dir: str | None = flag(
        None, "Folder on each engine's host for a copy of the weights, which engines load."
    )
