#!/usr/bin/env bash
# Lint, types and tests. Further arguments go to pytest: bash scripts/test.sh tests/ops -k causal
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/_venv.sh"
use_venv test "$root"
cd "$root"

echo "ruff check"
ruff check .
echo "ruff format --check"
ruff format --check .
echo "mypy"
mypy attention_zoo models
echo "pytest"
python -m pytest "$@"
