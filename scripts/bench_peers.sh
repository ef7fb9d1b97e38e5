#!/usr/bin/env bash
# Times each network beside the PyTorch network of the very same architecture. Installs the peers'
# libraries into .venv, where they are missing; PyTorch for a CPU. Arguments go to bench_peers.py.
# shellcheck source=scripts/venv.sh
. "$(dirname "$0")/venv.sh"
if ! python -c "import torch, torchvision, timm, segmentation_models_pytorch" 2>/dev/null; then
    echo "installing PyTorch and its segmentation libraries into .venv"
    python -m pip install --quiet --disable-pip-version-check torch torchvision \
        --index-url https://download.pytorch.org/whl/cpu
    python -m pip install --quiet --disable-pip-version-check timm segmentation_models_pytorch
fi
python scripts/bench_peers.py "$@"
