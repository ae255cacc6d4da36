"""The originals' sides of benchmarks.pretrain and benchmarks.retrieval: SIMLA's or ALBEF's numeric
code and recipes with random weights, a process group of one, and stand-ins for old libraries."""

import importlib
import types
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from benchmarks import inputs
from benchmarks.child import marking, measure, now
from benchmarks.peers.stand_ins import Outputs, prepare, stand_in, start_process_group

RECIPES = {"pretrain": "configs/Pretrain.yaml", "retrieval": "configs/Retrieval_coco.yaml"}
FETCH_DEIT = {("simla", "retrieval"), ("albef", "pretrain")}  # unless init_deit is False
LOSSES = ("loss_mlm", "loss_ita", "loss_itm", "loss_mim", "loss_pseudo")  # as both return them
UNUSED = "dataset scheduler optim ruamel_yaml ruamel.yaml models.tokenization_bert"  # to evaluate


def build_model(options: types.SimpleNamespace, task: str) -> nn.Module:
    """The checkout's model for pretrain or retrieval with random weights, on the CPU."""
    simla = options.system == "simla"
    source = importlib.import_module(f"models.simla.{task}" if simla else f"models.model_{task}")
    bert = source.BertForMaskedLM if task == "pretrain" else source.BertModel
    bert.from_pretrained = classmethod(lambda cls, name, config, **more: cls(config, **more))
    checkout = Path(options.peer)
    config = yaml.safe_load((checkout / RECIPES[task]).read_text())
    config |= {"bert_config": str(checkout / config["bert_config"]), "from_scratch": True}
    special = {"pad_token_id": 0, "cls_token_id": inputs.CLS, "mask_token_id": inputs.MASK}
    tokenizer = types.SimpleNamespace(vocab_size=inputs.VOCABULARY, **special)
    given = {"init_deit": False} if (options.system, task) in FETCH_DEIT else {}
    network = source.SIMLA if simla else source.ALBEF
    return network(text_encoder="bert-base-uncased", tokenizer=tokenizer, config=config, **given)


# ---- pre-training
def arguments(batch: dict[str, Tensor], tokenizer: nn.Module | None) -> dict:
    """Arguments of the original's forward, made from our batch as its training loop makes them."""
    text = Outputs(input_ids=batch["text_ids"], attention_mask=batch["text_mask"].long())
    given = {"image": batch["image"], "text": text, "alpha": inputs.ALPHA}
    if tokenizer is not None:
        with torch.no_grad():
            codes = tokenizer.get_codebook_indices(batch["token_image"]).flatten(1)
        given["visual_token_ids"] = codes
        given["masked_visual_token_pos"] = batch["patch_mask"]
        given["masked_visual_tok_labels"] = codes[batch["patch_mask"]]
    return given


def start(options: types.SimpleNamespace) -> tuple[nn.Module, nn.Module | None, dict]:
    """Model, for SIMLA the image tokenizer with DALL-E's full-size encoder, and batch on the
    device; weights are random."""
    torch.backends.cudnn.allow_tf32 = False  # as in products
    torch.manual_seed(0)
    prepare(options)
    start_process_group(options.device)
    model = build_model(options, "pretrain").to(options.device).train()
    batch = inputs.synthetic_batch(options.batch)
    batch = {name: value.to(options.device) for name, value in batch.items()}
    if options.system == "albef":
        return model, None, batch
    tokenizer = importlib.import_module("models.discrete_vae").Dalle_VAE(inputs.IMAGE_SIZE)
    encoder = importlib.import_module("dall_e.encoder").Encoder
    tokenizer.encoder = encoder(device=torch.device(options.device))
    return model, tokenizer, batch


def step(options: types.SimpleNamespace) -> dict:
    """A training step as the original's loop takes it."""
    model, tokenizer, batch = start(options)
    settings = types.SimpleNamespace(opt="adamW", lr=1e-4, weight_decay=0.02)
    optimizer = importlib.import_module("optim").create_optimizer(settings, model)
    # SIMLA's loop computes the gradient norm each step, ALBEF's does not
    gradient_norm = getattr(importlib.import_module("utils"), "calculate_gradient_norm", None)

    def train() -> None:
        optimizer.zero_grad()
        parts = model(**arguments(batch, tokenizer))
        sum(parts).backward()
        if gradient_norm is not None:
            gradient_norm(model)
        optimizer.step()
        for loss in parts:  # both loops read every loss each step
            loss.item()

    return measure(train, options)


def losses(options: types.SimpleNamespace) -> dict:
    """Losses without dropout and with pinned choices; leaves the weights and image codes."""
    model, tokenizer, batch = start(options)
    model.eval()
    inputs.shake(model)
    inputs.pin_choices()
    model.mask = lambda ids, *args, **kwargs: (batch["mlm_ids"], batch["mlm_labels"])
    given = arguments(batch, tokenizer)
    codes = given.get("visual_token_ids")
    inputs.leave(options, {"model": model.state_dict(), "visual_codes": codes})
    with torch.no_grad():
        values = model(**given)
    return {"losses": {name: value.item() for name, value in zip(LOSSES, values, strict=False)}}


# ---- retrieval
class Split(list):
    """The loader of a test split: batches, and a `dataset` of images and captions."""


def evaluate(options: types.SimpleNamespace) -> dict:
    """The checkout's Retrieval.py. `marks` as ours has them: its progress log tells where matching
    begins. Leaves weights and scores."""
    torch.manual_seed(0)
    prepare(options)
    importlib.import_module("models")
    for name in UNUSED.split():
        stand_in(name)
    script = importlib.import_module("Retrieval")
    script.args = types.SimpleNamespace(distributed=False)
    model = build_model(options, "retrieval").to(options.device)
    inputs.shake(model)
    images, ids, mask = inputs.synthetic_split(options.images, options.captions)
    split = Split((part, None) for part in images.split(options.batch))
    split.dataset = types.SimpleNamespace(image=images, text=list(range(len(ids))))

    def tokenizer(texts: list[int], **_) -> Outputs:
        return Outputs(input_ids=ids[texts], attention_mask=mask[texts].long())

    marks = [now(options.device)]
    log = script.utils.MetricLogger
    log.log_every = marking(log.log_every, marks, options.device)
    scores = script.evaluation(
        model, split, tokenizer, torch.device(options.device), {"k_test": options.k_test}
    )
    marks.append(now(options.device))
    matrices = [torch.from_numpy(matrix) for matrix in scores]
    inputs.leave(options, {"model": model.state_dict(), "scores": matrices})
    return {"marks": marks}
