#!/usr/bin/env bash
# Makes .venv from requirements/{cpu,gpu}.lock; does nothing, at once, when it is already there.
#
#   scripts/setup.sh [cpu|gpu]     cpu: trainer and embedded engine (default); gpu: SGLang too
#
# PYTHON=/path/to/python3.12 chooses the interpreter. .venv/setup.json keeps seconds and bytes of the last set-up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly FLAVOUR="${1:-cpu}"
readonly VENV=.venv
readonly LOCK="requirements/$FLAVOUR.lock"
# Set on some machines; without .pyc files each process would compile Megatron and transformers anew.
unset PYTHONDONTWRITEBYTECODE

say() { printf 'setup: %s\n' "$*"; }

# What a finished set-up leaves in .venv/stamp: it is redone when the lock, the package's own metadata or the place of
# the checkout (scripts and the editable install hold absolute paths) change.
stamp_of() {
  printf '%s %s %s\n' "$1" "$(cat "requirements/$1.lock" pyproject.toml scripts/setup.sh | cksum)" "$PWD"
}

is_ready() {
  [[ -f $VENV/stamp && -x $VENV/bin/python ]] || return 1
  local stamp
  stamp="$(<"$VENV/stamp")"
  # The gpu set-up holds all of the cpu one, at the same versions.
  [[ $stamp == "$(stamp_of "$FLAVOUR")" || $stamp == "$(stamp_of gpu)" ]]
}

is_new_enough() {
  "$1" -c 'import sys; raise SystemExit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# Prints the first interpreter that fits. The lock was made for 3.12, so that comes first.
find_python() {
  local candidates=() tried=() version path
  [[ -n ${PYTHON:-} ]] && candidates+=("$PYTHON")
  for version in 3.12 3.13; do
    candidates+=("python$version")
    if [[ -n $UV ]] && path="$("$UV" python find --no-python-downloads "$version" 2>/dev/null)"; then
      candidates+=("$path")
    fi
    for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python3; do
      [[ -x $path ]] && candidates+=("$path")
    done
  done
  candidates+=(python3 python)
  for path in "${candidates[@]}"; do
    if is_new_enough "$path"; then
      command -v "$path"
      return
    fi
    tried+=("$path")
  done
  {
    say "slime needs Python 3.12 or 3.13, and none was found. Tried: ${tried[*]};"
    say "also 'uv python find' and ${PYENV_ROOT:-$HOME/.pyenv}/versions."
    say "Install one ('uv python install 3.12', 'pyenv install 3.12', 'apt-get install python3.12-venv'),"
    say "or name it: PYTHON=/path/to/python3.12 make setup"
  } >&2
  return 1
}

find_uv() {
  local path
  for path in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$VENV/bin/uv"; do
    if "$path" --version >/dev/null 2>&1; then
      command -v "$path"
      return
    fi
  done
}

# Bytes this machine has received since it started; nothing where the kernel does not say (macOS).
received_bytes() {
  local total=0 file found=
  for file in /sys/class/net/*/statistics/rx_bytes; do
    if [[ -r $file && $file != */lo/* ]]; then
      total=$((total + $(<"$file")))
      found=yes
    fi
  done
  [[ -z $found ]] || printf '%s' "$total"
}

make_venv() {
  local python
  if [[ -x $VENV/bin/python ]] && is_new_enough "$VENV/bin/python"; then
    return
  fi
  python="$(find_python)"
  rm -rf "$VENV"
  if [[ -n $UV ]]; then
    "$UV" venv --quiet --python "$python" "$VENV"
    return
  fi
  if ! "$python" -m venv "$VENV"; then
    rm -rf "$VENV"
    say "$python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
    return 1
  fi
  # uv unpacks gigabytes several times as fast as pip; where it cannot be had, pip does the same work.
  if "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet uv; then
    UV="$VENV/bin/uv"
  else
    say "uv could not be installed; going on with pip, which takes longer"
  fi
}

install_packages() {
  local arguments=(--quiet --no-deps --requirement "$LOCK" --editable .)
  if [[ -z $UV ]]; then
    "$VENV/bin/python" -m pip install --disable-pip-version-check "${arguments[@]}"
  elif ! "$UV" pip install --python "$VENV/bin/python" "${arguments[@]}"; then
    # uv brings certificates of its own; behind some proxies only the system's are right. Two names, for older versions.
    say "trying once more, with the system's certificates"
    UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 "$UV" pip install --python "$VENV/bin/python" "${arguments[@]}"
  fi
}

# Compiles what the processes of a run import: about 17 s of one core, which each of them would spend anew if they all
# met the fresh packages at the same time. Compiling whole packages would take minutes. Two halves, for two cores;
# torch, in both, is reached by the second one when the first has compiled it.
compile_imports() {
  export OMP_NUM_THREADS=1
  "$VENV/bin/python" -W ignore -c '
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.qwen3.modeling_qwen3' 2>/dev/null &
  "$VENV/bin/python" -W ignore -c '
import ray, aiohttp.web, httpx, math_verify, tensorboard.summary.writer.event_file_writer, rich.console
from slime.backends.megatron.process.stock import load_megatron
load_megatron()
import slime.orchestration.session' 2>/dev/null || true # what cannot be imported says so where it is used
  wait $! || true
}

main() {
  [[ -f $LOCK ]] || { say "no $LOCK: the argument is cpu or gpu" >&2; return 2; }
  if is_ready; then
    say "$VENV is up to date"
    return
  fi
  local start=$SECONDS received seconds seconds_install downloaded=null text="download not measured"
  received="$(received_bytes)"
  UV="$(find_uv)"
  make_venv
  say "installing $(grep -c '^[a-z]' "$LOCK") packages of $LOCK into $VENV ($("$VENV/bin/python" --version))"
  install_packages
  seconds_install=$((SECONDS - start))
  compile_imports
  seconds=$((SECONDS - start))
  if [[ -n $received ]]; then
    downloaded=$(($(received_bytes) - received))
    text="$(awk -v b="$downloaded" 'BEGIN { printf b < 1e9 ? "%.0f MB" : "%.1f GB", b < 1e9 ? b / 1e6 : b / 1e9 }') downloaded"
  fi
  printf '{"seconds": %s, "seconds_install": %s, "downloaded_bytes": %s, "installer": "%s"}\n' \
    "$seconds" "$seconds_install" "$downloaded" "$([[ -n $UV ]] && "$UV" --version || echo pip)" \
    >"$VENV/setup.json"
  stamp_of "$FLAVOUR" >"$VENV/stamp"
  say "$seconds s, $text"
}

main
