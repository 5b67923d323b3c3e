#!/usr/bin/env bash
# Makes .venv out of requirements.lock (every version pinned, every hash checked) and puts fp8x into it.
# `./setup.sh compile` also fetches what compiles kernels for Hopper (270 MB; 730 MB on disk): without it the tests that
# compile or emulate kernels are skipped.
# After a change of dependencies, make the locks anew:
#   python3 -m uv pip compile --universal --generate-hashes --no-header --no-annotate --group dev pyproject.toml -o requirements.lock
#   python3 -m uv pip compile --universal --generate-hashes --no-header --no-annotate --no-deps --group compile -o requirements-compile.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# step WHAT ADVICE COMMAND...: runs the command and says how long it took, or what it printed and what to do.
step() {
  local what=$1 advice=$2 start=$SECONDS output
  shift 2
  printf 'setup: %s ... ' "$what"
  if ! output=$("$@" 2>&1); then
    printf 'failed\n\n%s\n\nsetup: %s\n' "$output" "$advice" >&2
    exit 1
  fi
  printf '%d s\n' $((SECONDS - start))
}

NETWORK="is PyPI, or the index that UV_INDEX_URL names, reached from here? Run ./setup.sh again: what is downloaded is kept."

if command -v uv >/dev/null; then
  uv=(uv)
else
  uv=(python3 -m uv)
  "${uv[@]}" --version >/dev/null 2>&1 ||
    step "uv, which installs the rest" "install uv your own way (pip, pipx, a package manager) and run ./setup.sh again." \
      python3 -m pip install --root-user-action=ignore uv
fi
step "Python $(cat .python-version) in .venv" \
  "no Python $(cat .python-version) was found, or downloaded: install it, or name one by UV_PYTHON=/path/to/python." \
  "${uv[@]}" venv --allow-existing
# Wheels alone: there is one of everything in the lock, so that no compiler is needed. Compiled to bytecode once: where
# Python may not write any (PYTHONDONTWRITEBYTECODE, a read-only .venv), `import jax` takes three times as long without.
step "the packages of requirements.lock" "$NETWORK" \
  "${uv[@]}" pip sync --python .venv --require-hashes --only-binary :all: --compile-bytecode requirements.lock
step "fp8x, editable" "$NETWORK" "${uv[@]}" pip install --python .venv --no-deps --editable .
if [ "${1-}" = compile ]; then
  # Beside Python's path, not on it: fp8x/pallas/aot.py says why.
  step "the compiler for Hopper in .venv/cuda-compiler" "$NETWORK" "${uv[@]}" pip install --python .venv \
    --target .venv/cuda-compiler --no-deps --require-hashes --only-binary :all: -r requirements-compile.lock
fi
