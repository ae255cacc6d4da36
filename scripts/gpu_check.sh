#!/usr/bin/env bash
# Checks this repository on a machine with a GPU in under ten minutes, offline: losses and gradients as on the CPU,
# compiled, checkpointed and sharded as plain, no host waits, memory and step times beside plan.py's figures.
#
#   bash scripts/gpu_check.sh                  # on the GPU
#   bash scripts/gpu_check.sh --cpu            # the same checks without one, as far as they apply
#   bash scripts/gpu_check.sh --only clip,ve   # some methods
#
# Needs torch, timm and transformers; writes output/gpu_check.md and exits with 1 if a check fails.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python scripts/gpu_check.py "$@"
