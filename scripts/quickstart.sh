#!/usr/bin/env bash
# Installs jaxseg into .venv and trains a small network on the embedded data set.
# shellcheck source=scripts/venv.sh
. "$(dirname "$0")/venv.sh"
python -m jaxseg.main --config experiments/quickstart.py --workdir "${1:-runs/quickstart}"
echo "More in README.md; for its commands: . .venv/bin/activate"
