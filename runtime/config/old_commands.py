#!/usr/bin/env python3
"""Commands of the original repositories whose files have other names here: each ends in one sentence
with the command that does the same. docs/COMING_FROM.md has the tables.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 8  # of the commands that are named here, unless a launcher has started another number

# Configuration files of SIMLA, ALBEF and BLIP, in lower case -> recipe here
CONFIGS = {
    "pretrain.yaml": "configs/Pretrain/simla.yaml",
    "retrieval_coco.yaml": "configs/Retrieval/coco.yaml",
    "retrieval_flickr.yaml": "configs/Retrieval/flickr.yaml",
    "vqa.yaml": "configs/VQA/vqa.yaml",
    "ve.yaml": "configs/VE/snli_ve.yaml",
    "nlvr.yaml": "configs/NLVR/nlvr2.yaml",
    "nlvr_pretrain.yaml": "configs/NLVR/assignment.yaml",
    "grounding.yaml": "configs/Grounding/refcoco.yaml",
}

# COYO-ALIGN's flag files -> recipe here, its batch over all processes, and a process's
ALIGN_RECIPES = {
    "cc3m": ("configs/main/align_cc3m.yaml", 16384, 128),
    "coyo700": ("configs/main/align_coyo700m.yaml", 65536, 64),  # coyo700.flags in the README
}
ALIGN_KEYS = {  # its flags -> what main.py calls them
    "outdir": "--output_dir {}",
    "dataset_dir": "--shards {}",
    "lr": "--lr {}",
    "weight_decay": "--wd {}",
    "train_steps": "--epochs {} steps",
    "warmup_steps": "--warmup {} steps",
    "temperature": "--temperature {}",
    "embed_dim": "--embed_dim {}",
    "seq_length": "--context_length {}",
}

# COYO-ViT's trainers, which are recipes here -> batch over all processes there, a process's here
VIT_RECIPES = {
    "vit_b16_i1k": (4096, 64),
    "vit_l16_coyo300m": (4096, 32),
    "vit_l16_i1k_downstream": (512, 64),
    "vit_l16_i1k_downstream_ema": (512, 64),
}
VIT_KEYS = {  # its keys -> what Classification.py calls them
    "trainer.epochs": "--epochs {}",
    "trainer.steps": "--epochs {} steps",
    "trainer.learning_rate.base_lr": "--lr {}",
    "trainer.learning_rate.init_lr": "--warmup_lr {}",
    "trainer.learning_rate.end_learning_rate": "--min_lr {}",
    "trainer.learning_rate.warmup_steps": "--warmup {} steps",
    "trainer.learning_rate.power": "--power {}",
    "trainer.optimizer.moving_average_decay": "--ema_decay {}",
    "trainer.optimizer.config.weight_decay_rate": "--weight_decay {}",
    "trainer.optimizer.config.global_clipnorm": "--clip_grad_norm {}",
    "trainer.optimizer.config.momentum": "--momentum {}",
    "trainer.backbone.pretrained": "--checkpoint {}",
    "trainer.backbone.backbone_params.image_size": "--image_size {}",
    "trainer.backbone.backbone_params.dropout_rate": "--dropout {}",
    "trainer.backbone.backbone_params.representation_size": "--representation_size {}",
    "trainer.loss.config.label_smoothing": "--label_smoothing {}",
    "trainer.dataset.train.mixup_alpha": "--mixup_alpha {}",
    "trainer.dataset.train.cutmix_alpha": "--cutmix_alpha {}",
}


def recipe_of(path: str | Path) -> str | None:
    """The recipe that took the place of an original's configuration file which is not there."""
    return None if Path(path).exists() else CONFIGS.get(Path(path).name.lower())


def recipe_of_flags(path: str | Path) -> str | None:
    """The recipe of a flag file of COYO-ALIGN, such as conf/cc3m.flags; None for any other file."""
    if Path(path).suffix != ".flags":
        return None
    return ALIGN_RECIPES["coyo700" if Path(path).stem.startswith("coyo700") else "cc3m"][0]


def recipe_of_nxtp(path: str | Path) -> str | None:
    """The recipe of a configuration of NXTP, config_g3m.py or g3m.py."""
    name = Path(path).stem.removeprefix("config_")
    return f"configs/Recognition/{name}.yaml" if name in ("g3m", "g70m", "in1k") else None


def same_words(script: str, needed: Sequence[str], words: Sequence[str]) -> str:
    """A command of SIMLA or ALBEF whose script alone has another name; `needed`: a flag that it has
    here, with its value."""
    given = with_recipes(words)
    has_it = any(word.partition("=")[0] == needed[0] for word in given)
    return command(script, given if has_it else [*given, *needed])


def trainer(words: Sequence[str]) -> str:
    """COYO-ViT's `python3 -m trainer trainer=NAME key=value`."""
    values = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")  # Hydra's +key=value adds one
        values[key] = value.strip("'\"")
    name = values.pop("trainer", "vit_b16_i1k")
    mode = values.pop("experiment.mode", "train_eval")
    folder = values.pop("experiment.save_dir", "")
    given = ["--config", f"configs/Classification/{name}.yaml"]
    given += in_new_names(values, VIT_KEYS)
    if mode == "eval":
        given += ["--evaluate", "--checkpoint", folder or "FILE"]
    else:
        published, share = VIT_RECIPES.get(name, (0, 64))
        given += same_batch(values, "trainer.global_batch_size", published, share)
        given += ["--output_dir", folder] if folder else []
    left_out = [key for key in values if key not in VIT_KEYS]
    return command("Classification.py", given, left_out)


def nxtp(words: Sequence[str]) -> str:
    """NXTP's `scripts/run SCRIPT ... CONFIG`; eval_hook.py scores the checkpoint that CONFIG names."""
    recipe = recipe_of_nxtp(words[-1]) if words else None
    given = ["--config", recipe or "configs/Recognition/g3m.yaml"]
    if words and Path(words[0]).stem == "eval_hook":
        given += ["--evaluate", "--checkpoint", "FILE"]
    return command("Recognition.py", given)


def align(flags: Sequence[tuple[str, list[str]]]) -> str:
    """COYO-ALIGN's `main.py --flagfile FILE ...`, cut at its flags: (name, words that follow)."""
    files = [Path(word).stem for name, words in flags if name == "flagfile" for word in words]
    values = {}
    for name, words in flags:
        for word in words if name == "flagfile" else ():
            values |= flags_in(Path(word))
    values |= {name: words[-1] for name, words in flags if words and name != "flagfile"}
    of_coyo = any(file.startswith("coyo700") for file in files)
    recipe, published, share = ALIGN_RECIPES["coyo700" if of_coyo else "cc3m"]
    of_file = ("efficientnet-b7", "bert-base") if "b7-base" in files else None
    towers = of_file or ("efficientnet-b3", "bert-mini")
    image = values.pop("img_encoder_name", towers[0]).removeprefix("efficientnet-")
    text = values.pop("txt_encoder_name", towers[1]).removeprefix("bert-")
    given = ["--config", recipe, "--model", f"ALIGN_{image}_{text}".upper()]
    given += in_new_names(values, ALIGN_KEYS)
    batch = same_batch(values, "batch_size", published, share)
    if "--accumulate" in batch:
        batch += ["--cache-features"]  # the micro-batches make one contrastive batch
    return command("main.py", given + batch, [key for key in values if key not in ALIGN_KEYS])


def flags_in(file: Path) -> dict[str, str]:
    """What a flag file of COYO-ALIGN sets, where it is there: a line is --name=value. UserError."""
    from base.reading import read_lines  # the links to this file find no package at first

    lines = read_lines(file) if file.is_file() else []
    pairs = [line.strip().lstrip("-").partition("=") for line in lines]
    return {name: value for name, equals, value in pairs if equals and name != "flagfile"}


def with_recipes(words: Sequence[str]) -> list[str]:
    """Arguments with the names of recipes in place of the originals' configuration files."""
    given = []
    for word in words:
        flag, equals, value = word.rpartition("=")
        given.append(flag + equals + (recipe_of(value) or value))
    return given


def in_new_names(values: Mapping[str, str], names: Mapping[str, str]) -> list[str]:
    """Flags and values of a command here for the `values` of a command there."""
    given = []
    for key, value in values.items():
        if key in names:
            flag, _, form = names[key].partition(" ")
            given += [flag, form.format(value)]
    return given


def same_batch(values: dict[str, str], key: str, published: int, share: int) -> list[str]:
    """Flags that make an update of as many samples: in micro-batches of the recipe's `share` for each
    process, or without them where it is smaller. A whole number at `key` is taken out of `values`;
    for anything else the `published` one counts."""
    whole = int(values.pop(key)) if values.get(key, "").isdecimal() else published
    own = whole // processes()
    if own > share and own % share == 0:
        return ["--accumulate", str(own // share)]
    return ["--batch_size", str(own)] if own and own != share else []


def processes() -> int:
    """Processes of a node: of the launcher that started this one, if any."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES))


def command(script: str, words: Sequence[str], left_out: Sequence[str] = ()) -> str:
    """The command line, quoted for a shell, and what of the old one it leaves out."""
    line = shlex.join(["torchrun", f"--nproc_per_node={processes()}", script, *words])
    return f"{line}   # without {', '.join(left_out)}" if left_out else line


ASSIGNMENT = partial(same_words, "NLVR.py", ("--config", CONFIGS["nlvr_pretrain.yaml"]))
# what the originals' files were called -> how its command reads, and what says the new one
SCRIPTS = {
    "zero_shot_retrieval.py": (
        "zero_shot_retrieval.py",
        partial(same_words, "Retrieval.py", ("--evaluate",)),
    ),
    "Pretrain_NLVR.py": ("Pretrain_NLVR.py", ASSIGNMENT),
    "Pretrain_nlvr.py": ("Pretrain_nlvr.py", ASSIGNMENT),
    "trainer.py": ("python -m trainer", trainer),
    "run": ("scripts/run", nxtp),
    "run_dist": ("scripts/run_dist", nxtp),
}

if __name__ == "__main__":  # files of the old names are links to this one
    sys.path[0] = str(ROOT)  # Python put the folder of this file there
    from runtime.advice import leave_with

    old, new = SCRIPTS[Path(sys.argv[0]).name]
    leave_with(f"{old} has another name here; run: {new(sys.argv[1:])}")
