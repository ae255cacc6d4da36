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


def pretraining(values: dict, notes: list[str]) -> dict:
    """Pretrain.yaml. Their code starts from DeiT-B and BERT, unless `from_scratch`; ALBEF's file is
    the one without an image tokenizer."""
    method = "simla" if "image_tokenizer_path" in values else "albef"
    added = {"vision_weights": DEIT, "text_weights": BERT, "method": method}
    if values.pop("from_scratch", False):
        values = {"vision_weights": None, "text_weights": None} | values
    return with_its_code(values, added, notes)


def fine_tuning(values: dict, notes: list[str]) -> dict:
    """The files of the downstream tasks."""
    return with_its_code(values, {}, notes)


def nlvr(values: dict, notes: list[str]) -> dict:
    """NLVR.yaml and, for the stage before it, NLVR_pretrain.yaml: the one without a test set."""
    assignment = {"stage": "text_assignment", "crop_scale": [0.2, 1.0]}
    return with_its_code(values, {} if "test_file" in values else assignment, notes)


def with_its_code(values: dict, added: dict, notes: list[str]) -> dict:
    """The values of a file and, if it is SIMLA's or ALBEF's, what it leaves open from `added`."""
    schedule = values.get("schedular")
    if not isinstance(schedule, Mapping) or "warmup_epochs" not in schedule:
        return values
    notes.append(DIFFERENCES)
    added = {key: value for key, value in added.items() if key not in values}
    if added:
        listed = ", ".join(f"{key} {value}" for key, value in added.items())
        notes.append(f"as in its code: {listed}")
    return values | added


def zero_shot(values: dict, notes: list[str]) -> dict:
    """SLIP's `eval_zeroshot.py --resume FILE`."""
    file = values.pop("resume", None)
    if file is None:
        return values
    notes.append(f"--resume {file} is taken as --checkpoint, as in SLIP: nothing is resumed here")
    return values | {"checkpoint": file}
