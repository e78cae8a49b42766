#!/usr/bin/env bash
# Lint and tests, as continuous integration runs them.
#
#   bash scripts/test.sh                   everything but the acceptance tier
#   bash scripts/test.sh --full            all of it (long)
#   bash scripts/test.sh --oldest          with the oldest versions that the requirements allow, in .venv-oldest
#   bash scripts/test.sh -k digits -x      other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

tier="not slow"
for argument in "$@"; do
  shift
  case "$argument" in
    --full) tier="slow or not slow" ;;
    --oldest) export ISOMORPHIC_OLDEST=1 ;;
    *) set -- "$@" "$argument" ;;
  esac
done

source scripts/setup.sh
unset ISOMORPHIC_USER_FOLDER ISOMORPHIC_USER_WORDS # tests call commands and scripts of their own
unset PYTHONDONTWRITEBYTECODE # hundreds of processes: without __pycache__ each would compile all sources anew

# One pytest worker a core, up to 8; what cores are left over go to torch's threads inside each worker.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
workers=$((cores < 8 ? cores : 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / workers))}"

"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
exec "$PYTHON" -m pytest -n "$workers" --dist worksteal -m "$tier" "$@"
