#!/usr/bin/env python3
"""Commands of the original repositories whose files have other names here: each ends in one sentence
with the command that does the same. docs/COMING_FROM.md has the tables.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Configuration files of SIMLA and ALBEF -> recipe here
CONFIGS = {
    "Pretrain.yaml": "configs/Pretrain/simla.yaml",
    "Retrieval_coco.yaml": "configs/Retrieval/coco.yaml",
    "Retrieval_flickr.yaml": "configs/Retrieval/flickr.yaml",
    "VQA.yaml": "configs/VQA/vqa.yaml",
    "VE.yaml": "configs/VE/snli_ve.yaml",
    "NLVR.yaml": "configs/NLVR/nlvr2.yaml",
    "NLVR_pretrain.yaml": "configs/NLVR/assignment.yaml",
    "NLVR_Pretrain.yaml": "configs/NLVR/assignment.yaml",
    "Grounding.yaml": "configs/Grounding/refcoco.yaml",
}
# What COYO-ALIGN's flag files cc3m and coyo700m, each with b7-base, are here
FLAG_FILES = ("configs/main/align_cc3m.yaml", "configs/main/align_coyo700m.yaml")
TRAINER_KEYS = {  # of COYO-ViT's trainer -> flags of Classification.py
    "trainer.learning_rate.base_lr": "--lr",
    "trainer.optimizer.moving_average_decay": "--ema_decay",
    "trainer.backbone.backbone_params.image_size": "--image_size",
}

NEW_FLAGS = {  # of open_clip and COYO-ALIGN, that are no options here -> what to write in main.py
    "train_data": "--shards TARS with --dataset wds, or --metadata TABLE with --dataset pairs",
    "dataset_type": "--dataset wds (shards) or --dataset pairs (a table)",
    "csv_img_key": "--metadata 'TABLE?image=COLUMN&caption=COLUMN'",
    "csv_caption_key": "--metadata 'TABLE?image=COLUMN&caption=COLUMN'",
    "csv_separator": "--metadata TABLE: the separator is found",
    "train_num_samples": "--samples N",
    "siglip": "--model CLIP_VITB16_SIGLIP",
    "pretrained": "--model open_clip/NAME:TAG",
    "accum_freq": "--accumulate K --cache-features",
    "grad_checkpointing": "--activation_checkpointing",
    "torchcompile": "--compile",
    "imagenet_val": "--val-folder DIR --labels labels.json --templates templates.json",
    "save_frequency": "--save_every",
    "report_to": "--wandb",
    "train_steps": "--epochs 'N steps'",
    "warmup_steps": "--warmup 'N steps'",
    "seq_length": "--context_length N",
    "img_encoder_name": "--model ALIGN_B3_MINI",
    "txt_encoder_name": "--model ALIGN_B3_MINI",
}


def recipe_of(path: str | Path) -> str | None:
    """The recipe that took the place of an original's configuration file which is not there."""
    return None if Path(path).exists() else CONFIGS.get(Path(path).name)


def translated(words: Sequence[str]) -> list[str]:
    """Arguments with the names of recipes in place of the originals' configuration files."""
    return [recipe_of(word) or word for word in words]


def retrieval(words: Sequence[str]) -> str:
    """SIMLA's zero_shot_retrieval.py."""
    given = translated(words)
    return command("Retrieval.py", given + ([] if "--evaluate" in given else ["--evaluate"]))


def text_assignment(words: Sequence[str]) -> str:
    """SIMLA's Pretrain_NLVR.py, ALBEF's Pretrain_nlvr.py."""
    given = translated(words)
    recipe = ["--config", CONFIGS["NLVR_pretrain.yaml"]]
    return command("NLVR.py", given if "--config" in given else recipe + given)


def trainer(words: Sequence[str]) -> str:
    """COYO-ViT's `python3 -m trainer trainer=NAME key=value`."""
    values = dict(word.partition("=")[::2] for word in words)
    name = values.pop("trainer", "vit_b16_i1k")
    given = ["--config", f"configs/Classification/{name}.yaml"]
    for key, value in values.items():
        if key in TRAINER_KEYS:
            given += [TRAINER_KEYS[key], value]
    if values.get("experiment.mode") == "eval":
        given += ["--evaluate", "--checkpoint", values.get("experiment.save_dir", "FILE")]
    return command("Classification.py", given)


def nxtp(words: Sequence[str]) -> str:
    """NXTP's `scripts/run SCRIPT CONFIG`."""
    name = Path(words[1]).stem if len(words) > 1 else "g3m"
    return command("Recognition.py", ["--config", f"configs/Recognition/{name}.yaml"])


def command(script: str, words: Sequence[str]) -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["torchrun", "--nproc_per_node=8", script, *words])


# what the originals' files were called -> how its command reads, and what says the new one
SCRIPTS = {
    "zero_shot_retrieval.py": ("zero_shot_retrieval.py", retrieval),
    "Pretrain_NLVR.py": ("Pretrain_NLVR.py", text_assignment),
    "trainer.py": ("python -m trainer", trainer),
    "run": ("scripts/run", nxtp),
}

if __name__ == "__main__":  # files of the old names are links to this one
    old, new = SCRIPTS[Path(sys.argv[0]).name]
    print(f"error: {old} has another name here; run: {new(sys.argv[1:])}", file=sys.stderr)
    sys.exit(2)
