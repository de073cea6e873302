"""Pack: the samples of one micro-batch as one stream of tokens, what keeps them apart, and what
they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from slime.data.batch import RolloutBatch

# Sequences shorter than this share of the longest one get a bucket of their own; at 0.75 padding
# costs at most a third more attention, and attention is a few percent of a short sequence's work.
_BUCKET_RATIO = 0.75
_PAD_TOKEN = 0


@dataclass(frozen=True)
class PaddedLayout:
    """How a device without variable-length attention computes it: pad, attend, take out again.

    Sequences of similar length share a bucket, laid out as [num_sequences, length] slots; the slots
    of all buckets stand end to end.

    Attributes:
        buckets: (num_sequences, length) of each.
        gather: [slots] int64, position in the pack of each slot's token; padding repeats its
            sequence's last token.
        scatter: [T] int64, slot of each token of the pack; of a shared prompt, in its first
            sequence.
        copies: ([C] slots, [C] positions in the pack) of shared prompts in their other sequences;
            None = nothing is shared.
    """

    buckets: tuple[tuple[int, int], ...]
    gather: Tensor
    scatter: Tensor
    copies: tuple[Tensor, Tensor] | None = None


@dataclass
class Packed(PackedSeqParams):
    """Megatron's description of a packed stream, with positions and, on CPU, a padded layout.

    `qkv_format` is "packed", a word stock layers do not know: they keep [T, 1, ...] tensors and do
    no per-sequence slicing, and our layers read the rest.

    Attributes:
        position_ids: [T] int64, position of each token in its own sequence.
        outputs: [N] int64, the tokens whose last hidden state is used; None = all.
        padded: layout for attention without a variable-length kernel; None on CUDA.
    """

    position_ids: Tensor | None = None
    outputs: Tensor | None = None
    padded: PaddedLayout | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One forward/backward: a pack, and where in it responses are predicted.

    N counts response tokens of all samples, in order.

    Attributes:
        tokens: [1, T] int64, padding last.
        packed: sequences of the pack; padding is one more sequence.
        predict: [N] int64, position in the pack whose hidden state predicts the response token.
        targets: [N] int64, the response tokens.
        segments: [N] int64, index within `samples`.
        samples: positions in the rank's batch.
        response_lengths: of those samples; sums to N.
    """

    tokens: Tensor
    packed: Packed
    predict: Tensor
    targets: Tensor
    segments: Tensor
    samples: tuple[int, ...]
    response_lengths: tuple[int, ...]


def pack_micro_batch(
    batch: RolloutBatch, samples: Sequence[int], *, device: torch.device, multiple: int = 1
) -> MicroBatch:
    """The samples at these positions of `batch` as one pack.

    On a CPU samples with the same prompt share it: under a causal mask its hidden states do not
    depend on what follows, so they are computed once, and each response attends to them.

    Args:
        multiple: the pack is padded to a multiple of this many tokens.
    """
    all_rows = batch.tokens.rows()
    rows = [all_rows[i] for i in samples]
    lengths = [len(row) for row in rows]
    responses = tuple(batch.response_lengths[i] for i in samples)
    owners = list(range(len(rows)))
    if device.type != "cuda":  # variable-length kernels want every sequence whole
        owners = _prompt_owners(rows, responses)
    padding = -sum(lengths) % multiple
    rows.append(torch.full((padding,), _PAD_TOKEN, dtype=torch.int64))
    prompts = [n - r for n, r in zip(lengths, responses, strict=True)]
    skipped = [0 if o == i else prompts[i] for i, o in enumerate(owners)]
    places = _place_tokens([*lengths, padding], [*owners, len(owners)], [*skipped, 0])
    stream = torch.cat([row[n:] for row, n in zip(rows, [*skipped, 0], strict=True)])
    ends = torch.tensor(list(accumulate(lengths)))
    counts = torch.tensor(responses)
    segments = torch.repeat_interleave(torch.arange(len(samples)), counts)
    # The k-th response token of a sample stands `response - k` before its end; one earlier predicts
    # it.
    targets_at = torch.arange(len(segments)) + (ends - counts.cumsum(0))[segments]
    packed = _packed([*lengths, padding] if padding else lengths, places, device)
    packed.outputs = places.in_pack[targets_at - 1].to(device)
    return MicroBatch(
        tokens=stream[None].to(device),
        packed=packed,
        predict=packed.outputs,
        targets=stream[places.in_pack[targets_at]].to(device),
        segments=segments.to(device),
        samples=tuple(samples),
        response_lengths=responses,
    )


def _prompt_owners(rows: Sequence[Tensor], responses: Sequence[int]) -> list[int]:
    """For each row the first one with the same prompt."""
    data, width = torch.cat(list(rows)).numpy().tobytes(), 8  # one copy, then slices of it
    first: dict[bytes, int] = {}
    owners: list[int] = []
    start = 0
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        length = len(row)
        owners.append(first.setdefault(data[start : start + width * (length - response)], i))
        start += width * length
    return owners


@dataclass(frozen=True)
class _Places:
    """Where tokens stand; U counts the tokens of all sequences, shared ones each time.

    Attributes:
        in_pack: [U] int64, position in the pack.
        is_copy: [U] bool, a token of a shared prompt in another sequence than its first.
        positions: [U] int64, position in its own sequence.
        piece_lengths: [sequences] tokens that each adds to the pack.
    """

    in_pack: Tensor
    is_copy: Tensor
    positions: Tensor
    piece_lengths: Tensor


def _place_tokens(lengths: list[int], owners: list[int], skipped: list[int]) -> _Places:
    """Places of sequences that leave out their first `skipped` tokens, which `owners` hold."""
    sizes, gaps = torch.tensor(lengths), torch.tensor(skipped)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    positions = torch.arange(len(sequence)) - (sizes.cumsum(0) - sizes)[sequence]
    pieces = sizes - gaps
    starts = pieces.cumsum(0) - pieces
    is_copy = positions < gaps[sequence]
    own = (starts - gaps)[sequence] + positions
    shared = starts[torch.tensor(owners)][sequence] + positions
    return _Places(torch.where(is_copy, shared, own), is_copy, positions, pieces)


def _packed(lengths: list[int], places: _Places, device: torch.device) -> Packed:
    ends = places.piece_lengths.cumsum(0)[: len(lengths)]
    boundaries = torch.cat([torch.zeros(1, dtype=ends.dtype), ends]).to(torch.int32).to(device)
    return Packed(
        qkv_format="packed",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        position_ids=places.positions[~places.is_copy].to(device),
        padded=None if device.type == "cuda" else _shared_layout(padded_layout(lengths), places),
    )


def _shared_layout(whole: PaddedLayout, places: _Places) -> PaddedLayout:
    """The layout of whole sequences, made to read shared prompts where they are."""
    if not places.is_copy.any():
        return whole
    copies = places.is_copy.nonzero()[:, 0]
    return PaddedLayout(
        buckets=whole.buckets,
        gather=places.in_pack[whole.gather],
        scatter=whole.scatter[~places.is_copy],
        copies=(whole.scatter[copies], places.in_pack[copies]),
    )


def padded_layout(lengths: Sequence[int]) -> PaddedLayout:
    """Buckets of similar length for these sequences, which stand in the pack in this order."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    scatter = torch.empty(int(sizes.sum()), dtype=torch.int64)
    buckets: list[tuple[int, int]] = []
    gathers: list[Tensor] = []
    num_slots = 0
    for members in _group_by_length(lengths):
        length = lengths[members[0]]
        own, first = sizes[members][:, None], starts[members][:, None]
        offsets = torch.arange(length)[None]
        gather = first + torch.minimum(offsets, own - 1)
        slots = num_slots + torch.arange(gather.numel()).view_as(gather)
        is_real = offsets < own
        scatter[gather[is_real]] = slots[is_real]
        buckets.append((len(members), length))
        gathers.append(gather.reshape(-1))
        num_slots += gather.numel()
    return PaddedLayout(tuple(buckets), torch.cat(gathers), scatter)


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes, longest first, cut where one is under `_BUCKET_RATIO` of its group's longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= _BUCKET_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
