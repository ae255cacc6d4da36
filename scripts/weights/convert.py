"""Convert published weights into files that the scripts load, and ours into files that others load.

    python scripts/weights/convert.py align-from-tf model-weights align-b7-base.safetensors
    python scripts/weights/convert.py align-to-hf output/align align-hf/

KIND              SOURCE -> DEST
align-from-tf     prefix of COYO-ALIGN's TensorFlow checkpoint -> .safetensors for main.py
align-to-hf       checkpoint or folder of a run -> folder that transformers' AlignModel loads
coyo-vit-from-tf  prefix of COYO-ViT's TensorFlow checkpoint -> .safetensors for Classification.py
coyo-vit-to-hf    run of Classification.py -> folder that transformers' ViT loads
merge             checkpoint or folder of a run, sharded or not -> its weights as one .safetensors

transformers' own files (kakaobrain/align-base) need no conversion: --checkpoint
FOLDER/model.safetensors.
TensorFlow itself is not needed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError
from base.files import write_json


def align_from_tf(source: Path, dest: Path) -> str:
    from models.weights.align import from_tensorflow_names
    from runtime.checkpoint import export_safetensors
    from scripts.weights.tf_checkpoint import read_checkpoint

    variables = {}
    for key, (name, value) in read_checkpoint(source).items():
        tower, _, rest = key.partition("/")
        if key == "temperature":
            variables[key] = value
        elif tower in ("image_encoder", "text_encoder"):
            # the name of the projection depends on what was built before it, its position in the tree
            # does not
            is_projection = rest.startswith("layer_with_weights-1/") and rest.count("/") == 1
            variables[
                f"{tower}/{'dense/' + rest.rpartition('/')[2] if is_projection else name}"
            ] = value
    if "temperature" not in variables:
        raise UserError(f"{source}: no ALIGN model; it has no temperature")
    weights = from_tensorflow_names(variables)
    for name in [name for name in weights if name.endswith("running_mean")]:
        weights[name.replace("running_mean", "num_batches_tracked")] = count()
    export_safetensors(weights, dest)
    return f"{dest}: {len(weights)} tensors"


def count():
    """Batches that a batch norm has seen, which TensorFlow does not tell."""
    import torch

    return torch.tensor(0)


def align_to_hf(source: Path, dest: Path) -> str:
    import torch

    from models.dual_encoder.align import Align
    from models.weights.align import config_of, hugging_face_config, is_align, to_hugging_face
    from models.weights.loading import compare_state
    from runtime.checkpoint import export_safetensors, read_weights

    weights = read_weights(source)
    if not is_align(weights):
        raise UserError(f"{source}: no ALIGN model")
    dest.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Align(config_of(weights))
    found = compare_state(model.state_dict(), weights)
    if found.missing or found.mismatched:
        raise UserError(f"{source}: not all of an ALIGN model\n{found.text()}")
    export_safetensors(to_hugging_face(weights), dest / "model.safetensors")
    write_json(dest / "config.json", hugging_face_config(model), indent=2)
    return f"{dest}: config.json, model.safetensors; the tokenizer is bert-base-uncased, images 289 pixels"


def coyo_vit_from_tf(source: Path, dest: Path) -> str:
    from models.weights.vit import native
    from runtime.checkpoint import export_safetensors
    from scripts.weights.tf_checkpoint import read_checkpoint

    weights = native(
        {key: value for key, (_, value) in read_checkpoint(source, slot="average").items()}
    )
    export_safetensors(weights, dest)
    return f"{dest}: {len(weights)} tensors"


def coyo_vit_to_hf(source: Path, dest: Path) -> str:
    from models.classification.classifier import ClassifierConfig
    from models.weights.any_image_encoder import config_of_weights
    from models.weights.vit import native, to_transformers, transformers_config
    from runtime.checkpoint import export_safetensors, read_weights

    weights = native(read_weights(source))
    config = ClassifierConfig(**config_of_weights(weights))
    dest.mkdir(parents=True, exist_ok=True)
    export_safetensors(to_transformers(weights), dest / "model.safetensors")
    kind = "ViTModel" if config.representation_size else "ViTForImageClassification"
    labels = {"id2label": {str(i): f"class {i}" for i in range(config.num_classes)}}
    about = transformers_config(config) | {"architectures": [kind]} | labels
    write_json(dest / "config.json", about, indent=2)
    return f"{dest}: config.json, model.safetensors; {kind}, images of {config.image_size} pixels in -1..1"


def merge(source: Path, dest: Path) -> str:
    """Of a sharded checkpoint with one tensor in memory at a time."""
    from runtime.checkpoint import export_safetensors, read_weights, verified, weights_file
    from runtime.sharded import is_sharded, merge_weights

    file = weights_file(source)
    if is_sharded(file):
        count = merge_weights(verified(file), dest)
    else:
        weights = read_weights(file)
        count = len(weights)
        export_safetensors(weights, dest)
    return f"{dest}: {count} tensors of {file}"


KINDS = {
    "align-from-tf": align_from_tf,
    "align-to-hf": align_to_hf,
    "coyo-vit-from-tf": coyo_vit_from_tf,
    "coyo-vit-to-hf": coyo_vit_to_hf,
    "merge": merge,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND")
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    arguments = parser.parse_args(argv)
    try:
        print(KINDS[arguments.kind](arguments.source, arguments.dest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
