#!/usr/bin/env bash
# COYO-ALIGN's three scores of one checkpoint: ImageNet kNN, COCO 5k and Flickr30k 1k retrieval, one after the other.
#
#     bash scripts/evaluate_align.sh CHECKPOINT [FOLDER]
#
# FOLDER (output/evaluate_align) gets knn/result and retrieval/result. By environment variables: IMAGENET, the folder that
# holds train and val (data/imagenet); RETRIEVAL, sets as eval_zeroshot.py --datasets names them, Karpathy's JSON files or
# what scripts/data/pack_karpathy.py made of them ("webdataset:data/coco webdataset:data/flickr30k"); PROCESSES, one a GPU (1).
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
checkpoint=$1 out=${2:-output/evaluate_align} imagenet=${IMAGENET:-data/imagenet}
sets=${RETRIEVAL:-webdataset:data/coco webdataset:data/flickr30k}
score() { torchrun --standalone --nproc_per_node="${PROCESSES:-1}" "$top/$1" --checkpoint "$checkpoint" "${@:2}"; }

score eval_knn.py --config "$top/configs/eval_knn/imagenet.yaml" --features z \
    --train_data "$imagenet/train" --val_data "$imagenet/val" --output_dir "$out/knn"
score eval_zeroshot.py --datasets $sets --output_dir "$out/retrieval"
