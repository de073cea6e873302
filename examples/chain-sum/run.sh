#!/usr/bin/env bash
# GRPO of SmolLM2-135M-Instruct on chain_sum of reasoning-gym. Usage:
#
#     bash examples/chain-sum/run.sh MODEL_DIR DATA_DIR [RUN_FOLDER] [FLAGS...]
#
# MODEL_DIR and DATA_DIR are what get_model.py and chain_sum.py wrote. One GPU, which trainer and engine share; with
# PLACE=apart a second one for the engine. FLAGS are added at the end, where they win.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
model="${1:?MODEL_DIR: what get_model.py wrote}"
data="${2:?DATA_DIR: what chain_sum.py wrote}"
run="${3:-${root}/runs/chain-sum-$(date +%Y%m%d-%H%M%S)}"
shift $(($# < 3 ? $# : 3))
python="${PYTHON:-${root}/.venv/bin/python}"

unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1
export PYTHONPATH="${root}/examples/chain-sum${PYTHONPATH:+:${PYTHONPATH}}"
# shellcheck source=../../scripts/models/smollm2-135M.sh
source "${root}/scripts/models/smollm2-135M.sh"

case "${PLACE:-together}" in
   together) PLACE_ARGS=(--colocate --no-offload-train --no-offload-rollout --sglang-mem-fraction-static 0.4) ;;
   apart) PLACE_ARGS=(--rollout-num-gpus 1 --sglang-mem-fraction-static 0.7) ;;
   *) echo "PLACE is together or apart, not ${PLACE}" >&2 && exit 2 ;;
esac
if [ "${DEVICE:-cuda}" = cuda ]; then # all answers of a round at once; HTTP takes more than one core
   PLACE_ARGS+=(
      --sglang-server-concurrency 2048 --sglang-max-running-requests 2048 --sglang-cuda-graph-max-bs-decode 2048
      --sglang-tokenizer-worker-num 4 --sglang-enable-fp32-lm-head
   )
fi
ARGS=(
   --device "${DEVICE:-cuda}" --actor-num-nodes 1 --actor-num-gpus-per-node 1 --rollout-num-gpus-per-engine 1
   --hf-checkpoint "${model}" --run-dir "${run}" --save "${run}/checkpoints" --save-hf "${run}/hf"
   --seed 0 --rollout-seed 0
   --prompt-data "${data}/train.jsonl" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
   --custom-rm-path chain_sum.reward --reward-key score --eval-reward-key right
   --num-rollout 300 --rollout-batch-size 256 --n-samples-per-prompt 8 --global-batch-size 512
   --rollout-max-response-len 24 --rollout-temperature 1
   --eval-interval 20 --eval-prompt-data held_out "${data}/held_out.jsonl" dev "${data}/dev.jsonl"
   --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 24
   --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
   --use-kl-loss --kl-loss-coef 0.1 --kl-loss-type k2 --ref-load "${model}"
   --optimizer adam --adam-beta1 0.9 --adam-beta2 0.98 --lr 3e-5 --lr-decay-style constant --lr-warmup-iters 10 --weight-decay 0
   --attention-dropout 0 --hidden-dropout 0 --use-dynamic-batch-size --max-tokens-per-gpu 32768
)

"${python}" "${root}/train.py" "${MODEL_ARGS[@]}" "${ARGS[@]}" "${PLACE_ARGS[@]}" "$@"
