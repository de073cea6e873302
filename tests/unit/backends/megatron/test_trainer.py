"""One trainer per test, all in one process group: Megatron starts in seconds, a model at once."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron_runs import (
    grouped,
    hf_log_probs,
    hf_model,
    make_tiny_qwen3,
    policy_gradient_loss,
    random_batch,
    reference_run,
    start_trainer,
    step_plan,
    train_step,
    trainer_config,
    weights_of,
)
from torch import Tensor

from slime.data.batch import Ragged, RolloutBatch
from slime.errors import CheckpointError, ConfigError
from slime.training.interface import LossTerms, ModelTag, TokenView
from slime.training.update import run_update

pytestmark = pytest.mark.trainer

VOCAB = 106  # no multiple of 8: the embedding is padded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def batch(seed: int, num_samples: int = 6) -> RolloutBatch:
    return random_batch(num_samples=num_samples, vocab_size=VOCAB, seed=seed)


def started(model: str, *words: str, **changes: Any) -> Any:
    trainer = start_trainer(replace(trainer_config(model, *words), **changes))
    trainer.load()
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    return weights_of(trainer)


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_log_probs_equal_those_of_transformers(model: str) -> None:
    data = batch(0)
    ours = started(model).log_probs(data, ModelTag.ACTOR)
    theirs = hf_log_probs(hf_model(model), data)
    for row, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, reference, rtol=0.0, atol=1e-5)


def test_a_failed_sample_without_any_response_changes_nothing(model: str) -> None:
    data = batch(7)
    plan = replace(data.steps[0], micro_batches=((*range(len(data)), len(data)),))
    failed = replace(
        data,
        tokens=Ragged.from_rows([*data.tokens, torch.tensor([1, 2, 3])], torch.int64),
        response_lengths=(*data.response_lengths, 0),
        loss_masks=Ragged.from_rows([*data.loss_masks, torch.empty(0)], torch.float32),
        rewards=(*data.rewards, 0.0),
        raw_rewards=(*data.raw_rewards, 0.0),
        rollout_ids=(*data.rollout_ids, len(data)),
        rollout_mask_sums=(*data.rollout_mask_sums, 0.0),
        sample_indices=(*data.sample_indices, len(data)),
        truncated=(*data.truncated, False),
        steps=(plan,),
    )
    trained = []
    for content in (data, failed):
        trainer = started(model)
        trainer.train_step(train_step(content), policy_gradient_loss)
        trained.append(weights(trainer))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0.0, atol=1e-6)
    assert trainer.log_probs(failed, ModelTag.ACTOR)[-1].shape == (0,)


def test_log_probs_are_divided_by_the_rollout_temperature(model: str) -> None:
    data = batch(0)
    ours = started(model, "--rollout-temperature", "0.7").log_probs(data, ModelTag.ACTOR)
    reference = hf_model(model)
    reference.lm_head.register_forward_hook(lambda module, args, out: out / 0.7)
    for row, expected in zip(ours, hf_log_probs(reference, data), strict=True):
        torch.testing.assert_close(row, expected, rtol=0.0, atol=2e-5)


def test_samples_that_share_a_prompt_train_as_if_each_had_its_own(model: str) -> None:
    batches = [grouped(batch(seed, num_samples=8), group_size=4) for seed in range(3)]
    reference = reference_run(model, batches)
    trainer = started(model)
    ours = trainer.log_probs(batches[0], ModelTag.ACTOR)
    theirs = hf_log_probs(hf_model(model), batches[0])
    for row, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=0)
    for data, loss, norm in zip(batches, reference.losses, reference.grad_norms, strict=True):
        metrics = trainer.train_step(train_step(data), policy_gradient_loss)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_three_steps_equal_transformers_with_adamw(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_qwen3(tmp_path, vocab_size=VOCAB, tied=tied)
    batches = [batch(seed) for seed in (1, 2, 3)]
    trainer = started(folder)
    metrics = [trainer.train_step(train_step(b), policy_gradient_loss) for b in batches]
    reference = reference_run(folder, batches)
    assert [m["loss"] for m in metrics] == pytest.approx(reference.losses, abs=2e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(reference.grad_norms, rel=1e-5)
    ours = weights(trainer)
    assert ours.keys() == reference.weights.keys()
    for name, expected in reference.weights.items():
        torch.testing.assert_close(ours[name], expected, rtol=0.0, atol=5e-6, msg=name)


def test_micro_batches_and_their_order_do_not_change_the_step(model: str) -> None:
    data = batch(5)
    masks = data.loss_masks.rows()
    results: list[tuple[dict[str, float], dict[str, Tensor]]] = []
    for micro_batches in (
        [[0, 1, 2, 3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[4, 1], [5, 3, 0, 2]],
    ):
        trainer = started(model)
        plan = step_plan(micro_batches, masks)
        step = replace(train_step(data), plan=plan)
        results.append((trainer.train_step(step, policy_gradient_loss), weights(trainer)))
    for metrics, after in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        for name, expected in results[0][1].items():
            torch.testing.assert_close(after[name], expected, rtol=0.0, atol=5e-6, msg=name)


@pytest.mark.parametrize(
    "words",
    [
        ("--recompute-granularity", "selective"),
        (
            "--recompute-granularity",
            "full",
            "--recompute-method",
            "uniform",
            "--recompute-num-layers",
            "1",
        ),
    ],
)
def test_recomputation_changes_no_bit(model: str, words: tuple[str, ...]) -> None:
    plain, recomputing = started(model), started(model, *words)
    for seed in (1, 2):
        expected = plain.train_step(train_step(batch(seed)), policy_gradient_loss)
        assert recomputing.train_step(train_step(batch(seed)), policy_gradient_loss) == expected
    assert_equal_weights(weights(plain), weights(recomputing))


def test_same_seed_and_batches_give_the_same_bits(model: str) -> None:
    runs: list[dict[str, Tensor]] = []
    for _ in range(2):
        trainer = started(model)
        for seed in (1, 2):
            trainer.train_step(train_step(batch(seed)), policy_gradient_loss)
        runs.append(weights(trainer))
    assert_equal_weights(*runs)


def test_resumed_run_continues_bit_for_bit(model: str, tmp_path: Path) -> None:
    schedule = ("--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--min-lr", "1e-4")
    words = ("--save", str(tmp_path), "--save-interval", "1", *schedule)
    first = started(model, *words)
    for seed in (1, 2):
        first.train_step(train_step(batch(seed)), policy_gradient_loss)
    first.save(4)
    expected = first.train_step(train_step(batch(3)), policy_gradient_loss)

    resumed = start_trainer(trainer_config(model, *words, "--load", str(tmp_path)))
    assert resumed.load() == 5
    assert resumed.train_step(train_step(batch(3)), policy_gradient_loss) == expected
    assert_equal_weights(weights(first), weights(resumed))


def test_checkpoint_of_another_size_is_refused(model: str, tmp_path: Path) -> None:
    started(model, "--save", str(tmp_path), "--save-interval", "1").save(0)
    wider = make_tiny_qwen3(tmp_path / "wider", vocab_size=VOCAB, hidden_size=96)
    trainer = start_trainer(trainer_config(wider, "--load", str(tmp_path)))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trainer.load()


def test_checkpoint_without_optimizer_starts_with_new_moments(model: str, tmp_path: Path) -> None:
    words = ("--save", str(tmp_path), "--save-interval", "1", "--no-save-optim")
    trainer = started(model, *words)
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    trainer.save(0)
    resumed = start_trainer(trainer_config(model, "--load", str(tmp_path), "--no-load-optim"))
    assert resumed.load() == 1
    assert_equal_weights(weights(trainer), weights(resumed))


def test_interrupted_save_leaves_the_last_checkpoint_in_charge(model: str, tmp_path: Path) -> None:
    trainer = started(model, "--save", str(tmp_path), "--save-interval", "1")
    trainer.save(0)
    (tmp_path / "iter_0000001.partial").mkdir()
    resumed = start_trainer(trainer_config(model, "--load", str(tmp_path)))
    assert resumed.load() == 1
    trainer.save(1)
    assert not (tmp_path / "iter_0000001.partial").exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_exported_folder_answers_as_the_trainer_does(model: str, tmp_path: Path) -> None:
    trainer = started(model)
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    trainer.save_hf(str(tmp_path / "export"))
    exported = hf_model(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == VOCAB
    data = batch(2)
    for row, expected in zip(
        trainer.log_probs(data, ModelTag.ACTOR), hf_log_probs(exported, data), strict=True
    ):
        torch.testing.assert_close(row, expected, rtol=0.0, atol=1e-5)
    assert_equal_weights(weights(trainer), weights(started(str(tmp_path / "export"))))


def test_reference_keeps_its_weights_and_the_actor_its_own(model: str) -> None:
    trainer = started(model, "--use-kl-loss", "--kl-loss-coef", "0.1")
    data = batch(2)
    before = trainer.log_probs(data, ModelTag.ACTOR)
    assert all(map(torch.equal, trainer.log_probs(data, ModelTag.REF), before))
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    trained = weights(trainer)
    assert all(map(torch.equal, trainer.log_probs(data, ModelTag.REF), before))
    assert_equal_weights(trained, weights(trainer))
    assert not torch.equal(trainer.log_probs(data, ModelTag.ACTOR)[0], before[0])
    trainer.copy_weights(ModelTag.REF)
    updated = trainer.log_probs(data, ModelTag.ACTOR)
    assert all(map(torch.equal, trainer.log_probs(data, ModelTag.REF), updated))


def test_gradient_that_is_not_finite_skips_the_step(model: str) -> None:
    trainer = started(model)
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    before = weights(trainer)

    def broken(view: TokenView) -> LossTerms:
        return LossTerms(loss=(view.log_probs * math.inf).sum() * 0.0, metrics={})

    metrics = trainer.train_step(train_step(batch(2)), broken)
    assert metrics["step_skipped"] == 1.0
    assert not math.isfinite(metrics["grad_norm"])
    assert_equal_weights(before, weights(trainer))
    after = trainer.train_step(train_step(batch(3)), policy_gradient_loss)
    assert after["step_skipped"] == 0.0
    assert math.isfinite(after["grad_norm"])


def test_schedule_counts_rollouts_and_reports_the_rate_of_the_step(model: str) -> None:
    trainer = started(model, "--lr-warmup-iters", "2", "--lr-decay-style", "linear", "--lr", "1e-2")
    rates = [
        trainer.train_step(
            replace(train_step(data), plan=replace(data.steps[0], num_rollouts=8)),
            policy_gradient_loss,
        )["lr-pg_0"]
        for data in (batch(1), batch(2), batch(3))
    ]
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2])


def test_frozen_parameters_stay(model: str) -> None:
    trainer = started(model, "--only-train-params-name-list", "linear_fc2")
    before = weights(trainer)
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    changed = {
        name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


def test_pattern_without_parameters_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        start_trainer(trainer_config(model, "--freeze-params-name-list", "no_such_layer"))


def test_update_of_a_round_agrees_with_engine_and_reference(model: str) -> None:
    config = trainer_config(model, "--use-kl-loss", "--kl-loss-coef", "0.1", "--kl-loss-type", "k3")
    trainer = start_trainer(config)
    trainer.load()
    data = batch(1)
    rollout_log_probs = Ragged.from_rows(trainer.log_probs(data, ModelTag.ACTOR), torch.float32)
    data = replace(data, rollout_log_probs=rollout_log_probs, steps=data.steps * 2)
    first, second = run_update(trainer, data, config, rollout_id=0).step_metrics
    assert first["kl_loss"] == 0.0
    assert first["train_rollout_logprob_abs_diff"] < 1e-5
    assert second["kl_loss"] > 0.0
    assert second["ppo_kl"] != 0.0


CALLS: list[tuple[Any, ...]] = []


def record_call(*arguments: Any) -> None:
    CALLS.append(arguments)


def test_hooks_are_called_with_what_they_are_promised(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slime.backends.megatron.trainer as module

    monkeypatch.setattr(module, "load_function", lambda path: record_call)
    CALLS.clear()
    trainer = started(
        model,
        custom_megatron_init_path="a.init",
        custom_megatron_before_log_prob_hook_path="a.before_log_prob",
        custom_megatron_before_train_step_hook_path="a.before_step",
    )
    trainer.log_probs(batch(1), ModelTag.ACTOR)
    trainer.train_step(train_step(batch(1), step_id=3), policy_gradient_loss)
    (args,), (_, chunks, prefix), (_, rollout_id, step_id, *objects) = CALLS
    assert args.hidden_size == 64
    assert len(chunks) == 1
    assert prefix == ""
    assert (rollout_id, step_id) == (0, 3)
    assert objects[0] == chunks
    assert len(objects) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--tensor-model-parallel-size", "2"),
            "tensor x pipeline x context parallel size = 2 does",
        ),
        (("--attention-dropout", "0.1"), "--attention-dropout 0.1"),
        (("--hidden-size", "80"), "hidden"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    model: str, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start_trainer(trainer_config(model, *words))
