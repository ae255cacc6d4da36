"""What a step of each training script needs beside its recipe: a model without files, a batch without data.

Every function takes the script's module and its parsed configuration, calls the script's own
`build_model` and returns a Setup, whose `step` calls the script's own `train_step`. Files that a
recipe names are not read: vocabularies, classes and lengths of texts are assumed, and said.
"""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from base.distributed import unwrap
from base.errors import UserError
from base.libraries import of_library

ROOT = Path(__file__).resolve().parents[2]
BERT_TOKENS, CLIP_TOKENS, LLAMA_TOKENS = 30522, 49408, 32003


class BertVocabulary:
    """What models ask of a WordPiece tokenizer: bert-base-uncased's numbers."""

    vocab_size = BERT_TOKENS
    special_ids = (0, 100, 101, 102, 103)
    pad_id = 0
    cls_id = 101
    sep_id = 102
    mask_id = 103


class LlamaVocabulary:
    """What NXTP asks of LLaMA's tokenizer: its size and the id of <|image|>."""

    vocab_size, image = LLAMA_TOKENS, 32000


@dataclass
class Setup:
    """A step of a script, before its model is wrapped.

    model: on fake CPU tensors. frozen: other networks on the card. step(model, optimizer,
    precision): one update, whose losses it returns. decayed: names for build_optimizer. assumed: sentences.
    """

    model: nn.Module
    batch_size: int
    step: Callable[..., dict[str, Tensor]]
    image_bytes: int  # of one sample's images as they cross the bus
    frozen: list[nn.Module] = field(default_factory=list)
    decayed: list[str] | None = None
    assumed: list[str] = field(default_factory=list)


def ids(*shape: int) -> Tensor:
    """Tokens."""
    return torch.zeros(*shape, dtype=torch.int64)


def numbers(*shape: int) -> Tensor:
    """Labels, positions in a batch or a table, numbers of images: below any count of these."""
    return torch.zeros(*shape, dtype=torch.int64)


def flags(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def pixels(*shape: int) -> Tensor:
    """Images as loaders give them: uint8, normalised on the device."""
    return torch.zeros(*shape, dtype=torch.uint8)


# names of one thing in different scripts
SAME = {"student": "model", "pixels": "statistics"}


def call(function: Callable, **available):
    """`function` with those of the arguments that it names."""
    wanted = inspect.signature(function).parameters
    return function(**{name: available[SAME.get(name, name)] for name in wanted})


def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of pixels, made on the device: a copy would make the host wait."""
    return torch.zeros(3, 1, 1, device=device), torch.ones(3, 1, 1, device=device)


def as_step_wants(script: ModuleType, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """uint8 images as they are where the step normalises them itself, else normalised."""
    from dataset.images.clip import normalize

    if {"pixels", "statistics"} & set(inspect.signature(script.train_step).parameters):
        return batch
    normal = {
        n: normalize(x, statistics(x.device)) for n, x in batch.items() if n.startswith("image")
    }
    return {**batch, **normal}


def pretrain(script: ModuleType, config) -> Setup:
    """Pretrain.py: pairs of config.max_tokens tokens, 15 % of them masked."""
    from models.fusion.dvae import ImageTokenizer, TokenizerConfig
    from models.fusion.momentum import MomentumPairs

    config.bert_config = ROOT / config.bert_config
    config.text_weights = config.vision_weights = config.checkpoint = None
    codes = None
    if config.is_simla:
        codes = ImageTokenizer(TokenizerConfig(), with_decoder=False).freeze(config.precision)
    with mock.patch.object(script, "start_vision"):  # which would read the tower's weights
        model = call(
            script.build_model, config=config, tokenizer=BertVocabulary, image_tokenizer=codes
        )
    size = config.batch_size
    length = config.max_tokens
    grid = config.grid
    masked = -(-int(config.mlm_probability * size * length) // 32) * 32
    side = 0 if codes is None or config.code_cache else grid * codes.reduction

    def batch() -> dict[str, Tensor]:
        tensors = {
            "image": pixels(size, 3, config.image_res, config.image_res),
            "text_ids": ids(size, length),
            "text_mask": flags(size, length),
            "mlm_ids": ids(size, length),
            "mlm_positions": numbers(masked),
            "mlm_labels": ids(masked),
        }
        if codes is not None:
            tensors["patch_mask"] = flags(size, grid * grid)
            if side:
                tensors["token_image"] = pixels(size, 3, side, side)
            else:
                tensors["visual_codes"] = numbers(size, grid * grid)
        return tensors

    def step(model, optimizer, precision) -> dict[str, Tensor]:
        teacher = step.teacher = step.teacher or MomentumPairs(model, config.momentum)
        return train(
            script, config, model, optimizer, precision, batch, teacher, image_tokenizer=codes
        )

    step.teacher = None
    assumed = [f"BERT's {BERT_TOKENS:,} tokens, texts of {length} tokens"]
    if codes is not None:
        assumed.append("DALL-E's image tokenizer")
    image_bytes = 3 * (config.image_res**2 + side**2)
    return Setup(model, size, step, image_bytes, [codes] if codes else [], None, assumed)


def train(
    script, config, model, optimizer, precision, batch, teacher=None, after=None, **more
) -> dict[str, Tensor]:
    """One turn of the loop that every script writes out, without its log and checkpoints.

    Returns the losses and `grad_norm`, 0-d each.
    """
    from runtime.optim.build import set_learning_rate
    from runtime.parallel import to_device

    def next_batch() -> dict[str, Tensor]:
        return to_device(batch(), precision.device)

    set_learning_rate(optimizer, 1e-5)
    parameters = [p for p in unwrap(model).parameters() if p.requires_grad]
    cached = getattr(config, "cache_features", False) and hasattr(script, "train_step_cached")
    losses = call(
        script.train_step_cached if cached else script.train_step,
        model=model,
        teacher=teacher,
        next_batch=next_batch,
        alpha=0.2,
        statistics=statistics(precision.device),
        config=config,
        precision=precision,
        **more,
    )
    grad_norm = precision.step(optimizer, parameters)
    if after is not None:
        after()
    return {**losses, "grad_norm": grad_norm}


def finetune(script: ModuleType, config, extra: Callable[[int], dict] = lambda size: {}) -> Setup:
    """The tasks of fusion encoders: images with texts of 24 tokens, and `extra` tensors."""
    from models.fusion.momentum import MomentumPairs
    from runtime.config.networks import fill_geometry

    has_checkpoint = config.checkpoint is not None
    config.checkpoint = None
    fill_geometry(config, weights=())
    config.bert_config = ROOT / config.bert_config
    model = call(
        getattr(script, "build_model", None) or script.network,
        config=config,
        tokenizer=BertVocabulary,
        weights={},
        answers=[],
    )
    size = config.batch_size_train
    side = config.image_res
    length = 24
    two = script.__name__ == "NLVR" and config.stage != "text_assignment"
    shape = (size, 2, 3, side, side) if two else (size, 3, side, side)

    def batch() -> dict[str, Tensor]:
        texts = {"text_ids": ids(size, length), "text_mask": flags(size, length)}
        return {"image": pixels(*shape), **texts, **extra(size)}

    has_teacher = any("_m." in name for name, _ in model.named_parameters())

    def step(model, optimizer, precision) -> dict[str, Tensor]:
        if has_teacher and step.teacher is None:
            step.teacher = MomentumPairs(model, config.momentum)
        return train(script, config, model, optimizer, precision, batch, step.teacher)

    step.teacher = None
    assumed = [f"BERT's {BERT_TOKENS:,} tokens, texts of {length} tokens"]
    if has_checkpoint:
        assumed.append("networks of the sizes in the recipe, not of its checkpoint")
    return Setup(model, size, step, 3 * side**2 * (1 + two), assumed=assumed)


def retrieval(script: ModuleType, config) -> Setup:
    """Retrieval.py and Grounding.py: the number of each caption's image beside it."""
    return finetune(script, config, lambda size: {"image_id": numbers(size)})


def vqa(script: ModuleType, config) -> Setup:
    """VQA.py: six answers of 8 tokens to a question, as in VQA v2."""

    def answers(size: int) -> dict[str, Tensor]:
        n = -(-6 * size // 16) * 16
        tokens = {"answer_ids": ids(n, 8), "answer_mask": flags(n, 8)}
        return {**tokens, "answer_weight": torch.ones(n), "answer_question": numbers(n)}

    setup = finetune(script, config, answers)
    setup.assumed.append("6 answers of 8 tokens a question")
    return setup


def labelled(script: ModuleType, config) -> Setup:
    """VE.py and NLVR.py."""
    if getattr(config, "stage", "") == "text_assignment":
        return finetune(script, config)
    return finetune(script, config, lambda size: {"label": numbers(size)})


def dual(script: ModuleType, config) -> Setup:
    """main.py: texts of 32 tokens at most, weak and strong views as the recipe says."""
    from models.dual_encoder.base import names_by_decay
    from models.dual_encoder.factory import with_library_sizes
    from scripts.planning.towers import sized_text_tower, without_weights

    config.checkpoint = None
    config.init_text_encoder = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_weights(script))
        if config.network.text_tower:
            config.network, vocabulary = stack.enter_context(sized_text_tower(config.network))
        elif of_library(config.network.model):
            config.network = with_library_sizes(config.network)
            vocabulary = f"{config.network.vocab_size:,} tokens"
        else:
            align = config.network.model.startswith("ALIGN")
            tokens = BERT_TOKENS if align else CLIP_TOKENS
            config.network = replace(config.network, vocab_size=tokens)
            vocabulary = f"{tokens:,} tokens"
        model = script.build_model(config).train()
    size, side = config.batch_size, config.network.image_size
    usual = min([n for n in config.text_lengths if n >= 32], default=32)
    length = min(usual, config.network.context_length)
    if of_library(config.network.model):  # its texts are padded to the whole context
        length = config.network.context_length
    local_images, local_texts = config.local_views

    def batch() -> dict[str, Tensor]:
        texts = ids(size, 1 + local_texts, length)
        tensors = {"image": pixels(size, 3, side, side), "text_ids": texts}
        if local_images:
            tensors["image_local"] = pixels(size, local_images, 3, side, side)
        return as_step_wants(script, tensors)

    def step(model, optimizer, precision) -> dict[str, Tensor]:
        network = unwrap(model)
        if config.momentum and step.teacher is None:
            step.teacher = script.WeightAverage([(network.momentum_model, network)])

        def after() -> None:
            if step.teacher is not None:
                step.teacher.update(config.momentum_tau)
            network.after_update()

        return train(script, config, model, optimizer, precision, batch, None, after)

    step.teacher = None
    assumed = [f"{vocabulary}, texts of {length} tokens"]
    decayed = names_by_decay(model, config.network.original)[0]
    return Setup(model, size, step, 3 * side**2 * (1 + local_images), [], decayed, assumed)


def classification(script: ModuleType, config) -> Setup:
    """Classification.py: two labels an image."""
    config.checkpoint = None
    model = script.build_model(config).train()
    size, side = config.batch_size, config.network.image_size

    def batch() -> dict[str, Tensor]:
        image = pixels(size, 3, side, side)
        labels = numbers(size, 2)
        batch = {"image": image, "labels": labels, "label_weights": torch.ones(size, 2)}
        return as_step_wants(script, batch)

    def step(model, optimizer, precision) -> dict[str, Tensor]:
        network = unwrap(model)
        if config.ema_decay and step.average is None:
            pairs = [(network.ema, network)]
            step.average = script.WeightAverage(pairs, average_buffers=True)

        def after() -> None:
            if step.average is not None:
                step.average.update(script.ema_decay(5, config.ema_decay, config.ema_start))

        return train(script, config, model, optimizer, precision, batch, None, after)

    step.average = None
    names = [name for name, _ in model.named_parameters()]
    decayed = names if config.network.original else None
    classes = f"{config.network.num_classes:,} classes"
    return Setup(model, size, step, 3 * side**2, [], decayed, [classes])


def recognition(script: ModuleType, config) -> Setup:
    """Recognition.py: random networks of CLIP ViT-L/14's and LLaMA-7B's sizes; texts of 96 tokens."""
    from models.weights.nxtp import decayed_names, trained_names

    config.clip = config.llama = config.checkpoint = None
    model = config.network.build(LlamaVocabulary)
    names = [name for name, _ in model.named_parameters()]
    trained = trained_names(names, config.train_vision_blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    decayed = None
    if config.compat == "original":
        decayed = decayed_names({n: p for n, p in model.named_parameters() if n in trained})
    size = config.batch_size
    side = config.network.image_size
    length = 96
    targets = -(-30 * size // 32) * 32

    def texts(prefix: str) -> dict[str, Tensor]:
        tokens = {"text_ids": ids(size, length), "segments": numbers(size, length)}
        wanted = {"positions": numbers(targets), "labels": ids(targets)}
        return {prefix + name: value for name, value in {**tokens, **wanted}.items()}

    def batch() -> dict[str, Tensor]:
        batch = {"image": pixels(size, 3, side, side), **texts("")}
        if config.caption_weight:
            batch.update(texts("caption_"))
        return as_step_wants(script, batch)

    def step(model, optimizer, precision) -> dict[str, Tensor]:
        return train(script, config, model, optimizer, precision, batch)

    assumed = [
        f"LLaMA's {LLAMA_TOKENS:,} tokens, texts of {length} tokens, 30 targets an image",
        "CLIP ViT-L/14 and LLaMA-7B where the recipe names their files",
    ]
    return Setup(model, size, step, 3 * side**2, [], decayed, assumed)


SETUPS: dict[str, Callable[[ModuleType, object], Setup]] = {
    "Pretrain": pretrain,
    "Retrieval": retrieval,
    "Grounding": retrieval,
    "VQA": vqa,
    "VE": labelled,
    "NLVR": labelled,
    "main": dual,
    "Classification": classification,
    "Recognition": recognition,
}


def check_trains(script: ModuleType) -> None:
    """Raise UserError for a script without a training step."""
    if script.__name__ not in SETUPS:
        known = ", ".join(f"{name}.py" for name in SETUPS)
        raise UserError(f"{script.__name__}.py does not train; plan.py knows {known}")


def setup_of(script: ModuleType, config) -> Setup:
    """The step of a script; call it inside `simulated_gpu()`."""
    return SETUPS[script.__name__](script, config)
