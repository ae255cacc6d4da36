"""Configuration files of LAVIS, BLIP, COYO-ViT, timm and open_clip: what to write in their place."""

from collections.abc import Mapping
from pathlib import Path

from runtime.config.old_commands import CONFIGS, VIT_RECIPES


def foreign_hint(path: str | Path, values: Mapping) -> str | None:
    """What to write in place of a configuration of LAVIS, BLIP, COYO-ViT, timm or open_clip; None
    where the `values` of a file are of none of them."""
    as_flags = "to which give what differs as flags; docs/COMING_FROM.md has them"
    model, data = values.get("model"), values.get("datasets")
    if isinstance(model, Mapping) and "arch" in model:
        return of_lavis(str(model["arch"]))
    sets = data.values() if isinstance(data, Mapping) else ()
    if sets and all(isinstance(each, Mapping) for each in sets):
        return (
            f"a configuration of LAVIS for its data ({', '.join(map(str, data))}); name the "
            "annotation files and the folder of images in it by train_file, val_file, test_file "
            "and image_root"
        )
    if "vit_grad_ckpt" in values or values.get("vit") in ("base", "large"):
        recipe = CONFIGS.get(Path(path).name.lower())
        instead = f"; ALBEF's and SIMLA's recipe for these data is {recipe}" if recipe else ""
        return f"a configuration of BLIP, whose networks are not here{instead}"
    if values.keys() & {"hydra", "backbone", "backbone_name"}:
        name = Path(path).stem if Path(path).stem in VIT_RECIPES else "vit_b16_i1k"
        return f"a configuration of COYO-ViT; start from configs/Classification/{name}.yaml, {as_flags}"
    if values.keys() >= {"data_dir", "reprob", "model_ema"}:
        return f"what timm's train.py saved; start from configs/Classification/vit_b16_i1k.yaml, {as_flags}"
    if values.keys() >= {"accum_freq", "force_quick_gelu"}:
        return f"what open_clip's training saved; start from configs/main/rocket.yaml, {as_flags}"
    return None


def of_lavis(arch: str) -> str:
    """What to write in place of a configuration of LAVIS for the network `arch`."""
    if not arch.startswith("albef"):
        return f"a configuration of LAVIS ({arch}), whose network is not here, only its albef_*"
    return (
        f"a configuration of LAVIS ({arch}); start from ALBEF's recipe in configs/ and give "
        "what differs as flags: docs/COMING_FROM.md has those of its run section"
    )
