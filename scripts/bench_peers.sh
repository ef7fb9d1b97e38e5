#!/usr/bin/env bash
# Times each network beside the PyTorch network of the very same architecture. Arguments go to
# bench_peers.py.
# shellcheck source=scripts/venv.sh
. "$(dirname "$0")/venv.sh"
if ! python -c "import torch, torchvision" 2>/dev/null; then
    echo "error: needs PyTorch and torchvision in .venv, in the build for this machine:" \
        ".venv/bin/pip install torch torchvision" >&2
    exit 2
fi
pip_install=(python -m pip install --quiet --disable-pip-version-check)
"${pip_install[@]}" --no-deps timm segmentation_models_pytorch torchmetrics lightning-utilities
"${pip_install[@]}" huggingface-hub safetensors tqdm pyyaml
python scripts/bench_peers.py "$@"
