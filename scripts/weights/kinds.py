"""Conversions that `convert.py KIND SOURCE DEST` names: TensorFlow's checkpoints in, and what the
first version of the script wrote."""

from pathlib import Path

from base.errors import UserError
from base.writing import make_folder


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
    from models.weights.align import align_config, is_align
    from models.weights.any_dual_encoder import COYO_ALIGN_SIDE
    from models.weights.loading import compare_state
    from runtime.checkpoint import read_weights
    from runtime.config.from_checkpoint import description_of
    from scripts.weights.export_dual import write_align

    weights = read_weights(source)
    if not is_align(weights):
        raise UserError(f"{source}: no ALIGN model")
    make_folder(dest, "DEST")
    side = description_of(source).get("network", {}).get("image_size", COYO_ALIGN_SIDE)
    with torch.device("meta"):
        model = Align(align_config(weights, side))
    found = compare_state(model.state_dict(), weights)
    if found.missing or found.mismatched:
        raise UserError(f"{source}: not all of an ALIGN model\n{found.text()}")
    write_align(weights, model, dest)
    return f"{dest}: config.json, model.safetensors; the tokenizer is bert-base-uncased, images {side} pixels"


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
    from models.weights.loading import from_saved
    from models.weights.vit import native
    from runtime.checkpoint import read_weights
    from runtime.config.from_checkpoint import description_of
    from scripts.weights.export_vit import write_transformers

    weights = native(read_weights(source))
    network = description_of(source).get("network")  # of a run: COYO-ViT's activation, or another
    if network is None:
        network = config_of_weights(weights)
    config = from_saved(ClassifierConfig, network)
    make_folder(dest, "DEST")
    kind = write_transformers(weights, config, dest)
    mean, std = config.statistics
    pixels = f"images of {config.image_size} pixels, mean {mean} and std {std} of values 0..1"
    return f"{dest}: config.json, model.safetensors; {kind}, {pixels}"


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
