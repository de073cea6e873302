import pytest
import torch
from support.megatron_runs import grouped, random_batch

from slime.backends.megatron.packs.pack import pack_micro_batch, padded_layout

CPU = torch.device("cpu")


def test_each_response_token_is_predicted_from_the_token_before_it() -> None:
    batch = random_batch(num_samples=5, vocab_size=50, seed=3)
    micro = pack_micro_batch(batch, [3, 0, 4], device=CPU)
    rows = [batch.tokens.rows()[i] for i in (3, 0, 4)]
    responses = [batch.response_lengths[i] for i in (3, 0, 4)]
    pairs = zip(rows, responses, strict=True)
    assert torch.equal(micro.targets, torch.cat([row[-r:] for row, r in pairs]))
    assert torch.equal(micro.tokens[0, micro.predict + 1], micro.targets)
    assert micro.segments.tolist() == [s for s, r in enumerate(responses) for _ in range(r)]
    assert micro.response_lengths == tuple(responses)


def test_positions_start_again_with_each_sequence_and_padding_is_one_more() -> None:
    batch = random_batch(num_samples=3, vocab_size=50, seed=4)
    micro = pack_micro_batch(batch, [0, 1, 2], device=CPU, multiple=64)
    lengths = list(batch.tokens.lengths)
    padding = -sum(lengths) % 64
    assert micro.tokens.shape == (1, sum(lengths) + padding)
    assert micro.packed.position_ids is not None
    expected = [p for n in [*lengths, padding] for p in range(n)]
    assert micro.packed.position_ids.tolist() == expected
    assert micro.packed.cu_seqlens_q.diff().tolist() == [*lengths, padding]


@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [5, 1, 9, 2, 8, 8], [30, 29, 25, 23, 4]])
def test_padded_layout_holds_every_token_in_its_own_sequence(lengths: list[int]) -> None:
    layout = padded_layout(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert torch.equal(layout.gather[layout.scatter], torch.arange(sum(lengths)))
    start = 0
    for count, length in layout.buckets:
        slots = layout.gather[start : start + count * length].view(count, length)
        assert (owner[slots] == owner[slots[:, :1]]).all()
        assert (slots.diff(dim=1) >= 0).all()  # order kept, padding repeats the last token
        start += count * length
    assert start == len(layout.gather)


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    layout = padded_layout([4000, *[20] * 100])
    assert layout.buckets == ((1, 4000), (100, 20))


def test_a_shared_prompt_stands_once_and_every_response_predicts_from_it() -> None:
    batch = grouped(random_batch(num_samples=6, vocab_size=50, seed=5), group_size=3)
    order = [1, 5, 0, 2, 3, 4]  # groups are found by their tokens, not by their order
    micro = pack_micro_batch(batch, order, device=CPU)
    rows = [batch.tokens.rows()[i] for i in order]
    responses = [batch.response_lengths[i] for i in order]
    prompts = {tuple(row[:-r].tolist()) for row, r in zip(rows, responses, strict=True)}
    assert micro.tokens.shape[1] == sum(map(len, prompts)) + sum(responses)
    assert torch.equal(
        micro.targets, torch.cat([row[-r:] for row, r in zip(rows, responses, strict=True)])
    )
    before = torch.cat([row[-r - 1 : -1] for row, r in zip(rows, responses, strict=True)])
    assert torch.equal(micro.tokens[0, micro.predict], before)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    layout, plain = micro.packed.padded, padded_layout([len(row) for row in rows])
    assert layout is not None
    assert layout.copies is not None
    assert micro.packed.position_ids is not None
    assert torch.equal(micro.tokens[0, layout.gather], torch.cat(rows)[plain.gather])
    assert torch.equal(micro.packed.position_ids[layout.gather], positions[plain.gather])
    slots, tokens = layout.copies
    assert torch.equal(layout.gather[slots], tokens)
    assert torch.equal(
        torch.cat([slots, layout.scatter]).sort().values, plain.scatter.sort().values
    )
