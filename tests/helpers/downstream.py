"""Runs of the downstream scripts with their debug configuration on a handful of images, and tiny
checkpoints."""

import json
from pathlib import Path

import torch

import Grounding
import NLVR
import VE
import VQA
from runtime.config.cli import parse
from tests.helpers.runs import words_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"VQA": VQA, "VE": VE, "NLVR": NLVR, "Grounding": Grounding}


def flags(task: str, data: Path, out: Path, *more) -> list[str]:
    """Command line of the task's debug run on `data`; NLVR_TA is NLVR's first stage."""
    split = {name: data / f"{task.lower()}_{name}.json" for name in ("train", "val", "test")}
    files = {f"{name}_file": [file] for name, file in split.items()} | {"image_root": [data]}
    config = f"configs/{task}/debug.yaml"
    if task == "VQA":
        files["train_file"].append(data / "vg_qa.json")
        files |= {"vqa_root": files.pop("image_root"), "answer_list": [data / "answer_list.json"]}
        files["test_answers"] = [data / "vqa_test_answers.json"]
    elif task == "NLVR_TA":
        files = {"train_file": [data / "pretrain_train.json"], "image_root": [data]}
        config = "configs/NLVR/debug_assignment.yaml"
    elif task == "Grounding":
        files = {
            "train_file": [data / "refcoco+_train.json"],
            "test_file": [data / "refcoco+_test.json"],
        }
        files |= {
            "image_root": [data],
            "refcoco_data": [data],
            "det_file": [data / "refcoco+/dets.json"],
        }
    values = {"config": config, "text_encoder": data / "tokenizer", "output_dir": out}
    values["save_every"] = "100 steps"  # and at the end: a checkpoint takes as long as a step
    return [*words_of({**values, "device": "cpu", **files}), *map(str, more)]


def start(task: str, data: Path, out: Path, *more) -> dict:
    """Run the script; returns its metrics ({} where it makes none)."""
    script = SCRIPTS[task.partition("_")[0]]
    script.main(parse(script.Config, flags(task, data, out, *more)))
    metrics = out / "result/metrics.json"
    return json.loads(metrics.read_text()) if metrics.exists() else {}


def pretraining_checkpoint(data: Path, folder: Path, two_stage: bool) -> list[str]:
    """A pre-training checkpoint in the originals' form, at another resolution than the debug runs;
    flags to use it."""
    from dataset.text.wordpiece import Tokenizer
    from models.fusion.simla import Simla, SimlaConfig
    from models.layers.vit import ViTConfig
    from models.layers.xbert import BertConfig

    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text()) | {"encoder_width": 32}
    if two_stage:
        geometry.pop("add_cross_attention")
        geometry["fusion_layer"] = 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bert.json").write_text(json.dumps(geometry))
    bert = BertConfig.from_json(geometry | {"vocab_size": Tokenizer(data / "tokenizer").vocab_size})
    losses = {"mim": not two_stage, "keywords": 0 if two_stage else 5}
    vit = ViTConfig(48, 16, 32, 2, 4, mask_token=not two_stage)
    model = Simla(SimlaConfig(vit, bert, embed_dim=16, queue_size=64, **losses))
    torch.save(
        {"model": model.state_dict(), "epoch": 29, "config": {"image_res": 48}},
        folder / "pretrained.pth",
    )
    return ["--checkpoint", folder / "pretrained.pth", "--bert_config", folder / "bert.json"]
