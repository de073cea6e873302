"""The fused decoder reads the model's own parameters: what is loaded there later counts here."""

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_model

from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.weights import ParameterStore

IDS = np.arange(12).reshape(2, 6)


def hidden(runner: ModelRunner) -> torch.Tensor:
    cache = runner.new_cache(2)
    cache.reserve(2, 32)
    return runner.prefill(cache, 0, IDS)


def test_weights_loaded_later_are_seen_and_keep_their_names() -> None:
    source, model = tiny_model("qwen3"), tiny_model("qwen3")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.1)
    names = set(model.state_dict())
    runner = ModelRunner(model, attention="fused")
    before = hidden(runner)
    store = ParameterStore(model)
    assert set(model.state_dict()) == names
    store.load(source.state_dict().items())
    assert not torch.allclose(hidden(runner), before, atol=1e-3)
    assert torch.equal(hidden(runner), hidden(ModelRunner(source, attention="fused")))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_second_runner_of_a_model_reads_the_same_memory() -> None:
    model = tiny_model("qwen3")
    first, second = (ModelRunner(model, attention="fused") for _ in range(2))
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.v_proj.weight.mul_(2.0)
        model.get_decoder().layers[1].mlp.up_proj.weight.mul_(0.5)
    assert torch.equal(hidden(first), hidden(second))


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_prefill_and_decode_give_the_same_hidden_states(name: str) -> None:
    runner = ModelRunner(tiny_model(name), attention="fused")
    cache = runner.new_cache(8)
    cache.reserve(8, 32)
    whole = runner.logits(runner.prefill(cache, 0, IDS)[:, -1])
    runner.prefill(cache, 0, np.ascontiguousarray(IDS[:, :-1]))
    step = runner.decode(cache, IDS[:, -1].copy(), np.full(2, IDS.shape[1] - 1), 32)
    assert torch.allclose(whole, step, atol=1e-5)


def test_positions_beyond_the_first_table_are_rotated_as_the_model_rotates_them() -> None:
    model = tiny_model("qwen3")
    runner = ModelRunner(model, attention="fused")
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, 700)
    if runner.context_length < len(ids):
        ids = ids[: runner.context_length]
    cache = runner.new_cache(1)
    cache.reserve(1, len(ids))
    ours = runner.logits(runner.prefill(cache, 0, ids[None])[0])
    assert torch.allclose(ours, runner.teacher_forced(ids), atol=1e-4)


def test_half_precision_is_left_to_transformers() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.bfloat16"):
        ModelRunner(tiny_model("qwen3").to(torch.bfloat16), attention="fused")
