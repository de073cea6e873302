import json
import logging
from pathlib import Path

import pytest
from support.config_argv import base_argv, write_model_folder

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.config.resolve import check_alternating, check_overlapping, resolve
from slime.errors import ConfigError


def config(folder: Path, **changes: str | None) -> Config:
    return load_config(base_argv(folder, **changes))


def write_megatron_checkpoint(folder: Path) -> str:
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return str(folder)


def test_resolving_twice_changes_nothing(tmp_path: Path) -> None:
    once = config(tmp_path, use_kl_loss="", kl_loss_coef="0.1", colocate="")
    assert resolve(once) == once


def test_one_step_per_round_by_default(tmp_path: Path) -> None:
    assert config(tmp_path).global_batch_size == 32


def test_steps_per_round_give_the_batch_size(tmp_path: Path) -> None:
    assert config(tmp_path, num_steps_per_rollout="4").global_batch_size == 8


def test_batch_size_and_steps_may_agree(tmp_path: Path) -> None:
    both = config(tmp_path, num_steps_per_rollout="4", global_batch_size="8")
    assert both.global_batch_size == 8


def test_defaults_that_follow_from_others(tmp_path: Path) -> None:
    resolved = config(tmp_path, eps_clip="0.3", rollout_max_context_len="100", reward_key="score")
    assert resolved.eps_clip_high == 0.3
    assert resolved.over_sampling_batch_size == 4
    assert resolved.rollout_max_prompt_len == 99
    assert resolved.eval_function_path == resolved.rollout_function_path
    assert resolved.eval_reward_key == "score"


def test_an_agent_implies_the_generate_function_around_it(tmp_path: Path) -> None:
    found = config(tmp_path, agent_function_path="my_module.run_agent")
    assert found.custom_generate_function_path == "slime.agent.generate.generate"


def test_the_router_gets_a_policy_that_spreads_by_load(tmp_path: Path) -> None:
    found = config(tmp_path).router_argv
    assert (found["policy"], found["assignment_mode"]) == ("manual", "min_load")
    assert config(tmp_path, router_policy="round_robin").router_argv == {"policy": "round_robin"}


def test_nothing_is_said_of_the_policy_of_somebody_elses_router(tmp_path: Path) -> None:
    found = config(tmp_path, sglang_router_ip="127.0.0.1", sglang_router_port="30000")
    assert found.router_argv == {}


def test_given_values_stay(tmp_path: Path) -> None:
    resolved = config(tmp_path, eps_clip_high="0.28", rollout_max_prompt_len="5")
    assert (resolved.eps_clip_high, resolved.rollout_max_prompt_len) == (0.28, 5)


def test_a_group_of_one_has_no_deviation(tmp_path: Path) -> None:
    assert config(tmp_path, n_samples_per_prompt="1").disable_grpo_std_normalization
    assert not config(tmp_path).disable_grpo_std_normalization


def test_reinforce_plus_plus_whitens_advantages(tmp_path: Path) -> None:
    resolved = config(tmp_path, advantage_estimator="reinforce_plus_plus")
    assert resolved.normalize_advantages


def test_colocate_shares_the_trainers_slots(tmp_path: Path) -> None:
    resolved = config(tmp_path, colocate="", rollout_num_gpus=None, actor_num_gpus_per_node="4")
    assert resolved.rollout_num_gpus == 4
    assert (resolved.offload_train, resolved.offload_rollout) == (True, True)


def test_offload_can_be_negated_for_one_side(tmp_path: Path) -> None:
    resolved = config(tmp_path, colocate="", no_offload_train="")
    assert (resolved.offload_train, resolved.offload_rollout) == (False, True)


def test_apart_nothing_is_offloaded(tmp_path: Path) -> None:
    resolved = config(tmp_path)
    assert (resolved.offload_train, resolved.offload_rollout) == (False, False)


def test_loading_rollouts_means_training_only(tmp_path: Path) -> None:
    resolved = config(tmp_path, load_debug_rollout_data="x/{rollout_id}.pt", rollout_num_gpus=None)
    assert resolved.debug_train_only
    assert resolved.rollout_num_gpus == 0


def test_a_reference_is_the_initial_model_unless_named(tmp_path: Path) -> None:
    assert config(tmp_path).ref_load is None
    resolved = config(tmp_path, use_kl_loss="")
    assert resolved.ref_load == resolved.hf_checkpoint


def test_without_a_checkpoint_a_run_starts_from_the_hf_folder(tmp_path: Path) -> None:
    resolved = config(tmp_path)
    assert resolved.load == resolved.hf_checkpoint
    assert resolved.start_rollout_id == 0
    assert (resolved.finetune, resolved.no_load_optim, resolved.no_load_rng) == (True, True, True)


def test_a_megatron_checkpoint_is_continued(tmp_path: Path) -> None:
    folder = write_megatron_checkpoint(tmp_path / "ckpt")
    resolved = config(tmp_path, load=folder)
    assert (resolved.load, resolved.start_rollout_id, resolved.finetune) == (folder, None, False)


def test_an_hf_folder_to_load_goes_before_the_reference(tmp_path: Path) -> None:
    other = str(write_model_folder(tmp_path / "other"))
    reference = str(write_model_folder(tmp_path / "reference"))
    assert config(tmp_path, load=other, ref_load=reference).load == other
    assert config(tmp_path, ref_load=reference).load == reference


def test_to_continue_from_nothing_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--load .*nothing is no checkpoint \(no such folder\)"):
        config(tmp_path, load=str(tmp_path / "nothing"))


def test_the_first_start_of_a_run_that_resumes_itself_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        config(tmp_path, load=folder, save=folder)
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_chosen_first_round_stays(tmp_path: Path) -> None:
    assert config(tmp_path, start_rollout_id="5").start_rollout_id == 5


def test_megatron_gets_its_words_and_slimes_values(tmp_path: Path) -> None:
    argv = [*base_argv(tmp_path), "--num-attention-heads", "4", "--lr", "2e-6", "--lr=1e-5"]
    words = load_config(argv).megatron_argv
    assert words[:2] == ("--num-attention-heads", "4")
    assert words[words.index("--lr") + 1] == "1e-05"
    assert words[words.index("--global-batch-size") + 1] == "32"
    assert words.count("--lr") == 1


def test_a_config_built_in_code_is_resolved_alike(tmp_path: Path) -> None:
    folder = str(write_model_folder(tmp_path / "model"))
    made = resolve(
        Config(
            rollout_batch_size=4,
            num_rollout=1,
            hf_checkpoint=folder,
            num_layers=2,
            actor_num_gpus_per_node=1,
            rollout_num_gpus=1,
            disable_rollout_global_dataset=True,
        )
    )
    assert (made.global_batch_size, made.load) == (4, folder)
    assert json.loads(made.to_json())["eps_clip_high"] == 0.2


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (
            {"colocate": ""},
            "--colocate: train_async.py .* add --no-offload-train --no-offload-rollout",
        ),
        ({"colocate": "", "no_offload_train": ""}, "--colocate: .* add --no-offload-rollout where"),
        ({"colocate": "", "no_offload_rollout": ""}, "--colocate: .* add --no-offload-train where"),
        ({"colocate": "", "fully_async": ""}, "--colocate: train_async.py"),
        ({"offload_rollout": ""}, "--offload-rollout: train_async.py .* would have no memory"),
    ],
)
def test_no_side_leaves_its_memory_to_the_other_while_rounds_overlap(
    tmp_path: Path, flags: dict[str, str | None], advice: str
) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_overlapping(config(tmp_path, **flags))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"offload_train": ""},
        {"colocate": "", "no_offload_train": "", "no_offload_rollout": ""},
        {"colocate": "", "no_offload_train": "", "no_offload_rollout": "", "fully_async": ""},
    ],
)
def test_rounds_overlap_on_own_devices_or_where_both_sides_stay(
    tmp_path: Path, flags: dict[str, str | None]
) -> None:
    check_overlapping(config(tmp_path, **flags))


def test_rounds_that_alternate_with_training_have_nothing_in_flight(tmp_path: Path) -> None:
    check_alternating(config(tmp_path))
    in_flight = config(tmp_path, update_weights_in_flight="")
    check_overlapping(in_flight)
    with pytest.raises(ConfigError, match=r"--update-weights-in-flight: train\.py"):
        check_alternating(in_flight)


def test_an_environment_implies_the_generate_function_that_plays_it(tmp_path: Path) -> None:
    found = config(tmp_path, environment_path="my_module.Board")
    assert found.custom_generate_function_path == "slime.environments.generate.generate"
