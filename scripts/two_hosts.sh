#!/usr/bin/env bash
# Runs finetune.py on two hosts without a scheduler; both need this folder at the same place, shared between them.
# On each of the two, with the name of one of them, which the other one can reach at port 29500:
#   FIRST_HOST=node1 bash scripts/two_hosts.sh --model … --output-dir … --batch-size 64
# Hardware: 2 × 8 GPUs (NPROC_PER_NODE=4: 2 × 4). Batch: 2 × 8 processes × --batch-size images a step.
# A host or process that dies is waited for, and the run goes on from its last state. Ctrl-C on both ends it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
trap '' USR1 # for finetune.py alone: torchrun would die of it

"$PYTHON" -m torch.distributed.run --nnodes=2 --nproc_per_node="${NPROC_PER_NODE:-8}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="${FIRST_HOST:?is the name of one of the two hosts}:29500" --rdzv-id=two_hosts \
  finetune.py --resume auto \
  "$@"
