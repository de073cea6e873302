#!/usr/bin/env bash
# FrozenLake of gymnasium on two CPU cores: walks at random -> SFT, for the form -> GRPO on episodes.
# Usage: bash examples/gymnasium/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (60).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/tiny.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/tiny.sh"
begin gymnasium "$@"
"${python}" "${here}/lake.py" "${run}/data" --seed "${seed}"
"${python}" "${root}/examples/quickstart/make_model.py" "${run}/model" --seed "${seed}"

supervised 58 2 # to repeat the cell, and any of the four ways
settings="$("${python}" -c 'import json, lake; print(json.dumps(lake.SETTINGS))')"
grpo 58 \
   --environment-path slime.environments.gymnasium_text.GymnasiumText --environment-args "${settings}" \
   --environment-max-turns 12 --rollout-max-context-len 224 \
   --num-rollout "${NUM_ROLLOUT:-60}" --rollout-batch-size 16 --n-samples-per-prompt 8 --rollout-max-response-len 192 \
   --lr 1e-3 --min-lr 2e-4 \
   --eval-interval 20 --n-samples-per-eval-prompt 8 --eval-temperature 1 --eval-max-response-len 192
