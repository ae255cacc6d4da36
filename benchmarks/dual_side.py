"""One measurement of benchmarks.dual: a training step by `library` ours, open_clip or rocket.

Called by benchmarks.dual with its settings as JSON; prints the result as JSON.
"""

import importlib
import json
import math
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import about, chosen_device, measure
from runtime.log import training_flops
from runtime.optim.build import Precision

CONTEXT, END, LOCAL_VIEWS = 77, 49407, 2


def captions(size: int, views: int, longest: int) -> Tensor:
    """Random token ids int64 [size,views,77] of captions of 8 to `longest` tokens; the first has
    all of them."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, END - 1, (size, views, CONTEXT), generator=rng)
    lengths = torch.randint(8, longest + 1, (size, views, 1), generator=rng)
    lengths[0, 0] = longest
    places = torch.arange(CONTEXT)
    return torch.where(places < lengths - 1, ids, torch.where(places == lengths - 1, END, 0))


def ours(options: dict, batch: dict) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Our network and its loss; texts are cut behind the longest caption, as main.py's loader
    does."""
    from main import total_loss
    from models.dual_encoder.base import DualConfig
    from models.dual_encoder.factory import build_dual
    from runtime.parallel import checkpoint_blocks

    if options["peer"]:
        config = DualConfig(
            model="CL2L_VITB16_CL2L", embed_dim=512, separate_proj=True, loss_avg_or_sum="sum"
        )
    else:
        config = DualConfig(model="CLIP_VITB16_CLIP", embed_dim=512)
    model = build_dual(config).train()
    length = min(CONTEXT, 8 * math.ceil(options["tokens"] / 8))
    given = dict(batch, text_ids=batch["text_ids"][..., :length].contiguous())
    options["flops"] = training_flops(model, given)
    model.to(batch["image"].device)
    if options["activation_checkpointing"]:
        checkpoint_blocks(model)
    network = torch.compile(model) if options["compile"] else model

    def loss() -> Tensor:
        return total_loss(network(**given), config)

    return model, loss


def open_clip(options: dict, batch: dict) -> tuple[nn.Module, Callable[[], Tensor]]:
    """open_clip's ViT-B-16 and its ClipLoss."""
    import open_clip as library

    model = library.create_model("ViT-B-16").to(batch["image"].device)
    criterion = library.ClipLoss()
    network = torch.compile(model) if options["compile"] else model

    def loss() -> Tensor:
        image, text, scale, *_ = network(batch["image"], batch["text_ids"])
        return criterion(image, text, scale)

    return model, loss


def rocket(options: dict, batch: dict) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The checkout's CL2L_VITB16_CL2L and its loss."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    operations = types.ModuleType("xformers.ops")
    operations.memory_efficient_attention, operations.unbind = attention, torch.unbind
    sys.modules |= {"xformers": types.ModuleType("xformers"), "xformers.ops": operations}
    # the checkout's own modules of these names, not ours
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]
    sys.path.insert(0, options["peer"])
    importlib.import_module("timm.models.registry")
    vit = importlib.import_module("vit")

    def transformer(variant: str, pretrained: bool = False, attn_layer=None, **more) -> nn.Module:
        """Its VisionTransformer without the library's look-up of weights to download."""
        return vit.VisionTransformer(
            attn_layer=vit.MemEffAttention if attn_layer == "flash" else vit.Attention, **more
        )

    vit._create_vision_transformer = transformer
    source = importlib.import_module("models")
    shape = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "num_classes": 0}
    source.timm.create_model = lambda name, num_classes, attn_layer: transformer(
        name, attn_layer=attn_layer, **shape
    )
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(batch["image"].device)
    settings = {
        "embed_dim": 512,
        "transformer_layers": 12,
        "separate_proj": True,
        "detach_proj": False,
    }
    settings |= {"text_dropout_prob": 0.0, "text_drop_path_prob": 0.0, "clip_proj_type": "linear"}
    settings |= {"clip_hidden_dim": 4096, "label_smoothing": 0.0}
    model = source.CL2L_VITB16(source.CL2L, options["peer_attention"], **settings).to(
        batch["image"].device
    )
    criterion = importlib.import_module("losses").CL2LLoss("sum", 0.0)
    network = torch.compile(model) if options["compile"] else model

    def loss() -> Tensor:
        return criterion(
            network(batch["image"], batch["text_ids"], *batch["image_local"].unbind(1))
        )["loss"]

    return model, loss


def main(options: dict) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(options["threads"])
    device, size, views = (
        chosen_device(options["device"]),
        options["batch"],
        LOCAL_VIEWS if options["peer"] else 0,
    )
    texts = captions(size, 1 + views, options["tokens"]).to(device)
    batch = {
        "image": torch.randn(size, 3, 224, 224, device=device),
        "text_ids": texts if views else texts[:, 0],
    }
    if views:
        batch["image_local"] = torch.randn(size, views, 3, 224, 224, device=device)
    model, loss = {"ours": ours, "open_clip": open_clip, "rocket": rocket}[options["library"]](
        options, batch
    )
    model.train()
    library_default = options["library"] == "rocket"  # its optimizer is built without `fused`
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, weight_decay=0.1, fused=None if library_default else True
    )
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options["precision"])
    scaler = torch.amp.GradScaler(device.type, enabled=options["precision"] == "fp16")

    def step() -> None:
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    result = measure(step, device, options["warmup"], options["steps"]) | about(device)
    if options["library"] == "ours":
        from benchmarks.pretrain_ours import utilisation

        result["mfu"] = utilisation(
            options["flops"], result, device, Precision(options["precision"], device)
        )
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
