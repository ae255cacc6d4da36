"""SIMLA's and ALBEF's own YAML files: what only their code says, written into the values; and SLIP's
flag of another name.

A file is theirs where its `schedular` counts `warmup_epochs`. The user reads once what was added
and what differs.
"""

from collections.abc import Mapping

DEIT = "weights/deit_base_patch16_224-b5f2ef4d.pth"
BERT = "bert-base-uncased"
DIFFERENCES = (
    "a configuration of SIMLA or ALBEF: its hyper-parameters and warm-up are kept; defects of its "
    "code are fixed (docs/DIFFERENCES.md), --compat original --decay_everything brings them back"
)


def is_original(values: Mapping) -> bool:
    """Whether a file's values are those of SIMLA's or ALBEF's repository."""
    schedule = values.get("schedular")
    return isinstance(schedule, Mapping) and "warmup_epochs" in schedule


def pretraining(values: dict, notes: list[str]) -> dict:
    """Pretrain.yaml. Their code starts from DeiT-B and BERT, unless `from_scratch`; ALBEF's file is
    the one without an image tokenizer."""
    added = {}
    if values.pop("from_scratch", False):
        added = {"vision_weights": None, "text_weights": None}
    elif is_original(values):
        added = {"vision_weights": DEIT, "text_weights": BERT}
    if is_original(values):
        notes.append(DIFFERENCES)
        added["method"] = "simla" if "image_tokenizer_path" in values else "albef"
    return with_defaults(values, added, notes)


def fine_tuning(values: dict, notes: list[str]) -> dict:
    """The files of the downstream tasks."""
    if is_original(values):
        notes.append(DIFFERENCES)
    return values


def nlvr(values: dict, notes: list[str]) -> dict:
    """NLVR.yaml and, for the stage before it, NLVR_pretrain.yaml: the one without a test set."""
    values = fine_tuning(values, notes)
    if not is_original(values) or "test_file" in values:
        return values
    return with_defaults(values, {"stage": "text_assignment", "crop_scale": [0.2, 1.0]}, notes)


def zero_shot(values: dict, notes: list[str]) -> dict:
    """SLIP's `eval_zeroshot.py --resume FILE`."""
    if "resume" in values:
        file = values.pop("resume")
        notes.append(
            f"--resume {file} is taken as --checkpoint, as in SLIP: nothing is resumed here"
        )
        values["checkpoint"] = file
    return values


def with_defaults(values: dict, added: dict, notes: list[str]) -> dict:
    """`values` with what they leave open from `added`, and a note of that."""
    added = {key: value for key, value in added.items() if key not in values}
    listed = ", ".join(f"{key} {value}" for key, value in added.items())
    if listed:
        notes.append(f"as in its code: {listed}")
    return values | added
