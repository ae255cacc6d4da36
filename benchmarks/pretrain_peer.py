"""The original's side of benchmarks/pretrain.py: one training step of the model in a checkout of
SIMLA or ALBEF.

    python -m benchmarks.pretrain_peer '{"peer": "PATH", "system": "simla", ...}'      # started by benchmarks.pretrain

The checkout's numeric code runs as it is. Around it, what it needs to start today: random weights
instead of downloads, a process group of one, and, unless an interpreter with its own old libraries
is given (--peer-python), stand-ins for the few names it takes from transformers and timm. Prints
one line of JSON.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import (
    ALPHA,
    CLS,
    MASK,
    QUEUE_SIZE,
    VOCABULARY,
    about,
    chosen_device,
    measure,
    pin_choices,
    shake,
    synthetic_batch,
)

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


class Missing(types.ModuleType):
    """A library that is imported but never used in a step: any name of it is there, none does
    anything."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def stand_in(name: str, **names) -> None:
    """Register a module (and its parents) that holds `names`."""
    parent, _, leaf = name.rpartition(".")
    module = sys.modules.setdefault(name, Missing(name))
    module.__dict__.update(names)
    if parent:
        stand_in(parent)
        setattr(sys.modules[parent], leaf, module)


class Outputs:
    """Named results; `outputs[i]` counts those that are not None."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getitem__(self, index):
        return [value for value in self.__dict__.values() if value is not None][index]


class Config:
    """BERT configuration: the JSON file's fields over the library's defaults."""

    def __init__(self, **fields):
        off = (
            "use_cache",
            "output_attentions",
            "output_hidden_states",
            "is_decoder",
            "add_cross_attention",
        )
        self.__dict__.update(
            dict.fromkeys((*off, "gradient_checkpointing", "chunk_size_feed_forward"), False)
        )
        self.__dict__.update(
            {"use_return_dict": True, "position_embedding_type": "absolute", **fields}
        )

    @classmethod
    def from_json_file(cls, path: str) -> "Config":
        return cls(**json.loads(Path(path).read_text()))


class Pretrained(nn.Module):
    """What the originals use of transformers' base class: initialisation, tied output weights,
    additive masks."""

    def __init__(self, config: Config, *args, **kwargs):
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def init_weights(self) -> None:
        self.apply(self._init_weights)
        head = getattr(self, "get_output_embeddings", lambda: None)()
        if head is not None:
            head.weight = self.bert.get_input_embeddings().weight

    def invert_attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self, head_mask, layers: int):
        return [None] * layers


class Patches(nn.Module):
    """timm's patch embedding: a strided convolution, then [B,N,D]."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


def no_documentation(*args, **kwargs):
    """Stands for the library's documentation decorators, part of which were removed."""
    return lambda function: function


def replace_libraries() -> None:
    """Register stand-ins for transformers and timm."""
    decorators = ("code_sample_docstrings", "start_docstrings", "start_docstrings_to_model_forward")
    decorators = {f"add_{name}": no_documentation for name in decorators}
    decorators["replace_return_docstrings"] = no_documentation
    results = (
        "BaseModelOutputWithPastAndCrossAttentions",
        "BaseModelOutputWithPoolingAndCrossAttentions",
    )
    results += ("CausalLMOutputWithCrossAttentions", "MaskedLMOutput")
    logging = types.SimpleNamespace(get_logger=lambda name: None, set_verbosity_error=lambda: None)
    no_chunks = lambda function, chunk, dim, *tensors: function(*tensors)  # noqa: E731
    stand_in("transformers.activations", ACT2FN={"gelu": nn.functional.gelu})
    stand_in("transformers.file_utils", ModelOutput=Outputs, **decorators)
    stand_in("transformers.modeling_outputs", **dict.fromkeys(results, Outputs))
    stand_in(
        "transformers.modeling_utils",
        PreTrainedModel=Pretrained,
        apply_chunking_to_forward=no_chunks,
    )
    stand_in("transformers.utils", logging=logging)
    stand_in("transformers", logging=logging)
    stand_in("transformers.models.bert.configuration_bert", BertConfig=Config)
    stand_in("timm.models.vision_transformer", PatchEmbed=Patches)
    stand_in("timm.models.registry", register_model=lambda function: function)
    stand_in("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, DropPath=nn.Identity)


def keep_old_names() -> None:
    """Put back what newer versions of installed libraries no longer offer."""
    importlib.import_module("torch.optim.optimizer").required = object()
    if "transformers" not in sys.modules:
        import transformers.file_utils

        transformers.file_utils.add_code_sample_docstrings = no_documentation
    for name in (
        "einops",
        "requests",
    ):  # imported beside the image tokenizer, not used by its encoder
        try:
            importlib.import_module(name)
        except ImportError:
            stand_in(name)


def build_model(options: dict) -> nn.Module:
    """The checkout's pre-training model with random weights, on the CPU, in training mode."""
    root, simla = Path(options["peer"]), options["system"] == "simla"
    sys.path.insert(0, str(root))
    source = importlib.import_module("models.simla.pretrain" if simla else "models.model_pretrain")
    source.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config: cls(config))
    bert = root / "configs" / ("shared_bert.json" if simla else "config_bert.json")
    words = types.SimpleNamespace(
        pad_token_id=0, cls_token_id=CLS, mask_token_id=MASK, vocab_size=VOCABULARY
    )
    config = {**CONFIG, "bert_config": str(bert)}
    if simla:
        return source.SIMLA(text_encoder="bert-base-uncased", tokenizer=words, config=config)
    return source.ALBEF(
        text_encoder="bert-base-uncased", tokenizer=words, config=config, init_deit=False
    )


def build_tokenizer(device: torch.device) -> nn.Module:
    """The checkout's image tokenizer with DALL-E's full-size encoder, random weights."""
    try:
        vae = importlib.import_module("models.discrete_vae").Dalle_VAE(CONFIG["image_res"])
        vae.encoder = importlib.import_module("dall_e.encoder").Encoder(device=device)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the original's image tokenizer needs {error.name}: pip install {error.name}s"
        ) from None
    return vae


def arguments(batch: dict, tokenizer: nn.Module | None) -> tuple[tuple, dict]:
    """What the original's forward takes, made from our batch as its training loop makes it."""
    text = types.SimpleNamespace(
        input_ids=batch["text_ids"], attention_mask=batch["text_mask"].long()
    )
    if tokenizer is None:
        return (batch["image"], text), {"alpha": ALPHA}
    with torch.no_grad():
        codes, mask = (
            tokenizer.get_codebook_indices(batch["token_image"]).flatten(1),
            batch["patch_mask"],
        )
    visual = {
        "visual_token_ids": codes,
        "masked_visual_token_pos": mask,
        "masked_visual_tok_labels": codes[mask],
    }
    return (batch["image"], text), {**visual, "alpha": ALPHA}


def named_losses(losses: tuple) -> dict[str, float]:
    names = (
        "loss_mlm",
        "loss_ita",
        "loss_itm",
        "loss_mim",
        "loss_pseudo",
    )  # the order both originals return them in
    return {name: loss.item() for name, loss in zip(names, losses, strict=False)}


def check(
    model: nn.Module, tokenizer: nn.Module | None, batch: dict, folder: Path
) -> dict[str, float]:
    """Losses without dropout and with pinned choices; the weights and codes behind them are left in
    `folder`."""
    model.eval()
    shake(model)
    pin_choices()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.mask = lambda ids, *args, **kwargs: (batch["mlm_ids"], batch["mlm_labels"])
    inputs, options = arguments(batch, tokenizer)
    torch.save(
        {"model": state, "visual_codes": options.get("visual_token_ids")}, folder / "peer.pt"
    )
    with torch.no_grad():
        return named_losses(model(*inputs, **options))


def main() -> None:
    options = json.loads(sys.argv[1])
    device = chosen_device(options["device"])
    tf32 = options["peer_precision"] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.manual_seed(0)
    if options["stand_ins"]:
        replace_libraries()
    keep_old_names()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    model = build_model(options).to(device).train()
    tokenizer = build_tokenizer(device) if options["system"] == "simla" else None
    batch = {name: value.to(device) for name, value in synthetic_batch(options["batch"]).items()}
    if options.get("check"):
        print(
            json.dumps(
                {"losses": check(model, tokenizer, batch, Path(options["check"]))} | about(device)
            )
        )
        return
    settings = types.SimpleNamespace(opt="adamW", lr=1e-4, weight_decay=0.02)
    optimizer = importlib.import_module("optim").create_optimizer(settings, model)
    gradient_norm = getattr(
        importlib.import_module("utils"), "calculate_gradient_norm", lambda model: None
    )
    losses: dict[str, float] = {}

    def step() -> None:
        optimizer.zero_grad()
        inputs, keywords = arguments(batch, tokenizer)
        parts = model(*inputs, **keywords)
        sum(parts).backward()
        gradient_norm(model)  # SIMLA's loop computes it each step, ALBEF's does not
        optimizer.step()
        losses.update(named_losses(parts))  # both loops read every loss each step

    result = measure(step, device, options["warmup"], options["steps"])
    print(json.dumps({**result, "losses": losses} | about(device)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
