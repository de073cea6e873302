"""Calls become requests this model can run; ended requests become SGLang's JSON."""

from typing import Any

import numpy as np
import pytest
from support.engine_runs import make_request
from support.tiny_models import EOS, char_tokenizer

from slime.engines.embedded.answers import RequestMaker, answer
from slime.engines.embedded.detokenize import Detokenizer
from slime.engines.embedded.seeds import child_seed
from slime.engines.embedded.stats import EngineStats, prometheus_text
from slime.engines.protocol import GenerateCall, finish_length
from slime.errors import EngineProtocolError

DETOKENIZER = Detokenizer(char_tokenizer())


def maker(detokenizer: Detokenizer | None = DETOKENIZER) -> RequestMaker:
    return RequestMaker(
        vocab_size=64, context_length=20, eos_ids=(EOS,), detokenizer=detokenizer, random_seed=0
    )


def requests(made: RequestMaker, **body: Any) -> list[Any]:
    return made.requests(GenerateCall.from_json({"input_ids": [5, 6, 7], **body}))


def test_answers_of_one_prompt_have_ids_and_seeds_of_their_own() -> None:
    made = requests(maker(), rid="x", sampling_params={"n": 3, "sampling_seed": 9})
    assert [r.rid for r in made] == ["x_0", "x_1", "x_2"]
    assert [r.seed for r in made] == [child_seed(9, i) for i in range(3)]
    given = requests(maker(), sampling_params={"n": 2}, sampling_seeds=[4, 5])
    assert [r.seed for r in given] == [4, 5]
    assert requests(maker(), sampling_params={"sampling_seed": 9})[0].seed == 9


def test_requests_without_a_seed_get_one_each_from_the_engines() -> None:
    def seeds() -> list[int]:
        made = maker()
        return [requests(made)[0].seed for _ in range(3)]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3


def test_the_context_bounds_the_answer() -> None:
    assert requests(maker())[0].max_out == 17
    assert requests(maker(), sampling_params={"max_new_tokens": 17})[0].max_out == 17
    assert requests(maker(), sampling_params={"max_new_tokens": None})[0].max_out == 17


def test_stop_ids_are_those_of_model_and_request() -> None:
    assert requests(maker(), sampling_params={"stop_token_ids": [7]})[0].stop_ids == (EOS, 7)


def test_text_is_encoded() -> None:
    made = maker().requests(GenerateCall.from_json({"text": "abc"}))
    assert DETOKENIZER.decode(made[0].prompt.tolist(), skip_special_tokens=True) == "abc"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": [64]}, "beyond the vocabulary"),
        ({"input_ids": [5] * 20}, "20 tokens and leaves no room in the context of 20"),
        ({"sampling_params": {"max_new_tokens": 18}}, "3 tokens and max_new_tokens is 18"),
        ({"return_logprob": True, "logprob_start_len": 4}, "logprob_start_len"),
    ],
)
def test_prompts_the_model_cannot_read_are_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineProtocolError, match=message):
        requests(maker(), **body)


def test_text_and_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(EngineProtocolError, match="tokenizer"):
        maker(None).requests(GenerateCall.from_json({"text": "abc"}))
    with pytest.raises(EngineProtocolError, match="tokenizer"):
        requests(maker(None), sampling_params={"stop": "x"})


def test_an_answer_has_sglangs_fields() -> None:
    request = make_request([5, 6, 7], "x", logprob_start_len=1)
    request.output_ids, request.output_log_probs = [3, 4], [-0.5, -1.5]
    request.input_log_probs = [-2.0]
    request.finish = finish_length(2)
    request.versions = [("3", 0)]
    request.finished_at = request.created_at + 2.0
    got = answer(request, DETOKENIZER)
    assert got["text"] == DETOKENIZER.decode([3, 4], skip_special_tokens=True)
    assert got["output_ids"] == [3, 4]
    meta = got["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 3, None], [-1.5, 4, None]]
    assert meta["input_token_logprobs"] == [[None, 6, None], [-2.0, 7, None]]
    assert meta["finish_reason"] == {"type": "length", "length": 2}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 2)
    assert meta["weight_version"] == "3"
    assert meta["weight_versions"] == [("3", 0)]
    assert meta["e2e_latency"] == 2.0
    request.versions.append(("4", 1))
    assert answer(request, None)["meta_info"]["weight_versions"] == [("3", 0), ("4", 1)]
    assert answer(request, None)["meta_info"]["weight_version"] == "4"


def test_metrics_are_prometheus_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    stats = EngineStats(num_requests=3, generation_tokens=7)
    text = prometheus_text({"num_running_reqs": 2, "gen_throughput": 1.5}, stats, 'a"b\\c')
    samples = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["sglang:num_running_reqs"] == (2.0, {"model_name": 'a"b\\c'})
    assert samples["sglang:generation_tokens_total"][0] == 7.0
    assert np.isclose(samples["sglang:gen_throughput"][0], 1.5)
