#!/usr/bin/env bash
# Tests and figures of the trainer, of rollouts and of whole rounds on a host with 1, 2 or 4 cards, in stages of at most
# eight minutes.
#
#     OUT=runs/gpu bash benchmarks/gpu_host.sh 2            # every stage that has not ended yet
#     OUT=runs/gpu bash benchmarks/gpu_host.sh 2 tests_parallel steps_glm4
#
# Each stage leaves NAME.log, and NAME.jsonl if it has figures, in $OUT; NAME.done says that it ended well, and it
# is then left out. PYTHON names an interpreter that has torch, Megatron-Core, transformers and pytest. Stages of rollouts
# and rounds write models and runs (8 GB) to $WORK and go on there when they are run again; SGLANG_ARGS are their servers';
# SEEDS and MODES those of fully_async.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
cards=${1:?how many cards: 1, 2 or 4}
shift
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
limit=${STAGE_LIMIT_S:-480}
work=${WORK:-/tmp/slime-bench}
sglang=${SGLANG_ARGS:---sglang-attention-backend fa3 --sglang-mm-feature-transport cpu --sglang-cuda-graph-backend-prefill disabled}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export SLIME_TEST_DEVICE=cuda

backends=tests/unit/backends/megatron
tp2="--tensor-model-parallel-size 2 --sequence-parallel"
overlap="--overlap-grad-reduce --overlap-param-gather"
host="--optimizer-cpu-offload --use-precision-aware-optimizer"
full="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

tests() { timeout "$limit" "$python" -m pytest -p no:cacheprovider -q --durations=5 "$@"; }
steps() { timeout "$limit" "$python" benchmarks/train_step.py --gpus "$cards" --limit-s 120 "$@"; }
rollout() {
  timeout "$limit" "$python" benchmarks/rollout.py --out "$work" --limit-s "$((limit - 80))" \
    --words "$sglang --sglang-cuda-graph-max-bs-decode 1024 --sglang-max-running-requests 1024" "$@"
}
rounds() { # MODE, share of memory for the engines, more flags of train.py
  timeout "$limit" "$python" benchmarks/step.py --mode "$1" --gpus "$cards" --out "$work" --limit-s "$((limit - 90))" \
    --words "$sglang --sglang-cuda-graph-max-bs-decode 256 --sglang-mem-fraction-static $2 ${3:-}"
}
sync() { # MODEL, more words of weight_sync.py
  timeout "$limit" "$python" benchmarks/weight_sync.py --model "$1" --bucket-mib 1024 --logs "$out/engines" "${@:2}"
}
always() { # its MODES, more flags of fully_async.py
  local seeds modes
  read -ra seeds <<<"${SEEDS:-0}"
  read -ra modes <<<"${MODES:-$1}"
  timeout "$limit" "$python" benchmarks/fully_async.py --device cuda --gpus "$cards" --out "$work/always" --prompts "$((8 * cards))" --places 64 \
    --median 0.125 --sigma 1 --seeds "${seeds[@]}" --modes "${modes[@]}" --warmup 3 --tail 5 "${@:2}"
}
experts() { NCCL_MIN_P2P_NCHANNELS=32 NCCL_MAX_P2P_NCHANNELS=32 steps --model qwen3-30b-a3b --limit-s 330 "$@"; }

stage() {
  case $1 in
    tests_kernels) tests -m gpu1 tests/gpu --ignore tests/gpu/test_trainer.py ;;
    tests_trainer) tests -m gpu1 tests/gpu/test_trainer.py ;;
    tests_suites) tests -m trainer "$backends" ;;
    tests_parallel) tests tests/invariance/test_parallel.py ;;
    tests_features) tests tests/invariance/test_feature_layouts.py tests/invariance/test_trainer_dp.py ;;
    tests_cuts) tests tests/invariance/test_packing.py tests/invariance/test_resharding.py ;;
    tests_bf16) tests -m "gpu2 or gpu4" tests/gpu ;;
    tests_engines) SLIME_TEST_SGLANG_FLAGS="$(sed 's/--sglang-/--/g' <<<"$sglang")" tests -m sglang tests/contracts ;;
    log_probs) timeout "$limit" "$python" benchmarks/linear_log_probs.py ;;
    sleep) timeout "$limit" "$python" benchmarks/sleep.py --gpus "$cards" ;;
    steps_qwen3_4b)
      case $cards in
        1) steps --model qwen3-4b --samples 16 ;;
        *) steps --model qwen3-4b --samples $((16 * cards)) --max-tokens 12288 --words "$overlap" ;;
      esac ;;
    steps_qwen3_4b_tp2) steps --model qwen3-4b --samples $((16 * cards)) --max-tokens 24576 --words "$tp2 $overlap" ;;
    steps_qwen3_4b_host) steps --model qwen3-4b --samples 16 --steps 5 --words "$host" ;;
    steps_qwen3_4b_te) steps --model qwen3-4b --samples 16 --words "--transformer-impl transformer_engine" ;;
    steps_glm4) steps --model glm4-9b --samples $((8 * cards)) --max-tokens 16384 --words "$tp2" ;;
    steps_experts)
      experts --layers 16 --samples $((32 * cards)) --max-tokens $((cards == 2 ? 20480 : 24576)) \
        --words "--expert-model-parallel-size $cards $overlap" ;;
    steps_experts_whole)
      # Two hosts' cards have room for the gradients of all layers, but their host has none for Adam.
      local adam="$host" only=""
      [ "$cards" = 2 ] && adam="" only=--forward-backward
      experts --samples $((16 * cards)) --max-tokens 16384 --steps 5 --warmup 1 $only \
        --words "--expert-model-parallel-size $cards $full $adam" ;;
    rollout) rollout --model qwen3-0.6b ;;
    rollout_4b) rollout --model qwen3-4b ;;
    sync_qwen3_4b) sync qwen3-4b ;;
    sync_qwen3_4b_apart) sync qwen3-4b --apart ;;
    sync_glm4) sync glm4-9b --gpus "$((cards / 2))" --engine-gpus "$((cards / 2))" --apart ;;
    sync_experts)
      sync qwen3-30b-a3b --gpus "$cards" --engine-gpus "$cards" --engine-memory 0.27 \
        --words "--expert-model-parallel-size $cards" ;;
    sync_experts_apart)
      sync qwen3-30b-a3b --gpus "$((cards / 2))" --engine-gpus "$((cards / 2))" --apart --engine-memory 0.6 \
        --words "--expert-model-parallel-size $((cards / 2))" ;;
    sync_fp8) timeout "$limit" "$python" benchmarks/fp8_sync.py ;;
    fully_async)
      always "resident in-place-4 at-once-4 fully-async-2" --task lengths --model qwen3-1.7b --longest 4096 --max-tokens 16384 \
        --rounds 22 --words "$sglang --sglang-mem-fraction-static 0.3" ;;
    fully_async_rewards)
      always "resident in-place-4 at-once-4" --task quickstart --longest 2048 --rounds 60 \
        ${START:+--start "$START"} --words "$sglang --sglang-mem-fraction-static 0.3" ;;
    step) rounds colocated 0.7 ;;
    step_resident) work=$work/resident rounds colocated 0.35 "--no-offload-train --no-offload-rollout" ;;
    step_disaggregated) rounds disaggregated 0.85 ;;
    step_async) rounds async 0.85 ;;
    *) echo "no such stage: $1"; return 2 ;;
  esac
}

case $cards in
  1) all=(tests_kernels tests_trainer tests_suites tests_engines log_probs sleep steps_qwen3_4b steps_qwen3_4b_host rollout
    rollout_4b sync_qwen3_4b sync_fp8 step) ;;
  2) all=(tests_parallel tests_features tests_cuts tests_bf16 sleep steps_qwen3_4b steps_qwen3_4b_tp2 steps_glm4
    steps_experts steps_experts_whole sync_qwen3_4b_apart sync_glm4 sync_experts sync_experts_apart step step_resident
    step_disaggregated step_async fully_async fully_async_rewards) ;;
  4) all=(tests_parallel tests_bf16 steps_qwen3_4b steps_qwen3_4b_tp2 steps_glm4 steps_experts steps_experts_whole
    sync_glm4 sync_experts sync_experts_apart step step_resident step_disaggregated step_async fully_async fully_async_rewards) ;;
  *) echo "1, 2 or 4 cards, not $cards"; exit 2 ;;
esac
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformer_engine") is None)'; then
  [ "$cards" = 1 ] && all+=(steps_qwen3_4b_te)
fi
[ $# -gt 0 ] && all=("$@")

failed=0
for name in "${all[@]}"; do
  [ -e "$out/$name.done" ] && continue
  start=$SECONDS
  if stage "$name" >"$out/$name.log" 2>&1; then touch "$out/$name.done"; status=ended; else status=FAILED failed=1; fi
  grep -h '^{' "$out/$name.log" >"$out/$name.jsonl" || rm -f "$out/$name.jsonl"
  printf '%s: %s after %s s: %s\n' "$name" "$status" "$((SECONDS - start))" "$(tail -n 1 "$out/$name.log" | cut -c1-300)"
done
exit "$failed"
