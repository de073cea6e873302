"""Continuous batching changes no answer; pausing, aborting and full memory lose no token."""

import numpy as np
import pytest
import torch
from support.engine_runs import (
    largest_difference,
    make_request,
    make_scheduler,
    random_prompts,
    run_all,
)
from support.tiny_models import EOS, char_tokenizer, tiny_model

from slime.engines.embedded.detokenize import Detokenizer, StopStrings
from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.requests import Request
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.protocol import PauseMode

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(tiny_model("qwen3"))


def steps(scheduler: Scheduler, count: int) -> None:
    for _ in range(count):
        scheduler.step()


def bits(request: Request) -> tuple[list[int], list[float]]:
    return request.output_ids, request.output_log_probs


def test_an_answer_has_the_same_bits_alone_and_in_any_company(runner: ModelRunner) -> None:
    values = [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 9}]

    def requests() -> list[Request]:
        return [
            make_request(prompt, seed=i, max_new_tokens=5 + i % 7, **values[i % 5])
            for i, prompt in enumerate(random_prompts(24))
        ]

    full = run_all(make_scheduler(runner, max_running=24), requests())
    narrow = run_all(make_scheduler(runner, max_running=3, prefill_tokens=40), requests())
    alone = [run_all(make_scheduler(runner), [request])[0] for request in requests()[:6]]
    assert [bits(r) for r in full] == [bits(r) for r in narrow]
    assert [bits(r) for r in alone] == [bits(r) for r in full[:6]]


def test_equal_prompts_are_read_once_and_answered_as_if_read_each(runner: ModelRunner) -> None:
    def group() -> list[Request]:
        return [make_request(PROMPT, seed=i, max_new_tokens=6) for i in range(6)]

    shared, single = make_scheduler(runner), make_scheduler(runner, share_prompts=False)
    assert [bits(r) for r in run_all(shared, group())] == [
        bits(r) for r in run_all(single, group())
    ]
    assert shared.stats.cached_tokens == 5 * len(PROMPT)
    assert single.stats.cached_tokens == 0


def test_a_late_sibling_copies_from_one_that_runs(runner: ModelRunner) -> None:
    scheduler = make_scheduler(runner)
    early = make_request(PROMPT, seed=1, max_new_tokens=8)
    late = make_request(PROMPT, seed=2, max_new_tokens=8)
    scheduler.add(early)
    steps(scheduler, 3)
    run_all(scheduler, [late])
    assert late.cached_tokens == len(PROMPT)
    assert bits(late) == bits(
        run_all(make_scheduler(runner), [make_request(PROMPT, seed=2, max_new_tokens=8)])[0]
    )


def test_nothing_is_shared_once_the_holders_are_gone_or_weights_changed(
    runner: ModelRunner,
) -> None:
    scheduler = make_scheduler(runner)
    run_all(scheduler, [make_request(PROMPT, max_new_tokens=2)])
    again = run_all(scheduler, [make_request(PROMPT, max_new_tokens=2)])[0]
    assert again.cached_tokens == 0
    scheduler.add(make_request(PROMPT, max_new_tokens=9))
    steps(scheduler, 2)
    scheduler.weights_changed("2")
    later = run_all(scheduler, [make_request(PROMPT, max_new_tokens=2)])[0]
    assert later.cached_tokens == 0


def test_finish_reasons(runner: ModelRunner) -> None:
    free = run_all(make_scheduler(runner), [make_request(PROMPT, seed=3, max_new_tokens=9)])[0]
    assert free.finish == {"type": "length", "length": 9}
    stop = free.output_ids[3]
    first = free.output_ids.index(stop)

    def run(**values: object) -> Request:
        request = make_request(PROMPT, seed=3, stop_ids=(60, 61, 62, 63, stop), **values)
        return run_all(make_scheduler(runner), [request])[0]

    stopped = run(max_new_tokens=9)
    assert stopped.finish == {"type": "stop", "matched": stop}
    assert stopped.output_ids == free.output_ids[: first + 1]
    assert run(max_new_tokens=9, ignore_eos=True).output_ids == free.output_ids
    # SGLang looks at the length first: a stop token in the last place is a `length`.
    assert run(max_new_tokens=first + 1).finish == {"type": "length", "length": first + 1}


def test_min_new_tokens_delays_the_stop_token(runner: ModelRunner) -> None:
    every = tuple(range(0, 64, 2))
    request = make_request(PROMPT, seed=1, stop_ids=every, max_new_tokens=20, min_new_tokens=6)
    run_all(make_scheduler(runner), [request])
    assert len(request.output_ids) > 6
    assert not set(request.output_ids[:6]) & set(every)


def test_penalties_change_the_answer_and_its_log_probs_stay_those_of_edited_logits(
    runner: ModelRunner,
) -> None:
    values = {"frequency_penalty": 1.5, "presence_penalty": 1.0, "repetition_penalty": 1.5}
    request = make_request(PROMPT, seed=4, max_new_tokens=12, **values)
    # Beside requests without penalties, so that only its own row may change.
    others = [make_request(PROMPT, seed=i, max_new_tokens=12) for i in range(3)]
    plain = run_all(make_scheduler(runner), [make_request(PROMPT, seed=0, max_new_tokens=12)])[0]
    run_all(make_scheduler(runner), [request, *others])
    assert bits(others[0]) == bits(plain)
    logits = runner.teacher_forced(request.tokens)[len(PROMPT) - 1 : -1]
    for i, token in enumerate(request.output_ids):
        row, seen = logits[i], np.bincount(request.output_ids[:i], minlength=64)
        counts = torch.from_numpy(seen)
        row = row - 1.5 * counts - 1.0 * (counts > 0)
        row = torch.where(counts > 0, torch.where(row > 0, row / 1.5, row * 1.5), row)
        expected = float(torch.log_softmax(row, -1)[token])
        assert request.output_log_probs[i] == pytest.approx(expected, abs=1e-5)


def test_stop_strings_end_an_answer(runner: ModelRunner) -> None:
    detokenizer = Detokenizer(char_tokenizer())
    free = run_all(make_scheduler(runner), [make_request(PROMPT, seed=3, max_new_tokens=9)])[0]
    text = detokenizer.decode(free.output_ids[3:5], skip_special_tokens=False)
    request = make_request(
        PROMPT, seed=3, max_new_tokens=9, stop_strings=StopStrings(detokenizer, (text,))
    )
    run_all(make_scheduler(runner), [request])
    assert request.finish == {"type": "stop", "matched": text}
    assert request.output_ids == free.output_ids[:5]


def test_no_new_tokens_scores_the_prompt(runner: ModelRunner) -> None:
    prompt = random_prompts(1, low=30, high=31)[0]
    request = make_request(prompt, max_new_tokens=0, logprob_start_len=4)
    run_all(make_scheduler(runner), [request, make_request(prompt, max_new_tokens=3)])
    logits = torch.log_softmax(runner.teacher_forced(request.prompt), -1)
    expected = logits[4:-1].gather(1, torch.tensor(prompt[5:])[:, None])[:, 0]
    assert request.finish == {"type": "length", "length": 0}
    assert request.output_ids == []
    assert request.input_log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def test_abort_returns_what_was_written(runner: ModelRunner) -> None:
    scheduler = make_scheduler(runner, max_running=2)
    requests = [make_request(PROMPT, f"r{i}", seed=i, max_new_tokens=50) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    steps(scheduler, 5)
    assert scheduler.abort(lambda r: r.rid != "r1", "enough") == 2
    assert [r.finish and r.finish["type"] for r in requests] == ["abort", None, "abort"]
    assert len(requests[0].output_ids) == len(requests[0].output_log_probs) == 5
    assert requests[2].output_ids == []
    assert largest_difference(runner, requests[:1]) < 1e-5
    run_all(scheduler, [])
    undisturbed = make_request(PROMPT, seed=1, max_new_tokens=50)
    assert bits(requests[1]) == bits(run_all(make_scheduler(runner), [undisturbed])[0])


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
def test_requests_go_on_after_a_pause(runner: ModelRunner, mode: PauseMode) -> None:
    def requests() -> list[Request]:
        return [make_request(p, seed=i, max_new_tokens=12) for i, p in enumerate(random_prompts(5))]

    undisturbed = run_all(make_scheduler(runner), requests())
    scheduler = make_scheduler(runner)
    paused = requests()
    for request in paused:
        scheduler.add(request)
    steps(scheduler, 4)
    scheduler.pause(mode)
    assert not scheduler.has_work
    assert scheduler.table.active == (5 if mode is PauseMode.IN_PLACE else 0)
    scheduler.resume()
    run_all(scheduler, [])
    assert [r.output_ids for r in paused] == [r.output_ids for r in undisturbed]
    # Reading tokens at once instead of one by one moves their KV in the last bits.
    assert largest_difference(runner, paused) < 1e-5
    if mode is PauseMode.IN_PLACE:
        assert [bits(r) for r in paused] == [bits(r) for r in undisturbed]


def test_retracted_requests_are_read_again_with_new_weights() -> None:
    old, new = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    runner = ModelRunner(old)
    scheduler = make_scheduler(runner)
    requests = [make_request(p, seed=i, max_new_tokens=12) for i, p in enumerate(random_prompts(4))]
    for request in requests:
        scheduler.add(request)
    steps(scheduler, 5)
    scheduler.pause(PauseMode.RETRACT)
    old.load_state_dict(new.state_dict())
    scheduler.weights_changed("2")
    scheduler.resume()
    run_all(scheduler, [])
    expected = ModelRunner(tiny_model("qwen3", seed=1))
    for request in requests:
        assert request.versions == [("default", 0), ("2", 5)]
        logits = expected.teacher_forced(request.tokens)[len(request.prompt) - 1 : -1]
        chosen = torch.tensor(request.output_ids)[:, None]
        after = torch.log_softmax(logits, -1).gather(1, chosen)[5:, 0]
        assert request.output_log_probs[5:] == pytest.approx(after.tolist(), abs=1e-5)


def test_a_waiting_request_carries_only_the_version_that_writes_it(runner: ModelRunner) -> None:
    scheduler = make_scheduler(runner)
    request = make_request(PROMPT, max_new_tokens=2)
    scheduler.add(request)
    scheduler.weights_changed("7")
    run_all(scheduler, [])
    assert request.versions == [("7", 0)]


def test_full_memory_makes_the_newest_wait_and_changes_no_token(runner: ModelRunner) -> None:
    def requests() -> list[Request]:
        return [
            make_request(p, seed=i, max_new_tokens=60)
            for i, p in enumerate(random_prompts(6, low=10))
        ]

    roomy = run_all(make_scheduler(runner), requests())
    probe = make_scheduler(runner)
    run_all(probe, [make_request(PROMPT, max_new_tokens=2)])
    # Room for eight rows of 32 tokens, not of 64: somebody must leave on the way.
    limit = 8 * 32 * probe.cache.bytes_per_token
    tight = make_scheduler(runner, max_kv_bytes=limit)
    done = run_all(tight, requests())
    assert tight.stats.num_retracted > 0
    assert [r.output_ids for r in done] == [r.output_ids for r in roomy]


def test_long_and_short_prompts_keep_to_the_prefill_budget(runner: ModelRunner) -> None:
    scheduler = make_scheduler(runner, prefill_tokens=64)
    prompts = [*random_prompts(4), *random_prompts(1, low=100, high=101), *random_prompts(2)]
    done = run_all(
        scheduler, [make_request(p, seed=i, max_new_tokens=4) for i, p in enumerate(prompts)]
    )
    assert largest_difference(runner, done) < 1e-5


def test_the_end_of_the_context_ends_an_answer(runner: ModelRunner) -> None:
    prompt = random_prompts(1, low=250, high=251)[0]
    request = make_request(prompt, max_new_tokens=6)
    run_all(make_scheduler(runner), [request])
    assert len(request.output_ids) == 6
    assert largest_difference(runner, [request]) < 1e-5


def test_weights_that_are_no_numbers_end_the_request_not_the_engine() -> None:
    model = tiny_model("qwen3")
    model.lm_head.weight[3, 0] = torch.nan
    request = make_request(PROMPT, max_new_tokens=5)
    run_all(make_scheduler(ModelRunner(model)), [request])
    assert request.finish is not None
    assert request.finish["type"] == "abort"
    assert "not finite" in request.finish["message"]


def test_many_stop_ids_of_one_request_leave_others_alone(runner: ModelRunner) -> None:
    many = make_request(PROMPT, seed=1, stop_ids=tuple(range(64)), max_new_tokens=5)
    few = make_request(PROMPT, seed=2, stop_ids=(EOS,), max_new_tokens=5)
    run_all(make_scheduler(runner), [few, many])
    assert many.finish == {"type": "stop", "matched": many.output_ids[0]}
    assert len(few.output_ids) == 5 or few.output_ids[-1] == EOS
