#!/usr/bin/env bash
# Installs jaxseg with its development tools into .venv and runs the tests: lint, then pytest with the
# arguments given (--all: the slow ones too), on up to four cores. JAXSEG_DATA names a folder of data
# sets; without it the tests on real data skip.
EXTRAS=dev
. "$(dirname "$0")/venv.sh"
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
    --max-worker-restart 0 "$@"
