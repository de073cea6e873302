# What the recipes scripts/run-*.sh share; to be sourced, not run.
# shellcheck shell=bash
#
#   needs NAME TEXT [NAME TEXT]...    inputs by environment variable; all that are missing are told at once
#   cluster NODES GPUS                the machines the recipe is made for: sets NUM_NODES and GPUS_PER_NODE
#   needs_math_inputs TEXT            those of RL on math: MODEL_DIR (TEXT), PROMPT_DATA, EVAL_DATA, SAVE_DIR
#   launch_rl FLAGS...                train.py with the arrays that every RL recipe fills, and FLAGS
#   launch SCRIPT FLAGS...            SCRIPT (train.py, train_async.py) as a Ray job; with --dry-run, `slime check`
#
# Variables of the user:
#   PYTHON             interpreter; default .venv/bin/python of this checkout
#   NUM_NODES, GPUS_PER_NODE   other machines than those the recipe states
#   RAY_ADDRESS        a cluster that runs; without it the one that `ray start` made here, or else one of our own
#   MASTER_ADDR        address of this machine that the other nodes reach, for a cluster of our own with several nodes
#   RAY_PORT           port of such a cluster; default 6379
#   JOB_ENV            names of variables to hand to the job, such as "NCCL_SOCKET_IFNAME WANDB_MODE"
#   CHECK=1            the same as --dry-run
#
# Nothing is killed but a Ray that was started here, by its process id.
set -euo pipefail
! declare -F launch_rl >/dev/null || return 0 # a recipe that sources another has it already

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck disable=SC2034 # for the recipes
SCRIPTS="$ROOT/scripts"
readonly RAY_START_TIMEOUT_S=120 RAY_STOP_TIMEOUT_S=45
RECIPE_RAY_PID='' RECIPE_SUBMIT_PID='' RECIPE_JOB=''

say() { printf 'recipe: %s\n' "$*" >&2; }

# Paths become absolute, as a Ray job runs in another folder.
needs() {
  local missing=() name
  while (($#)); do
    name="$1"
    if [[ -z ${!name:-} ]]; then
      missing+=("  $name  $2")
    elif [[ ${!name} != /* ]]; then
      printf -v "$name" '%s' "$PWD/${!name}"
    fi
    shift 2
  done
  ((${#missing[@]})) || return 0
  say "set in the environment, and start again:"
  printf '%s\n' "${missing[@]}" >&2
  exit 2
}

needs_math_inputs() {
  needs MODEL_DIR "$1" \
    PROMPT_DATA "DAPO-Math-17k as .jsonl or .parquet, with the columns prompt and label" \
    EVAL_DATA "AIME-2024 in the same form" \
    SAVE_DIR "folder for checkpoints; a run that finds one there goes on with it"
}

launch_rl() {
  launch train.py "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${PERF_ARGS[@]}" \
    "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${SGLANG_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
}

cluster() {
  NUM_NODES="${NUM_NODES:-$1}"
  GPUS_PER_NODE="${GPUS_PER_NODE:-$2}"
}

launch() {
  local script="$1" word words=() checks="${CHECK:-}"
  shift
  for word in "$@"; do
    if [[ $word == --dry-run ]]; then checks=1; else words+=("$word"); fi
  done
  find_python
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  if [[ -n $checks && $checks != 0 ]]; then
    "$PYTHON" -c 'import sys; from slime.cli.main import main; sys.exit(main())' \
      check --nodes "$NUM_NODES" --gpus-per-node "$GPUS_PER_NODE" -- "$ROOT/$script" "${words[@]}"
    return
  fi
  local environment
  environment="$(runtime_env)"
  trap clean_up EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  find_ray
  RECIPE_JOB="slime-$(date +%Y%m%d-%H%M%S)-$$"
  # Behind `wait`, so that a signal to this script is heeded at once and not when the job is over.
  "$PYTHON" -m ray.scripts.scripts job submit --submission-id "$RECIPE_JOB" --runtime-env-json "$environment" \
    -- "$PYTHON" "$ROOT/$script" "${words[@]}" &
  RECIPE_SUBMIT_PID=$!
  local status=0
  wait "$RECIPE_SUBMIT_PID" || status=$?
  RECIPE_SUBMIT_PID=
  exit "$status"
}

find_python() {
  if [[ -z ${PYTHON:-} && -x $ROOT/.venv/bin/python ]]; then
    PYTHON="$ROOT/.venv/bin/python"
  fi
  local wanted="${PYTHON:-python3}"
  PYTHON="$(command -v "$wanted")" || { say "there is no $wanted; run make setup-gpu, or set PYTHON"; exit 2; }
  [[ $PYTHON == /* ]] || PYTHON="$PWD/$PYTHON"
}

# What the job's driver and its workers get, as JSON.
runtime_env() {
  "$PYTHON" - "${JOB_ENV:-}" <<'PY'
import json, os, sys
names = ["PYTHONPATH", *sys.argv[1].split()]
if missing := [name for name in names if name not in os.environ]:
    sys.exit(f"recipe: JOB_ENV names {', '.join(missing)}, which the environment lacks; export it")
print(json.dumps({"env_vars": {name: os.environ[name] for name in names}}))
PY
}

# Whether somebody listens there; at once, where Ray's own commands wait for most of a minute.
listens() { (: <"/dev/tcp/$1/$2") 2>/dev/null; }

# Leaves in RAY_ADDRESS the cluster to submit to. An address that `ray start` left behind may be of a Ray that is gone.
find_ray() {
  local noted
  if [[ -n ${RAY_ADDRESS:-}${RAY_API_SERVER_ADDRESS:-} ]]; then
    say "using the Ray cluster at ${RAY_API_SERVER_ADDRESS:-$RAY_ADDRESS}"
    return
  fi
  noted="$("$PYTHON" -c 'from slime.orchestration.ray_cluster import running_cluster as r; print(r() or "")')"
  if [[ -z $noted ]]; then
    start_ray
  elif listens "${noted%:*}" "${noted##*:}" && "$PYTHON" -m ray.scripts.scripts status --address "$noted" &>/dev/null; then
    export RAY_ADDRESS="$noted"
    say "using the Ray cluster that runs here, $noted"
  else
    say "the last 'ray start' here left $noted, where nothing answers (or which wants RAY_AUTH_MODE=token)"
    start_ray
  fi
}

# A head node of our own, with ports and a folder of its own, that ends with this script.
start_ray() {
  local address="${MASTER_ADDR:-127.0.0.1}" folder port dashboard agent log deadline
  if ((NUM_NODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    say "$NUM_NODES nodes: start Ray on them and set RAY_ADDRESS, or set MASTER_ADDR to this machine's address"
    exit 2
  fi
  private_token
  export RAY_worker_niceness="${RAY_worker_niceness:-0}" # Ray's own 15 starves trainer and engines beside other programs.
  { read -r folder; read -r port; read -r dashboard; read -r agent; } < <("$PYTHON" - <<'PY'
import socket
from slime.orchestration.ray_cluster import private_ray_folder
print(private_ray_folder() or "")
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
for probe in probes:
    print(probe.getsockname()[1])
PY
  )
  ((NUM_NODES == 1)) || port="${RAY_PORT:-6379}"
  log="$(mktemp)"
  # The agent runs the job; by default it listens at one port on every machine, which another Ray here may have.
  # In a session of its own: Ctrl-C at the terminal is for this script, which then stops Ray in order.
  setsid "$PYTHON" -m ray.scripts.scripts start --head --block --node-ip-address "$address" --port "$port" \
    --dashboard-host "$address" --dashboard-port "$dashboard" --disable-usage-stats \
    --dashboard-agent-listen-port "$agent" ${folder:+--temp-dir "$folder"} >"$log" 2>&1 </dev/null &
  RECIPE_RAY_PID=$!
  deadline=$((SECONDS + RAY_START_TIMEOUT_S))
  export RAY_ADDRESS="$address:$port"
  # It is up when it takes a job, one that does nothing: before that it answers, but has no agent to run one.
  until listens "$address" "$dashboard" &&
    "$PYTHON" -m ray.scripts.scripts job submit --no-wait -- true >>"$log" 2>&1; do
    if ! kill -0 "$RECIPE_RAY_PID" 2>/dev/null || ((SECONDS > deadline)); then
      say "Ray did not start; it says:"
      cat "$log" >&2
      rm -f "$log"
      exit 1
    fi
    sleep 0.5
  done
  rm -f "$log"
  say "started Ray at $RAY_ADDRESS for this run (process $RECIPE_RAY_PID)"
  ((NUM_NODES == 1)) || say "on each other node: RAY_AUTH_MODE=$RAY_AUTH_MODE RAY_worker_niceness=$RAY_worker_niceness ray start --address $RAY_ADDRESS --block"
}

# Whoever has the token can run code as you; Ray listens on every interface. Several nodes must share one.
private_token() {
  [[ -z ${RAY_AUTH_MODE:-} ]] || return 0
  export RAY_AUTH_MODE=token
  [[ -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]] || return 0
  if ((NUM_NODES == 1)); then
    RAY_AUTH_TOKEN="$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')"
    export RAY_AUTH_TOKEN
  elif [[ ! -f $HOME/.ray/auth_token ]]; then
    say "the nodes need one token: run 'ray get-auth-token --generate', and copy ~/.ray/auth_token to each of them"
    exit 2
  fi
}

clean_up() {
  local status=$? deadline
  trap - EXIT HUP INT TERM
  if [[ -n $RECIPE_RAY_PID ]]; then
    # A Ray that is told to end waits half a minute for its jobs first.
    if [[ -n $RECIPE_SUBMIT_PID ]]; then
      say "stopping the job"
      "$PYTHON" -m ray.scripts.scripts job stop "$RECIPE_JOB" >/dev/null 2>&1 || true
    fi
    say "stopping the Ray that was started for this run"
    kill -TERM "$RECIPE_RAY_PID" 2>/dev/null || true
    deadline=$((SECONDS + RAY_STOP_TIMEOUT_S))
    while kill -0 "$RECIPE_RAY_PID" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$RECIPE_RAY_PID" 2>/dev/null || true # what is left of its session
  elif [[ -n $RECIPE_SUBMIT_PID ]]; then
    say "the job goes on in the cluster: ray job logs --follow $RECIPE_JOB, ray job stop $RECIPE_JOB"
  fi
  [[ -z $RECIPE_SUBMIT_PID ]] || kill -TERM "$RECIPE_SUBMIT_PID" 2>/dev/null || true
  exit "$status"
}
