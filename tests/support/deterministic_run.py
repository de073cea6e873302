"""Three steps with --deterministic-mode: `python deterministic_run.py FOLDER OUT [WORD...]`."""

import os
import sys

import torch
from support.megatron_runs import (
    policy_gradient_loss,
    random_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)

from slime.training.interface import ModelTag

VOCAB = 106


def main() -> None:
    """Leave metrics, weights, log-probs and the settings that make them the same each time."""
    folder, out, *words = sys.argv[1:]
    trainer = start_trainer(trainer_config(folder, "--deterministic-mode", *words))
    trainer.load()
    batches = [random_batch(num_samples=6, vocab_size=VOCAB, seed=seed) for seed in (1, 2, 3)]
    metrics = [trainer.train_step(train_step(b), policy_gradient_loss) for b in batches]
    content = {
        "metrics": metrics,
        "weights": weights_of(trainer),
        "log_probs": trainer.log_probs(batches[0], ModelTag.ACTOR),
        "settings": {
            "torch": torch.are_deterministic_algorithms_enabled(),
            "warns_only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "embedding": trainer._model[0].config.deterministic_mode,
            **{name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")},
        },
    }
    torch.save(content, out)


if __name__ == "__main__":
    main()
