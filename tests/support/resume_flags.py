"""The run that is killed and resumed: GRPO on the quickstart's tiny model, a checkpoint every second round."""

from support.interrupted_runs import TrainingRun
from support.train_runs import Work

ROUNDS = 12
# The reward kills nothing unless SLIME_TEST_KILLS tells it to.
FLAGS = (
    "--actor-num-gpus-per-node 1 --hf-checkpoint {work}/model --rollout-num-gpus 1 "
    "--prompt-data {work}/data/train.jsonl --input-key prompt --label-key label "
    "--apply-chat-template --rollout-shuffle --custom-rm-path support.killing_reward.reward "
    f"--num-rollout {ROUNDS} --rollout-batch-size 8 --n-samples-per-prompt 4 "
    "--global-batch-size 16 --rollout-max-response-len 32 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 1024 "
    "--advantage-estimator grpo --lr 1e-3 --lr-decay-style constant "
    "--attention-dropout 0 --hidden-dropout 0 --save-interval 2 "
    "--eval-interval 4 --eval-prompt-data held_out {work}/data/held_out.jsonl "
    "--eval-max-response-len 8 --save {folder}/ckpt --load {folder}/ckpt"
)


def make_run(work: Work, name: str, *more: str) -> TrainingRun:
    """The run `name`, not started."""
    folder = work.path / name
    return TrainingRun(folder, [*FLAGS.format(work=work.path, folder=folder).split(), *more])
