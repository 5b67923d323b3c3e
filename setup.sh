#!/usr/bin/env bash
# Makes .venv out of requirements.lock (every version pinned, every hash checked) and puts fp8x into it.
# After a change of dependencies, make the lock anew:
#   python3 -m uv pip compile --universal --generate-hashes --no-header --no-annotate --group dev pyproject.toml -o requirements.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python3 -m pip install --quiet --root-user-action=ignore uv
python3 -m uv venv --quiet --allow-existing
python3 -m uv pip sync --quiet --python .venv --require-hashes requirements.lock
python3 -m uv pip install --quiet --python .venv --no-deps --editable .
