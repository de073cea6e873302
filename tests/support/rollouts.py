"""Random samples for tests of the training maths."""

import random

from slime.data.sample import Sample


def random_samples(
    *,
    num_groups: int,
    group_size: int,
    seed: int = 0,
    vocab_size: int = 11,
    max_response: int = 9,
    max_fan_out: int = 1,
    mask_probability: float = 0.0,
    removed_probability: float = 0.0,
) -> list[Sample]:
    """Groups of executions, each cut into up to `max_fan_out` samples; rewards 0 or 1."""
    rng = random.Random(seed)
    samples: list[Sample] = []
    for group in range(num_groups):
        for member in range(group_size):
            reward = float(rng.random() < 0.5)
            for _ in range(rng.randint(1, max_fan_out)):
                prompt, response = rng.randint(1, 5), rng.randint(1, max_response)
                samples.append(
                    Sample(
                        group_index=group,
                        index=len(samples),
                        rollout_id=group * group_size + member,
                        tokens=[rng.randrange(vocab_size) for _ in range(prompt + response)],
                        response_length=response,
                        reward=reward,
                        loss_mask=[int(rng.random() >= mask_probability) for _ in range(response)],
                        rollout_log_probs=[-2.0 - rng.random() for _ in range(response)],
                        remove_sample=rng.random() < removed_probability,
                        status=Sample.Status.COMPLETED,
                    )
                )
    return samples
