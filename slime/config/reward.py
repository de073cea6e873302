"""RewardConfig: rewards, what is done to samples before training, and the mask of SFT."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward."""

    rm_type: str | None = flag(None, "Built-in reward; a sample's metadata.rm_type goes first.")
    reward_key: str | None = flag(None, "Key of the reward when the function returns a dict.")
    eval_reward_key: str | None = flag(None, "The same in evaluation; by default --reward-key.")
    rm_url: str | None = flag(None, "Address of remote_rm.")
    reward_timeout_s: float = flag(60.0, "Deadline of one reward, in seconds.", above=0)
    reward_workers: int = flag(1, "Processes that compute built-in rewards.", at_least=1)
    judge_url: str | None = flag(
        None, "Of judge: an endpoint as OpenAI's, the part before /chat/completions."
    )
    judge_model: str | None = flag(None, "Of judge: the name of its model.")
    judge_prompt_path: str | None = flag(
        None, "Of judge: a file with {prompt}, {response} and {label} instead of the usual words."
    )
    judge_max_score: float = flag(10.0, "Of judge: the score that is a reward of 1.", above=0)
    judge_max_tokens: int = flag(1024, "Of judge: tokens it may write.", at_least=1)
    judge_api_key_env: str = flag(
        "JUDGE_API_KEY", "Of judge: the environment variable with its key, if it wants one."
    )
    reasoning_gym_min_score: float = flag(
        0.1, "Of reasoning_gym: scores below are 0, as some tasks pay a little for any answer."
    )
    group_rm: bool = flag(False, "The reward function gets a whole group.")
    custom_rm_path: str | None = flag(None, "Reward function: async fn(args, sample).")
    custom_reward_post_process_path: str | None = flag(
        None, "Function instead of group normalisation: fn(args, samples)."
    )
    custom_convert_samples_to_train_data_path: str | None = flag(
        None, "Function that makes the train data: fn(args, samples)."
    )
    rollout_sample_filter_path: str | None = flag(
        None, "Function that sets remove_sample: fn(args, data)."
    )
    rollout_all_samples_process_path: str | None = flag(
        None, "Function that sees all samples of a round: fn(args, all_samples, data_source)."
    )
    loss_mask_type: Literal["qwen", "qwen3", "qwen3_5", "distill_qwen"] = flag(
        "qwen", "Chat format from which the SFT loss mask is made."
    )
