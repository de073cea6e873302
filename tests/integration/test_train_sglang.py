"""train.py with stock SGLang servers on a CPU: two of them on the slots of two training ranks.

And train_async.py with one, whose weights come in the middle of rounds.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import killing_reward, weights_midway
from support.engine_server import SGLANG_CPU, SGLANG_STAND_INS, running, sglang_spec
from support.train_runs import QUICKSTART, Run, Work, assert_side_adds_up, phases_of

from slime.engines.sglang.invitation import RECEIVER
from slime.observability.ledger import read_events
from slime.observability.ledger_audit import audit
from slime.rollout.base_types import flatten
from slime.rollout.unfinished import load_unfinished

pytestmark = pytest.mark.sglang

# With the functions of users in tests/support.
WITH_SUPPORT = (SGLANG_STAND_INS, SGLANG_CPU, Path(__file__).parents[1])
GRPO = (
    "--rollout-engine sglang --colocate --actor-num-gpus-per-node 2 --hf-checkpoint {work}/model "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label --apply-chat-template "
    "--rollout-shuffle --rm-type random --num-rollout 3 --rollout-batch-size 8 --n-samples-per-prompt 4 "
    "--global-batch-size 32 --rollout-max-response-len 8 --use-dynamic-batch-size --max-tokens-per-gpu 512 "
    "--advantage-estimator grpo --lr 1e-2 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
    "--save {work}/sglang-checkpoints --save-interval 2 --sglang-max-total-tokens 4096 "
    "--sglang-max-running-requests 16 --update-weight-buffer-size 200000 "
)


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train("sglang", GRPO, paths=(SGLANG_STAND_INS, SGLANG_CPU))


def test_three_rounds_run_to_the_end(run: Run) -> None:
    assert run.code == 0, run.output[-3000:]
    assert len(run.series("rollout/raw_reward")) == 3
    assert min(run.series("train/grad_norm")) > 1e-3


def test_engines_have_the_weights_that_the_trainer_has_after_every_step(run: Run) -> None:
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5


def test_both_sides_leave_and_return_in_each_round_and_for_a_checkpoint(run: Run) -> None:
    log = (run.folder / "logs" / "engine-0.log").read_text()
    # At the start and in three rounds for the trainer, whose turn ends in two steps; two saves.
    assert log.count('POST /release_memory_occupation HTTP/1.1" 200') == 1 + 3 + 2
    assert log.count('POST /resume_memory_occupation HTTP/1.1" 200') == 2 * (1 + 3) + 2
    sleeps = (run.folder / "logs" / "train-rank-0.log").read_text().count("the trainer sleeps")
    assert sleeps == 1 + 3 + 2


def test_every_sync_was_verified(run: Run) -> None:
    assert len(run.series("perf/update_weights_verify_time")) == 3


def test_each_engine_got_each_sync_in_one_request(run: Run) -> None:
    for number in range(2):
        log = (run.folder / "logs" / f"engine-{number}.log").read_text()
        # A note of what was loaded, before the first round, after each of three, and a goodbye.
        assert log.count('POST /update_weights_from_tensor HTTP/1.1" 200') == 6


def test_phases_of_the_driver_add_up_to_the_round(run: Run) -> None:
    whole = run.series("perf/round_time")[1]
    assert sum(phases_of(run, "round")[1].values()) == pytest.approx(whole, rel=0.01, abs=0.05)


@pytest.mark.parametrize("side", ["round", "trainer", "engines"])
def test_handing_devices_over_is_offload_on_every_side(run: Run, side: str) -> None:
    assert phases_of(run, side)[1]["offload"] > 0
    assert_side_adds_up(run, side, 1)


def test_the_trainer_says_how_long_it_takes_to_leave_and_return(run: Run) -> None:
    assert len(run.series("perf/sleep_time")) == len(run.series("perf/wake_up_time")) == 3


# --- one engine over two nodes, which here are one; each has a slot ---

# Two heads, one for each rank of the engine; the head of keys is in both.
TWO_NODES = (
    GRPO + "--hf-checkpoint {work}/two-heads --hidden-size 128 --ffn-hidden-size 384 "
    "--num-attention-heads 2 --kv-channels 64 --rollout-num-gpus-per-engine 2 --num-gpus-per-node 1 "
    "--num-rollout 2 --save {work}/two-node-checkpoints "
)


@pytest.fixture(scope="module")
def two_nodes(train: Callable[..., Run], work: Work) -> Run:
    make_model = [sys.executable, str(QUICKSTART / "make_model.py"), str(work.path / "two-heads")]
    subprocess.run([*make_model, "--size", "gpu"], check=True)
    return train("two-nodes", TWO_NODES, paths=(SGLANG_STAND_INS, SGLANG_CPU))


def test_an_engine_over_two_nodes_has_the_trainers_weights_in_both_parts(two_nodes: Run) -> None:
    assert two_nodes.code == 0, two_nodes.output[-3000:]
    assert max(two_nodes.series("train/train_rollout_logprob_abs_diff")) < 1e-5
    assert len(two_nodes.series("perf/update_weights_verify_time")) == 2


def test_each_part_of_an_engine_has_a_log_and_a_rank_of_its_own(two_nodes: Run) -> None:
    logs = two_nodes.folder / "logs"
    first, second = ((logs / f"engine-0{end}.log").read_text() for end in ("", "-node-1"))
    assert "TP0]" in first
    assert "TP1]" not in first
    assert "TP1]" in second
    assert "POST /update_weights_from_tensor" not in second  # it hears of it from the first
    assert not (logs / "engine-1.log").exists()


# --- a server that somebody else started ---

EXTERNAL = GRPO.replace("--colocate --actor-num-gpus-per-node 2", "").split(" --save ")[0] + (
    " --num-rollout 2 --rollout-external-engine-addrs "
)


def test_a_server_that_somebody_else_started_gets_weights_and_stays(
    train: Callable[..., Run], work: Work
) -> None:
    options = ("--custom-weight-loader", RECEIVER, "--max-total-tokens", "4096")
    spec = sglang_spec(work.path / "model", work.path, *options)
    with running(spec) as server:
        run = train("external-sglang", EXTERNAL + spec.url.removeprefix("http://"))
        assert run.code == 0, run.output[-3000:]
        assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5
        assert len(run.series("perf/update_weights_verify_time")) == 2
        assert server.is_alive()
        log = spec.log_path.read_text()
        assert log.count('POST /update_weights_from_tensor HTTP/1.1" 200') == 4
        # Nobody started it with slime's memory saver, and nobody asks for it.
        assert "/release_memory_occupation" not in log


# --- a server that is killed ---

# One engine, so that the round in which it dies waits for the next one, and every later answer is its own.
KILLED = GRPO.replace("--colocate --actor-num-gpus-per-node 2", "--rollout-num-gpus 1").replace(
    "--rm-type random", "--custom-rm-path support.killing_reward.reward"
) + ("--use-fault-tolerance --rollout-health-check-interval 1 ")


def test_a_server_killed_within_a_round_is_followed_by_one_with_the_trainers_weights(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(killing_reward.VARIABLE, "1:engine:KILL")
    run = train("killed_sglang", KILLED, paths=WITH_SUPPORT)
    assert run.code == 0, run.output[-3000:]
    assert sum(run.series("rollout/engine_restarts")) == 1
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 1e-5
    assert len(run.series("rollout/raw_reward")) == 3
    found = audit(read_events(run.folder / "ledger.jsonl"))
    assert found.is_clean, found.problems


# --- weights in the middle of rounds ---

# Two answers at a time: when weights come, some are under way and others wait.
IN_FLIGHT = (
    "--rollout-engine sglang --rollout-num-gpus 1 --hf-checkpoint {work}/model "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label --apply-chat-template "
    "--rm-type random --num-rollout 3 --rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 "
    "--rollout-max-response-len 100 --use-dynamic-batch-size --max-tokens-per-gpu 1024 "
    "--advantage-estimator grpo --lr 1e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 "
    "--sglang-max-total-tokens 4096 --sglang-max-running-requests 2 --samples-per-rollout-logged 16 "
    "--update-weights-in-flight "
)


def assert_answers_went_on(run: Run) -> None:
    """In each round but the first, which has no weights in its middle; and none was lost."""
    assert run.series("rollout/aborted_groups") == [0, 0, 0]
    continued = run.series("rollout/continued_answers")
    assert len(continued) == 2, "no answer was cut short by a sync and gone on with"
    assert min(continued) >= 1


def test_answers_go_on_when_weights_come_in_the_middle_of_a_round(
    train: Callable[..., Run],
) -> None:
    flags = IN_FLIGHT + weights_midway.FLAGS
    run = train("in_flight_sglang", flags, script="train_async.py", paths=WITH_SUPPORT)
    assert run.code == 0, run.output[-3000:]
    assert_answers_went_on(run)
    for rollout_id in (1, 2):
        text = (run.folder / "samples" / f"{rollout_id}.jsonl").read_text()
        spans = [json.loads(line)["version_spans"] for line in text.splitlines()]
        old, new = str(rollout_id), str(rollout_id + 1)
        assert {version for row in spans for _, version in row} == {old, new}
        mixed = [[version for _, version in row] for row in spans if len(row) > 1]
        assert mixed
        assert all(row == [old, new] for row in mixed)


# --- both sides at once on the same slots ---

AT_ONCE = (
    "--colocate --no-offload-train --no-offload-rollout --actor-num-gpus-per-node 2 --rollout-num-gpus 2 "
    "--n-samples-per-prompt 8 --global-batch-size 32 --samples-per-rollout-logged 32 "
)


def test_two_engines_write_on_the_slots_of_two_ranks_that_train_meanwhile(
    train: Callable[..., Run],
) -> None:
    """Weights come from the rank of each engine's slot, in the middle of answers."""
    flags = IN_FLIGHT + AT_ONCE + weights_midway.FLAGS
    run = train("at_once_sglang", flags, script="train_async.py", paths=WITH_SUPPORT)
    assert run.code == 0, run.output[-3000:]
    assert_answers_went_on(run)
    assert len(run.series("perf/update_weights_verify_time")) == 3
    found = audit(read_events(run.folder / "ledger.jsonl"))
    assert found.is_clean, found.problems
    mixed = 0
    for rollout_id in (1, 2):
        text = (run.folder / "samples" / f"{rollout_id}.jsonl").read_text()
        for row in map(json.loads, text.splitlines()):
            versions = [version for _, version in row["version_spans"]]
            assert versions in (
                [str(rollout_id)],
                [str(rollout_id + 1)],
                [str(rollout_id), str(rollout_id + 1)],
            )
            mixed += len(versions) > 1
    assert mixed, "no answer went on under new weights"
    # The first round is written and trained with the same weights, but for what its engines may round.
    assert run.series("train/train_rollout_logprob_abs_diff")[0] < 1e-4


# --- generating all the time ---

FULLY_ASYNC = IN_FLIGHT.replace("--update-weights-in-flight", "--fully-async --use-tis").replace(
    "--num-rollout 3", "--num-rollout 5"
)


def test_groups_go_on_through_rounds_and_checkpoints_when_generated_all_the_time(
    train: Callable[..., Run],
) -> None:
    paths = (SGLANG_STAND_INS, SGLANG_CPU)
    flags = FULLY_ASYNC + "--save {work}/stream/ckpt --save-interval 2 "
    run = train("fully_async_sglang", flags, script="train_async.py", paths=paths)
    assert run.code == 0, run.output[-3000:]
    found = audit(read_events(run.folder / "ledger.jsonl"))
    assert found.is_clean, found.problems
    assert max(run.series("rollout/staleness/max")) in (1, 2)
    # Log-probs of engines are those of the weights that wrote each token.
    assert max(run.series("train/train_rollout_logprob_abs_diff")) < 0.5
    saved = load_unfinished(str(run.folder.parent / "stream" / "ckpt"), 1)
    lengths = [
        s.response_length for item in saved for s in flatten(item.group) if not item.is_whole
    ]
    assert any(lengths), "the checkpoint has no token of what was being written"
