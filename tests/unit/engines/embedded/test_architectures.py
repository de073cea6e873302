"""Every architecture's log-probs are those of one teacher-forced pass; what differs is refused."""

import pytest
from support.engine_runs import largest_difference, make_request, random_prompts, run_all
from support.tiny_models import tiny_model

from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.scheduler import Scheduler, SchedulerLimits
from slime.engines.embedded.selfcheck import check_model
from slime.errors import EngineError

# fp32, two layers: seen at most 3e-6 on any of them.
TOLERANCE = 1e-5
SUPPORTED = (
    "qwen3", "qwen3_tied", "qwen2", "llama", "mistral", "gemma3", "glm4", "olmo2",
    "qwen3_moe", "glm4_moe", "deepseek_v3",
)  # fmt: skip


def difference(name: str, attention: str) -> float:
    """Over 20 requests of mixed lengths and parameters on 8 slots, some longer than a window."""
    runner = ModelRunner(tiny_model(name), attention=attention)
    scheduler = Scheduler(runner, SchedulerLimits(max_running=8, prefill_tokens=128))
    values = [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}]
    requests = [
        make_request(prompt, seed=i, max_new_tokens=6 + i % 5, **values[i % 5])
        for i, prompt in enumerate(random_prompts(20, high=40))
    ]
    run_all(scheduler, requests)
    assert all(len(request.output_ids) == request.max_out for request in requests)
    return largest_difference(runner, requests)


@pytest.mark.parametrize("name", SUPPORTED)
def test_log_probs_agree_with_a_teacher_forced_pass(name: str) -> None:
    assert difference(name, "slots") <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "qwen2", "llama"])
def test_the_fused_decoder_agrees_too(name: str) -> None:
    assert difference(name, "fused") <= TOLERANCE


@pytest.mark.parametrize("name", sorted({*SUPPORTED} - {"qwen3", "qwen3_tied", "qwen2", "llama"}))
def test_another_architecture_runs_without_the_fused_decoder(name: str) -> None:
    with pytest.raises(NotImplementedError, match="fused decoder"):
        ModelRunner(tiny_model(name), attention="fused")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_other_attention_functions_agree_too(name: str, attention: str) -> None:
    assert difference(name, attention) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")  # transformers' own notes on this config
def test_attention_sinks_make_the_self_check_choose_eager() -> None:
    checked = check_model(tiny_model("gpt_oss"), max_running=8)
    assert checked.runner.attention == "eager"
    assert checked.difference <= TOLERANCE


def test_the_fastest_attention_that_passes_is_chosen() -> None:
    checked = check_model(tiny_model("qwen3"), max_running=8)
    assert checked.runner.attention == "fused"
    assert checked.difference <= TOLERANCE


def test_a_model_whose_logits_are_changed_after_the_output_layer_is_refused() -> None:
    with pytest.raises(EngineError, match=r"self-check failed.*differ"):
        check_model(tiny_model("gemma2"), max_running=8)


def test_linear_attention_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="linear_attention"):
        check_model(tiny_model("qwen3_next"), max_running=8)


def test_greedy_answers_equal_generate() -> None:
    model = tiny_model("qwen3")
    runner = ModelRunner(model)
    requests = run_all(
        Scheduler(runner, SchedulerLimits(max_running=8)),
        [make_request(p, temperature=0, max_new_tokens=20) for p in random_prompts(4)],
    )
    import torch

    for request in requests:
        expected = model.generate(
            torch.from_numpy(request.prompt)[None],
            attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
        )
        assert expected[0, len(request.prompt) :].tolist() == request.output_ids
