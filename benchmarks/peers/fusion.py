"""The original's side of benchmarks.pretrain: SIMLA's or ALBEF's model out of a checkout.

The checkout's numeric code runs as it is. Around it, what it needs to start today: random weights
instead of downloads, a process group of one, and stand-ins for old libraries (stand_ins.py).
"""

import importlib
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gauge import measure
from benchmarks.inputs import (
    ALPHA,
    CLS,
    MASK,
    QUEUE_SIZE,
    VOCABULARY,
    pin_choices,
    shake,
    synthetic_batch,
)
from benchmarks.peers.stand_ins import prepare, start_process_group

CONFIG = {
    "image_res": 256,
    "vision_width": 768,
    "embed_dim": 256,
    "temp": 0.07,
    "mlm_probability": 0.15,
    "queue_size": QUEUE_SIZE,
    "momentum": 0.995,
    "from_scratch": True,  # SIMLA: no DeiT download
}
BERT_FILES = {"simla": "configs/shared_bert.json", "albef": "configs/config_bert.json"}
LOSSES = ("loss_mlm", "loss_ita", "loss_itm", "loss_mim", "loss_pseudo")  # as both return them


def build_model(options: types.SimpleNamespace) -> nn.Module:
    """The checkout's pre-training model with random weights, on the CPU."""
    simla = options.system == "simla"
    source = importlib.import_module("models.simla.pretrain" if simla else "models.model_pretrain")
    source.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config: cls(config))
    tokenizer = types.SimpleNamespace(
        pad_token_id=0, cls_token_id=CLS, mask_token_id=MASK, vocab_size=VOCABULARY
    )
    config = dict(CONFIG, bert_config=str(Path(options.peer) / BERT_FILES[options.system]))
    if simla:
        return source.SIMLA(text_encoder="bert-base-uncased", tokenizer=tokenizer, config=config)
    return source.ALBEF(
        text_encoder="bert-base-uncased", tokenizer=tokenizer, config=config, init_deit=False
    )


def build_tokenizer(options: types.SimpleNamespace) -> nn.Module | None:
    """The checkout's image tokenizer with DALL-E's full-size encoder, random weights; None for
    ALBEF."""
    if options.system == "albef":
        return None
    try:
        vae = importlib.import_module("models.discrete_vae").Dalle_VAE(CONFIG["image_res"])
        encoder = importlib.import_module("dall_e.encoder").Encoder
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the original's image tokenizer needs {error.name}: pip install {error.name}s"
        ) from None
    vae.encoder = encoder(device=torch.device(options.device))
    return vae


def arguments(batch: dict[str, Tensor], tokenizer: nn.Module | None) -> dict:
    """Arguments of the original's forward, made from our batch as its training loop makes them."""
    text = types.SimpleNamespace(
        input_ids=batch["text_ids"], attention_mask=batch["text_mask"].long()
    )
    given = {"image": batch["image"], "text": text, "alpha": ALPHA}
    if tokenizer is not None:
        with torch.no_grad():
            codes = tokenizer.get_codebook_indices(batch["token_image"]).flatten(1)
        given["visual_token_ids"] = codes
        given["masked_visual_token_pos"] = batch["patch_mask"]
        given["masked_visual_tok_labels"] = codes[batch["patch_mask"]]
    return given


def start(options: types.SimpleNamespace) -> tuple[nn.Module, nn.Module | None, dict]:
    """Model, image tokenizer and batch on the device."""
    tf32 = options.peer_precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.manual_seed(0)
    prepare(options)
    start_process_group(options.device)
    model = build_model(options).to(options.device).train()
    batch = synthetic_batch(options.batch)
    batch = {name: value.to(options.device) for name, value in batch.items()}
    return model, build_tokenizer(options), batch


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

    result = measure(train, options)
    dist.destroy_process_group()
    return result


def losses(options: types.SimpleNamespace) -> dict:
    """Losses without dropout and with pinned choices; `peer.pt` in the folder `exchange` gets the
    weights and image codes behind them."""
    model, tokenizer, batch = start(options)
    model.eval()
    shake(model)
    pin_choices()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.mask = lambda ids, *args, **kwargs: (batch["mlm_ids"], batch["mlm_labels"])
    given = arguments(batch, tokenizer)
    saved = {"model": state, "visual_codes": given.get("visual_token_ids")}
    torch.save(saved, Path(options.exchange) / "peer.pt")
    with torch.no_grad():
        values = model(**given)
    dist.destroy_process_group()
    return {"losses": {name: value.item() for name, value in zip(LOSSES, values, strict=False)}}
