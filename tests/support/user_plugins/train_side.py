"""From samples to the loss: columns, rewards, advantages, a correction of the mismatch, logs."""

import json
import os

import torch


def note(args, name, **content):
    if getattr(args, "notes", None):
        os.makedirs(args.notes, exist_ok=True)
        with open(os.path.join(args.notes, f"{name}.jsonl"), "a") as file:
            file.write(json.dumps(content) + "\n")


def convert_samples(args, samples):
    rewards = [sample.get_reward_value(args) for sample in samples]
    mean = sum(rewards) / len(rewards)
    note(args, "convert_samples", samples=len(samples))
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [reward - mean for reward in rewards],
        "raw_reward": rewards,
        "truncated": [int(sample.status == sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "rollout_ids": [
            sample.index if sample.rollout_id is None else sample.rollout_id for sample in samples
        ],
        "loss_masks": [sample.loss_mask or [1] * sample.response_length for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "round_number": [sample.metadata.get("round_number", 1) for sample in samples],
    }


def post_process_rewards(args, samples):
    raw = [sample.get_reward_value(args) for sample in samples]
    by_group = {}
    for sample, reward in zip(samples, raw, strict=True):
        by_group.setdefault(sample.group_index, []).append(reward)
    means = {group: sum(values) / len(values) for group, values in by_group.items()}
    return raw, [
        reward - means[sample.group_index] for sample, reward in zip(samples, raw, strict=True)
    ]


def mismatch_weights(
    *,
    args,
    pg_loss,
    train_log_probs,
    rollout_log_probs,
    loss_masks,
    total_lengths,
    response_lengths,
    **kwargs,
):
    """Truncated weights, sequences rejected whose geometric mean ratio is out of bounds."""
    weights, masks, rejected = [], [], []
    for train, rollout, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        difference = (train - rollout).detach().clamp(-20, 20)
        mean = (difference * mask).sum() / mask.sum().clamp(min=1)
        is_out = (mean.exp() > args.rs_upper_bound) | (mean.exp() < args.rs_lower_bound)
        weights.append(difference.exp().clamp(max=args.tis_upper_bound))
        masks.append(torch.zeros_like(mask) if bool(is_out) else mask)
        rejected.append(torch.full_like(mask, float(is_out)))
    weight = torch.cat(weights)
    return pg_loss * weight, masks, {"mis_weight": weight, "mis_rejected": torch.cat(rejected)}


def advantages(args, rollout_data):
    rollout_data["advantages"] = [
        torch.full_like(row, reward)
        for row, reward in zip(rollout_data["log_probs"], rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]


def look_at_rollout_data(args, rollout_id, rollout_data):
    note(
        args,
        "rollout_data",
        rollout_id=rollout_id,
        keys=sorted(rollout_data),
        masked=sum(int((mask == 0).sum()) for mask in rollout_data["loss_masks"]),
    )


def megatron_init(args):
    note(args, "megatron_init", pid=os.getpid())


def before_log_prob(args, model, store_prefix):
    note(args, "before_log_prob", chunks=len(model), prefix=store_prefix)


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    note(args, "before_train_step", rollout_id=rollout_id, step_id=step_id)


def log_rollout(rollout_id, args, samples, extra_metrics, rollout_time):
    note(args, "log_rollout", rollout_id=rollout_id, samples=len(samples), seconds=rollout_time)
    return False


def log_eval(rollout_id, args, data, extra_metrics):
    note(args, "log_eval", rollout_id=rollout_id, names=sorted(data))
    return False
