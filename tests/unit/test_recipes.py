"""Every published recipe states the hyper-parameters of its original, with their values, and nothing
else.

Sources: for SIMLA and ALBEF the `configs/` of github.com/codezakh/SIMLA and salesforce/ALBEF (per
GPU, on 8); for clip-rocket the recipe list of its README and the defaults of main.py; for SLIP
section A.2 of Mu et al. 2021; for ALIGN the flag files of kakaobrain/coyo-align; for COYO-ViT
`configs/trainer` of kakaobrain/coyo-vit; for NXTP `config/` of kaiyuyue/nxtp and its training log.
"""

import importlib
from pathlib import Path

import pytest

from runtime.config.schema import Schema
from runtime.config.yaml import read_yaml
from tests.helpers.configs import load

ROOT = Path(__file__).resolve().parents[2]

# What a recipe says about machines, files and logs beside the method.
OPERATION = {
    "output_dir", "compile", "precision", "save_every", "eval_every", "log_every", "workers",
    "text_lengths", "checkpoint", "bert_config", "text_encoder", "vision_weights", "text_weights",
    "image_tokenizer_path", "clip", "llama", "sentence_encoder",
}  # fmt: skip
DATA = {
    "train_file", "val_file", "test_file", "image_root", "vqa_root", "vg_root", "answer_list",
    "refcoco_data", "det_file", "train_data", "val_data", "shards", "train_list", "test", "root",
    "metadata", "dataset",
}  # fmt: skip


def rates(lr, min_lr, warmup_lr, warmup, epochs, sched):
    return {
        "optimizer.lr": lr,
        "scheduler.min_lr": min_lr,
        "scheduler.warmup_lr": warmup_lr,
        "scheduler.warmup": warmup,
        "scheduler.duration": epochs,
        "scheduler.sched": sched,
    }


def optimizer(opt, weight_decay, **more):
    found = {"opt": opt, "weight_decay": weight_decay, **more}
    return {f"optimizer.{name}": value for name, value in found.items()}


# ---- SIMLA and ALBEF
def fusion(lr, min_lr, warmup, epochs, image_res, **more):
    schedule = rates(lr, min_lr, 1e-5, warmup, epochs, "cosine")
    return schedule | optimizer("adamW", 0.02) | {"image_res": image_res} | more


ALBEF = fusion(
    1e-4, 1e-5, "2000 steps", "30", 256, batch_size=64, method="albef", embed_dim=256,
    queue_size=65536, momentum=0.995, alpha=0.4, temp=0.07, mlm_probability=0.15,
)  # fmt: skip
SIMLA = ALBEF | {"method": "simla", "mask_ratio": 75 / 256}
SIMLA_CODE = {"compat": "original", "optimizer.decay_everything": True}
SIMLA_CODE |= {"scheduler.original_warmup": True}
SOFT = {"alpha": 0.4, "distill": True, "warm_up": True, "momentum": 0.995, "batch_size_train": 32}
COCO = {"k_test": 256, "batch_size_test": 64} | SOFT
FLICKR = {"k_test": 128, "batch_size_test": 64} | SOFT
VQA = {"k_test": 128, "batch_size_test": 16} | SOFT
NLVR = SOFT | {"stage": "finetune", "batch_size_train": 16, "batch_size_test": 64}
ASSIGNMENT = {"stage": "text_assignment", "crop_scale": (0.2, 1.0), "max_tokens": 25}
VE = {"batch_size_test": 64} | SOFT | {"warm_up": False}
GROUNDING = {"gradcam_mode": "itm", "block_num": 8, "batch_size_test": 32} | SOFT

RECIPES = {
    "Pretrain/albef": ALBEF,
    "Pretrain/simla": SIMLA,
    "Pretrain/original": SIMLA | SIMLA_CODE,
    "Retrieval/coco": fusion(1e-5, 1e-6, "100 steps", "5", 384, **COCO),
    "Retrieval/flickr": fusion(1e-5, 1e-6, "100 steps", "10", 384, **FLICKR),
    "VQA/vqa": fusion(2e-5, 1e-6, "400 steps", "8", 384, **VQA),
    "NLVR/nlvr2": fusion(2e-5, 1e-6, "100 steps", "10", 384, **NLVR),
    "NLVR/assignment": fusion(2e-5, 1e-5, "100 steps", "1", 256, batch_size_train=64, **ASSIGNMENT),
    "VE/snli_ve": fusion(2e-5, 1e-6, "100 steps", "5", 384, **VE),
    "Grounding/refcoco": fusion(1e-5, 1e-6, "100 steps", "5", 384, **GROUNDING),
}


# ---- clip-rocket and SLIP: 4 nodes x 8 GPUs x 128, or 8 x 8 x 64
def dual(model, lr, weight_decay, epochs, batch_size, **network):
    found = {f"network.{name}": value for name, value in {"model": model, **network}.items()}
    flags = {"duration": epochs, "warmup": "1", "lr_start": 1e-6, "lr_end": 1e-5}
    rocket = {"optimizer.lr": lr, "optimizer.weight_decay": weight_decay}
    rocket |= {"optimizer.betas": (0.9, 0.98), "batch_size": batch_size}
    return found | flags | rocket


def rocket(data, model, smoothing=0.1, lr=3e-3, weight_decay=0.1, loss="sum", texts=None, **more):
    found = dual(model, lr, weight_decay, "32", 128, embed_dim=256, separate_proj=True)
    found |= {"network.loss_avg_or_sum": loss, "network.label_smoothing": smoothing}
    found |= {"texts.text_augment": True, "views.num_augs": 2, "dataset": data}
    return found | {f"texts.{name}": value for name, value in (texts or {}).items()} | more


CLEAN = {"clean_before_augment": True}
HEADS = {
    "barlip": ("BARLIP", {}),
    "siamlip": ("SIAMLIP", {}),
    "byolip": ("SIAMLIP", {"momentum": True}),
    "swalip": ("SWALIP", {"smoothing": 0.0}),
}
CC3M = {"weight_decay": 0.5, "loss": "avg", "network.transformer_layers": 6}
CC3M |= {"network.text_dropout_prob": 0.2}
R50, VITS = "CL2L_R50_CL2L", "CL2L_VITS16MOCO_CL2L"

RECIPES |= {
    "main/cc3m_r50_cl2l": rocket("cc3m", R50, **CC3M),
    "main/cc12m_r50_cl2l": rocket("cc12m", R50, **{"network.text_dropout_prob": 0.05}),
    "main/yfcc15m_r50_cl2l": rocket(
        "yfcc15m", R50, texts=CLEAN | {"remove_stopwords_prob": 0.9}
    ),
    "main/yfcc15m_vits16_cl2l": rocket("yfcc15m", VITS, texts=CLEAN),
    "main/yfcc15m_vitb16_cl2l": rocket("yfcc15m", "CL2L_VITB16_CL2L", texts=CLEAN),
    "main/merged_r50_cl2l": rocket(
        "merged_opendata", R50, lr=2e-3, texts=CLEAN | {"caption_sampling": "multi"},
        **{"views.multicrop_resize": 192},
    ),
}  # fmt: skip
for name, (head, more) in HEADS.items():
    small, r50 = f"CL2L_VITS16MOCO_{head}", f"CL2L_R50_{head}"
    child = {"network.separate_proj_child": True}
    RECIPES[f"main/cc3m_r50_{name}"] = rocket("cc3m", r50, **CC3M, **more)
    RECIPES[f"main/cc12m_r50_{name}"] = rocket(
        "cc12m", r50, **{"network.text_dropout_prob": 0.1}, **more
    )
    RECIPES[f"main/yfcc15m_r50_{name}"] = rocket("yfcc15m", r50, texts=CLEAN, **more)
    RECIPES[f"main/yfcc15m_vits16_{name}"] = rocket("yfcc15m", small, texts=CLEAN, **child, **more)

SLIP = {"embed_dim": 512, "ssl_scale": 1.0, "ssl_temp": 0.1}
BILINEAR = {"views.interpolation": "bilinear", "dataset": "yfcc15m"}
RECIPES |= {
    "main/slip_vitb16": dual("SLIP_VITB16", 3e-3, 0.1, "25", 64, **SLIP) | BILINEAR,
    "main/slip_clip_vitb16": dual("CLIP_VITB16", 5e-4, 0.5, "25", 64, **SLIP) | BILINEAR,
    "main/slip_simclr_vitb16": dual("SIMCLR_VITB16", 3.2e-3, 0.1, "25", 64, **SLIP) | BILINEAR,
}


# ---- COYO-ALIGN: batches of 128 x 128 and 64 x 1024 processes
def align(model, lr, steps, warmup, batch_size):
    found = {
        "model": model, "image_size": 289, "embed_dim": 640, "context_length": 64,
        "temperature": 1.0, "label_smoothing": 0.1, "loss_avg_or_sum": "sum",
        "virtual_batch_size": 16,
    }  # fmt: skip
    network = {f"network.{name}": value for name, value in found.items()}
    flags = {"duration": f"{steps} steps", "warmup": f"{warmup} steps", "sched": "vit_linear"}
    flags |= {"lr_start": 0.0, "lr_end": 0.0, "batch_size": batch_size, "views.num_augs": 0}
    lamb = optimizer("lamb", 1e-5, betas=(0.9, 0.999), eps=1e-6)
    return network | flags | lamb | {"optimizer.lr": lr, "dataset": "wds"}


ALIGN_TOKENIZER = {"tokenizer": "bert-base-uncased"}
RECIPES |= {
    "main/align_cc3m": align("ALIGN_B3_MINI", 5e-3, 100000, 10000, 128) | ALIGN_TOKENIZER,
    "main/align_coyo700m": align("ALIGN_B7_BASE", 2e-3, 300000, 40000, 64) | ALIGN_TOKENIZER,
}


# ---- COYO-ViT: batch 4096 on 16 x 8 GPUs and 8 x 8, 512 on 8
def vit(model, image_size, loss, batch_size, schedule, optimizer_options, **network):
    found = {"model": model, "image_size": image_size, "loss": loss, **network}
    shape = {f"network.{name}": value for name, value in found.items()}
    return shape | schedule | optimizer_options | {"batch_size": batch_size}


def keras_adamw(weight_decay):
    return optimizer("adamw", weight_decay, keras=True, eps=1e-7, clip_grad_norm=1.0)


def vit_rates(lr, min_lr, warmup, epochs, sched):
    found = rates(lr, min_lr, None, f"{warmup} steps", epochs, f"vit_{sched}")
    del found["scheduler.warmup_lr"]  # 0 in every file, and the default
    return found


SGD = optimizer("sgd", 0.0, keras=True, momentum=0.9, clip_grad_norm=1.0)
FINE_TUNED = vit(
    "vit-l/16", 384, "softmax", 64, vit_rates(0.06, 0.0, 500, "8", "cosine"), SGD
) | {"batch_size_test": 64}  # fmt: skip
SMALL_SIDE = {"views.resize_small": 256}
RECIPES |= {
    "Classification/vit_l16_coyo300m": vit(
        "vit-l/16", 224, "sigmoid", 32, vit_rates(6e-4, 1e-5, 10000, "7", "linear"),
        keras_adamw(0.1), representation_size=1024, num_classes=21841,
    ) | SMALL_SIDE | {"targets.label_threshold": 0.1},
    "Classification/vit_b16_i1k": vit(
        "vit-b/16", 224, "sigmoid", 64, vit_rates(3e-3, 0.0, 10000, "300", "cosine"),
        keras_adamw(0.3), representation_size=768, dropout=0.1, label_smoothing=1e-4,
    ) | SMALL_SIDE | {"multi_label": False},
    "Classification/vit_l16_i1k_downstream": FINE_TUNED,
    "Classification/vit_l16_i1k_downstream_ema": FINE_TUNED
    | {"network.image_size": 512, "ema_decay": 0.9999},
}  # fmt: skip

# ---- NXTP: 32 GPUs
G3M = {
    "network.decoder_layers": 6, "network.image_size": 224, "train_vision_blocks": 6,
    "network.train_embeddings": "special", "batch_size": 16, "optimizer.lr": 1e-5,
    "optimizer.weight_decay": 0.1, "optimizer.betas": (0.9, 0.98), "optimizer.eps": 1e-6,
    "scheduler.sched": "cosine", "scheduler.duration": "3 epochs", "scheduler.warmup": "2000 steps",
    "scheduler.min_lr": 0.0, "scheduler.warmup_lr": 0.0,
}  # fmt: skip
RECIPES |= {
    "Recognition/g3m": G3M,
    "Recognition/g70m": G3M,
    "Recognition/in1k": G3M | {"batch_size": 4, "scheduler.duration": "5 epochs"},
}

NOT_PUBLISHED = ("photos", "small.", "debug", "digit", "rocket", "align.", "imagenet")


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def stated(file: Path, schema: Schema) -> set[str]:
    """Paths of the knobs that a recipe and the files it builds on name."""
    values, _ = read_yaml(file)
    bases = values.pop("base", [])
    found = set()
    for base in [bases] if isinstance(bases, str) else bases:
        found |= stated(file.parent / base, schema)
    for key, value in values.items():
        names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        found |= {schema.find(name) for name in names}
    return found


def test_every_published_recipe_is_in_the_table():
    files = {f"{path.parent.name}/{path.stem}" for path in ROOT.glob("configs/*/*.yaml")}
    published = {
        name
        for name in files
        if not name.startswith("data/")
        and not any(part in f"{name.split('/')[1]}." for part in NOT_PUBLISHED)
    }
    assert published == set(RECIPES)
    assert sum(name.startswith("main/") and "R50" in str(RECIPES[name]) for name in RECIPES) > 10


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_originals_values(name):
    file = ROOT / f"configs/{name}.yaml"
    config_class = importlib.import_module(name.split("/")[0]).Config
    config = load(config_class, file)
    assert {path: value_at(config, path) for path in RECIPES[name]} == RECIPES[name]
    assert stated(file, Schema(config_class)) - OPERATION - DATA == set(RECIPES[name]) - DATA


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda f: f.stem)
def test_no_name_of_a_recipe_contradicts_its_unit(file):
    values, _ = read_yaml(file)
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    for key, value in ((key, value) for section in sections for key, value in section.items()):
        unit = str(value).split(" ")[-1].rstrip("s") if " " in str(value) else None
        for word in ("epoch", "step", "sample"):
            assert word not in key or unit in (word, None), f"{key}: {value}"


def test_data_sets_are_written_once():
    """No recipe repeats what a file of configs/data says."""
    parts = {}
    for file in sorted((ROOT / "configs/data").glob("*.yaml")):
        for key, value in read_yaml(file)[0].items():
            parts.setdefault((key, str(value)), file.name)
    for name in RECIPES:
        values, _ = read_yaml(ROOT / f"configs/{name}.yaml")
        again = [key for key, value in values.items() if (key, str(value)) in parts]
        assert not again, f"{name}: {again} are in configs/data"
