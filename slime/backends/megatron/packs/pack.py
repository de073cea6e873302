"""Pack: the samples of one micro-batch as one stream of tokens, what keeps them apart, and what
they share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from slime.backends.megatron.packs.context import ContextPlan, Ints, context_plan, local_tokens
from slime.data.batch import RolloutBatch

# Sequences shorter than this share of the longest one get a bucket of their own; at 0.75 padding
# costs at most a third more attention, and attention is a few percent of a short sequence's work.
_BUCKET_RATIO = 0.75
_PAD_TOKEN = 0

# Indexes are worked out in numpy: its small operations cost a third of torch's.


@dataclass(frozen=True)
class PaddedLayout:
    """Attention where there is no variable-length kernel: pad, attend, take out again.

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
    """Megatron's description of a packed stream, with positions and, if needed, a padded layout.

    `qkv_format` is "packed", a word stock layers do not know: they keep [T, 1, ...] tensors and do
    no per-sequence slicing, and our layers read the rest.

    Attributes:
        position_ids: [T] int64, position of each token in its own sequence.
        outputs: [N] int64, the tokens whose last hidden state is used; None = all.
        padded: layout for attention without a variable-length kernel.
        context: where other ranks' keys are, under context parallelism; `padded` is None then.
    """

    position_ids: Tensor | None = None
    outputs: Tensor | None = None
    padded: PaddedLayout | None = None
    context: ContextPlan | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One forward/backward: a pack, and where in it responses are predicted.

    N counts the response tokens of all samples, in order, that this rank predicts: all of them
    without context parallelism.

    Attributes:
        tokens: [1, T] int64, padding last.
        packed: sequences of the pack; padding is one more sequence.
        predict: [N] int64, position in the pack whose hidden state predicts the response token.
        targets: [N] int64, the response tokens.
        segments: [N] int64, index within `samples`.
        samples: positions in the rank's batch.
        response_lengths: of those samples, whole.
        origins: [T] int64 on the CPU, which of all tokens of those samples, one after the other,
            stands there; -1 = padding.
        owned: [N] int64, which of all their response tokens this rank predicts; None = all.
    """

    tokens: Tensor
    packed: Packed
    predict: Tensor
    targets: Tensor
    segments: Tensor
    samples: tuple[int, ...]
    response_lengths: tuple[int, ...]
    origins: Tensor
    owned: Tensor | None = None


def pack_micro_batch(
    batch: RolloutBatch,
    samples: Sequence[int],
    *,
    device: torch.device,
    multiple: int = 1,
    context: dist.ProcessGroup | None = None,
    keeps_all_rows: bool = False,
    has_varlen: bool = False,
) -> MicroBatch:
    """The samples at these positions of `batch` as one pack.

    Without variable-length attention samples with the same prompt share it: under a causal mask its
    hidden states do not depend on what follows, so they are computed once, and each response
    attends to them.

    Args:
        multiple: the pack, or each rank's part of it, is padded to a multiple of this many tokens.
        context: ranks that share each sequence; None or a group of one: this rank has all of it.
        keeps_all_rows: compute all tokens, each sample on its own and through the last layer.
        has_varlen: attention has a kernel for sequences of any length, each of which must be whole.
    """
    starts, lengths = batch.tokens.starts, [batch.tokens.lengths[i] for i in samples]
    values = batch.tokens.values.numpy()
    rows = [values[starts[i] : starts[i] + n] for i, n in zip(samples, lengths, strict=True)]
    responses = tuple([batch.response_lengths[i] for i in samples])
    if context is not None and context.size() > 1:
        micro = _pack_over_context(rows, tuple(samples), responses, device, multiple, context)
        if keeps_all_rows:
            micro.packed.outputs = None
        return micro
    owners = list(range(len(rows)))
    if not (has_varlen or keeps_all_rows):
        owners = _prompt_owners(rows, responses)
    padding = -sum(lengths) % multiple
    rows.append(np.full(padding, _PAD_TOKEN, dtype=np.int64))
    skipped = [
        0 if owner == i else length - response
        for i, (owner, length, response) in enumerate(zip(owners, lengths, responses, strict=True))
    ]
    places = _place_tokens([*lengths, padding], [*owners, len(owners)], [*skipped, 0])
    stream = np.concatenate([row[n:] for row, n in zip(rows, [*skipped, 0], strict=True)])
    ends, counts = np.cumsum(lengths), np.array(responses)
    origins = [
        np.arange(end - n + skip, end) for end, n, skip in zip(ends, lengths, skipped, strict=True)
    ]
    origins.append(np.full(padding, -1))
    segments = np.repeat(np.arange(len(rows) - 1), counts)
    # The k-th response token of a sample stands `response - k` before its end; one earlier predicts
    # it.
    targets_at = np.arange(len(segments)) + (ends - counts.cumsum())[segments]
    sequences = [*lengths, padding] if padding else lengths
    layout = None if has_varlen else _shared_layout(sequences, places, device)
    packed = _packed(sequences, places, layout, device)
    predict = torch.from_numpy(places.in_pack[targets_at - 1]).to(device)
    packed.outputs = None if keeps_all_rows else predict
    return MicroBatch(
        tokens=torch.from_numpy(stream)[None].to(device),
        packed=packed,
        predict=predict,
        targets=torch.from_numpy(stream[places.in_pack[targets_at]]).to(device),
        segments=torch.from_numpy(segments).to(device),
        samples=tuple(samples),
        response_lengths=responses,
        origins=torch.from_numpy(np.concatenate(origins)),
    )


def _pack_over_context(
    rows: Sequence[Ints],
    samples: tuple[int, ...],
    responses: tuple[int, ...],
    device: torch.device,
    multiple: int,
    group: dist.ProcessGroup,
) -> MicroBatch:
    """This rank's tokens of the pack; every sequence is padded so that it divides among the ranks."""
    rank, size = group.rank(), group.size()
    lengths = np.array([len(row) for row in rows])
    padded = [length + -length % (2 * size) for length in lengths.tolist()]
    if filler := -sum(padded) % (math.lcm(multiple, 2) * size):
        padded.append(filler)
    starts = np.cumsum(padded) - padded
    stream = np.full(sum(padded), _PAD_TOKEN, dtype=np.int64)
    origins = np.full(len(stream), -1, dtype=np.int64)
    end = 0
    for row, start in zip(rows, starts.tolist(), strict=False):
        stream[start : start + len(row)] = row
        origins[start : start + len(row)] = np.arange(end, end + len(row))
        end += len(row)
    positions = np.arange(len(stream)) - np.repeat(starts, padded)
    counts = np.array(responses)
    segments = np.repeat(np.arange(len(rows)), counts)
    ends = starts[: len(rows)] + lengths
    targets_at = np.arange(len(segments)) + (ends - counts.cumsum())[segments]
    local = local_tokens(padded, rank, size)
    place = np.full(len(stream), -1, dtype=np.int64)
    place[local] = np.arange(len(local))
    owned = (place[targets_at - 1] >= 0).nonzero()[0]
    plan = context_plan(padded, group, device)

    def on_device(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    predict = on_device(place[targets_at[owned] - 1])
    return MicroBatch(
        tokens=on_device(stream[local])[None],
        packed=Packed(
            qkv_format="packed",
            cu_seqlens_q=plan.cu_queries,
            cu_seqlens_kv=plan.cu_keys,
            max_seqlen_q=plan.longest[0],
            max_seqlen_kv=plan.longest[1],
            position_ids=on_device(positions[local]),
            outputs=predict,
            context=plan,
        ),
        predict=predict,
        targets=on_device(stream[targets_at[owned]]),
        segments=on_device(segments[owned]),
        samples=samples,
        response_lengths=responses,
        origins=torch.from_numpy(origins[local]),
        owned=on_device(owned),
    )


def _prompt_owners(rows: Sequence[Ints], responses: Sequence[int]) -> list[int]:
    """For each row the first one with the same prompt."""
    first: dict[bytes, int] = {}
    return [
        first.setdefault(row[: len(row) - response].tobytes(), i)
        for i, (row, response) in enumerate(zip(rows, responses, strict=True))
    ]


@dataclass(frozen=True)
class _Places:
    """Where tokens stand; U counts the tokens of all sequences, shared ones each time.

    Attributes:
        in_pack: [U] int64, position in the pack.
        is_copy: [U] bool, a token of a shared prompt in another sequence than its first.
        positions: [U] int64, position in its own sequence.
        piece_lengths: [sequences] tokens that each adds to the pack.
    """

    in_pack: Ints
    is_copy: npt.NDArray[np.bool_]
    positions: Ints
    piece_lengths: Ints


def _place_tokens(lengths: list[int], owners: list[int], skipped: list[int]) -> _Places:
    """Places of sequences that leave out their first `skipped` tokens, which `owners` hold."""
    sizes, gaps = np.array(lengths), np.array(skipped)
    sequence = np.repeat(np.arange(len(lengths)), sizes)
    positions = np.arange(len(sequence)) - (sizes.cumsum() - sizes)[sequence]
    pieces = sizes - gaps
    starts = pieces.cumsum() - pieces
    is_copy = positions < gaps[sequence]
    own, shared = starts - gaps, starts[owners]
    in_pack = np.where(is_copy, shared[sequence], own[sequence]) + positions
    return _Places(in_pack, is_copy, positions, pieces)


def _packed(
    lengths: list[int], places: _Places, layout: PaddedLayout | None, device: torch.device
) -> Packed:
    ends = places.piece_lengths.cumsum()[: len(lengths)]
    boundaries = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
    longest = max(lengths)
    return Packed(
        qkv_format="packed",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        position_ids=torch.from_numpy(places.positions[~places.is_copy]).to(device),
        padded=layout,
    )


def _shared_layout(lengths: list[int], places: _Places, device: torch.device) -> PaddedLayout:
    """The layout of whole sequences, made to read shared prompts where they are."""
    if not places.is_copy.any():
        return padded_layout(lengths, device)
    buckets, gather, scatter = _buckets_of_slots(lengths)
    copies = places.is_copy.nonzero()[0]
    gather, kept, slots, sources = (
        torch.from_numpy(values).to(device)
        for values in (
            places.in_pack[gather],
            scatter[~places.is_copy],
            scatter[copies],
            places.in_pack[copies],
        )
    )
    return PaddedLayout(buckets, gather, scatter=kept, copies=(slots, sources))


def padded_layout(lengths: Sequence[int], device: torch.device | None = None) -> PaddedLayout:
    """Buckets of similar length for these sequences, which stand in the pack in this order."""
    buckets, gather, scatter = _buckets_of_slots(lengths)
    return PaddedLayout(
        buckets, torch.from_numpy(gather).to(device), torch.from_numpy(scatter).to(device)
    )


def _buckets_of_slots(lengths: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], Ints, Ints]:
    """(buckets, gather, scatter) of a `PaddedLayout` that shares nothing."""
    sizes = np.array(lengths)
    starts = sizes.cumsum() - sizes
    scatter = np.empty(int(sizes.sum()), dtype=np.int64)
    buckets: list[tuple[int, int]] = []
    gathers: list[Ints] = []
    num_slots = 0
    for members in _group_by_length(lengths):
        length = lengths[members[0]]
        own, first = sizes[members][:, None], starts[members][:, None]
        gather = (first + np.minimum(np.arange(length), own - 1)).reshape(-1)
        # Padding repeats the last token: written backwards, its true slot is what stays.
        scatter[gather[::-1]] = np.arange(num_slots + gather.size - 1, num_slots - 1, -1)
        buckets.append((len(members), length))
        gathers.append(gather)
        num_slots += gather.size
    return tuple(buckets), np.concatenate(gathers), scatter


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes, longest first, cut where one is under `_BUCKET_RATIO` of its group's longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= _BUCKET_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
