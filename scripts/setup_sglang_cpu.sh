#!/usr/bin/env bash
# Puts the stock SGLang server, as it runs on a CPU, into .sglang-cpu: a folder of packages in front of those of .venv.
# Does nothing, at once, when it is already there. Needs .venv (`make setup`).
#
# A folder of its own, because a laptop that trains needs none of it, and because SGLang's whole set of needs is the GPU's:
# requirements/sglang-cpu.lock has the part that serving on a CPU takes, and is installed without asking for the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly LOCK=requirements/sglang-cpu.lock
readonly FOLDER=.sglang-cpu
unset PYTHONDONTWRITEBYTECODE # without .pyc files each start of a server would compile SGLang anew

say() { printf 'setup-sglang-cpu: %s\n' "$*"; }

stamp_of() {
  printf '%s %s\n' "$(cat "$LOCK" scripts/setup_sglang_cpu.sh | cksum)" "$("$VENV/bin/python" --version)"
}

install_packages() {
  local uv
  uv="$(command -v uv || echo "$VENV/bin/uv")"
  if [[ ! -x $uv ]]; then
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --target "$1" --requirement "$LOCK"
    return
  fi
  local arguments=(pip install --python "$VENV/bin/python" --quiet --no-deps --target "$1" --requirement "$LOCK")
  # As in setup.sh: uv's own certificates first, then the system's.
  "$uv" "${arguments[@]}" || UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 "$uv" "${arguments[@]}"
}

main() {
  [[ -x $VENV/bin/python ]] || { say "no $VENV; run make setup first" >&2; return 2; }
  if [[ -f $FOLDER/stamp && "$(<"$FOLDER/stamp")" == "$(stamp_of)" ]]; then
    say "$FOLDER is up to date"
    return
  fi
  local start=$SECONDS
  rm -rf "$FOLDER"
  say "installing $(grep -c '^[a-z]' "$LOCK") packages of $LOCK into $FOLDER"
  install_packages "$FOLDER"
  stamp_of >"$FOLDER/stamp"
  say "$((SECONDS - start)) s"
}

main
