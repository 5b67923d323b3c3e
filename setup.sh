#!/usr/bin/env bash
# Makes .venv out of requirements.lock (every version pinned, every hash checked) and puts fp8x into it.
# `./setup.sh compile` also fetches what compiles kernels for Hopper (270 MB; 730 MB on disk), which tests/pallas wants.
# After a change of dependencies, make the locks anew:
#   python3 -m uv pip compile --universal --generate-hashes --no-header --no-annotate --group dev pyproject.toml -o requirements.lock
#   python3 -m uv pip compile --universal --generate-hashes --no-header --no-annotate --no-deps --group compile -o requirements-compile.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python3 -m pip install --quiet --root-user-action=ignore uv
python3 -m uv venv --quiet --allow-existing
python3 -m uv pip sync --quiet --python .venv --require-hashes requirements.lock
python3 -m uv pip install --quiet --python .venv --no-deps --editable .
if [ "${1-}" = compile ]; then
  # Beside Python's path, not on it: fp8x/pallas/aot.py says why.
  python3 -m uv pip install --quiet --python .venv --target .venv/cuda-compiler --no-deps --require-hashes -r requirements-compile.lock
fi
