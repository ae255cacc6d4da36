#!/usr/bin/env bash
# Checks this repository on a machine with a GPU, offline: losses and gradients as on the CPU in fp32, bf16 and fp16;
# compiled, checkpointed, sharded and resumed as plain; no host waits; memory and step times beside plan.py's figures
# and open_clip. On an H100 with 16 cores the checks and whole runs take seven minutes.
#
#   bash scripts/gpu_check.sh                  # on the GPU
#   bash scripts/gpu_check.sh --part checks    # numbers alone; or scripts: whole runs; or measures: times and memory
#   bash scripts/gpu_check.sh --cpu            # the same without a GPU, as far as it applies
#   bash scripts/gpu_check.sh --only clip,ve --recipes SIMLA       # some methods, some recipes
#   bash scripts/gpu_check.sh --part scripts --only vit_graphs     # whole runs with CUDA graphs, only if named
#   bash scripts/gpu_check.sh --part measures --modes blocks,reduce-overhead   # other ways of compiling
#   bash scripts/gpu_check.sh --peer simla=PATH --peer nxtp=PATH   # also the originals' steps, from their checkouts
#
# Needs torch, torchvision, timm, transformers, scikit-learn, tensorboard and tqdm. Packages that the machine lacks
# travel as wheels: where there is a network, for the same Python version,
#   pip download --only-binary :all: --no-deps --dest wheels ruamel.yaml open_clip_torch ftfy wcwidth nltk textblob \
#       textaugment gensim smart_open googletrans nest-asyncio defusedxml submitit google-crc32c
# and wheels/ in the root of the repository is unpacked into output/wheels. Writes output/gpu_check/report.md, tables of
# where the time goes beside it, and on a GPU sections of docs/BENCHMARKS.md; exits with 1 if a check fails.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d wheels ] && [ ! -d output/wheels ]; then
  mkdir -p output
  python -m pip install --quiet --no-index --no-deps --find-links wheels --target output/wheels wheels/*.whl
fi
if [ -d output/wheels ]; then
  export PYTHONPATH="$PWD/output/wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
exec python scripts/gpu_check.py "$@"
