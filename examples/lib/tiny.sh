# What the examples that train a tiny model on two CPU cores share; to be sourced, not run.
# shellcheck shell=bash
#
#   begin NAME [SEED] [RUN_FOLDER]    sets root, here, seed, run (a new folder below runs/) and python; the environment
#   supervised VOCABULARY EPOCHS [FLAGS...]   stage 1: supervised fine-tuning of the model in RUN/model on RUN/data/demos.jsonl
#   grpo VOCABULARY FLAGS...          stage 2: GRPO on RUN/data/train.jsonl; FLAGS: the example's functions, rounds and lengths
#
# Variables of the user: PYTHON, the interpreter; default .venv/bin/python of this checkout.
set -euo pipefail

begin() {
   root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
   here="${root}/examples/$1"
   seed="${2:-0}"
   run="${3:-${root}/runs/$1-seed${seed}-$(date +%Y%m%d-%H%M%S)}"
   python="${PYTHON:-${root}/.venv/bin/python}"
   unset PYTHONDONTWRITEBYTECODE # Without bytecode files each process spends three times as long on its imports.
   export OMP_NUM_THREADS=1      # Two torch threads on shared cores are many times slower than one.
   export PYTHONPATH="${here}:${root}/examples/quickstart${PYTHONPATH:+:${PYTHONPATH}}"
   mkdir -p "${run}"
   echo "== data and a random model (seed ${seed}) in ${run}"
}

# Leaves in flags what both stages have, for a model with so many words.
both_stages() {
   flags=(
      --num-layers 2 --hidden-size 96 --ffn-hidden-size 288 --num-attention-heads 3 --kv-channels 32
      --group-query-attention --num-query-groups 1 --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6
      --swiglu --disable-bias-linear --use-rotary-position-embeddings --rotary-base 10000 --vocab-size "$1"
      --device cpu --actor-num-nodes 1 --actor-num-gpus-per-node 1
      --seed "${seed}" --rollout-seed "${seed}"
      --optimizer adam --adam-beta1 0.9 --adam-beta2 0.98 --attention-dropout 0 --hidden-dropout 0
      --use-dynamic-batch-size --max-tokens-per-gpu 8192
   )
}

supervised() {
   local flags
   both_stages "$1"
   flags+=(
      --hf-checkpoint "${run}/model"
      --run-dir "${run}/sft" --save "${run}/sft/checkpoints" --save-hf "${run}/sft/hf"
      --rollout-function-path slime.rollout.sft_rollout.generate_rollout
      --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
      --prompt-data "${run}/data/demos.jsonl" --input-key messages --rollout-shuffle --num-epoch "$2"
      --rollout-batch-size 1920 --global-batch-size 128 --n-samples-per-prompt 1
      --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01
   )
   echo "== stage 1: supervised fine-tuning on demonstrations"
   "${python}" "${root}/train_async.py" "${flags[@]}" "${@:3}"
}

grpo() {
   local flags
   both_stages "$1"
   flags+=(
      --hf-checkpoint "${run}/sft/hf"
      --run-dir "${run}/grpo" --save "${run}/grpo/checkpoints" --save-hf "${run}/grpo/hf"
      --rollout-num-gpus 2 --rollout-num-gpus-per-engine 1
      --prompt-data "${run}/data/train.jsonl" --input-key prompt --label-key label --rollout-shuffle
      --global-batch-size 128 --rollout-temperature 1 --log-multi-turn
      --eval-prompt-data held_out "${run}/data/held_out.jsonl"
      --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
      --lr 4e-4 --min-lr 4e-5 --lr-decay-style linear --lr-warmup-iters 5 --weight-decay 0
   )
   echo "== stage 2: GRPO"
   "${python}" "${root}/train.py" "${flags[@]}" "${@:2}"
}
