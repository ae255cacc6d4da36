"""The original's side of benchmarks.recognition: NXTP's functions and networks out of a checkout.
Modules that it imports for other purposes are empty, `clip` has the two layers that it uses."""

import importlib
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import recognition as bench
from benchmarks.child import measure
from benchmarks.inputs import leave
from benchmarks.peers.stand_ins import open_checkout, stand_in
from benchmarks.steps import training_step


class LayerNorm(nn.LayerNorm):
    """In float32, back in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def start(options: types.SimpleNamespace) -> tuple:
    """Its network with weights that both sides share, its module `encoding` and its settings."""
    torch.manual_seed(0)
    source = Path(options.peer) / "src"
    open_checkout(source)
    stand_in("clip", model=types.SimpleNamespace(LayerNorm=LayerNorm, QuickGELU=QuickGELU))
    stand_in("utils", get_noun_words=lambda text, **_: ",".join(bench.labels_of(text)))
    for folder in ("models", "evals"):  # without __init__.py: ours would come first
        stand_in(folder, __path__=[str(source / folder)])
    for unused in ("train", "loader", "evals.engine"):
        stand_in(unused)
    encoding = importlib.import_module("encoding")
    encoding.shuffle = lambda labels: None  # its order of labels is not seeded
    settings = stand_in(
        "settings",
        anything=0,  # all others are off
        max_seq_len=bench.LENGTH,
        special_tokens=["<|image|>"],
        rm_eos_token_for_objs=True,
        label_contains_number=True,
        prefix_image_tok_embeds=True,
        decouple_label_tok_embeds=True,
        text_decoder_strategy="one_shot",
        max_gen_len=64,
        k_for_topk=options.labels,
        device=options.device,
    )
    lang = importlib.import_module("models.lang")
    width, blocks, decoder = bench.sizes_of(options)
    dim = decoder["dim"]
    tower = importlib.import_module("models.clip").CLIPViT
    encoder = tower(bench.SIDE, bench.PATCH, width, blocks, width // 64, dim)
    del encoder.proj
    encoder.proj = nn.Linear(width, dim, bias=False)
    decoder |= {"vocab_size": bench.Words.vocab_size, "max_seq_len": bench.LENGTH}
    arguments = lang.ModelArgs(**decoder)
    arguments.shave_language_decoder_at = 0
    language = lang.LLaMATransformer(arguments)
    with torch.no_grad():  # the head of a trained network is sharper than torch's default
        language.output.weight.mul_(8)
    model = importlib.import_module("models.classifier").LangClassifier(encoder, language)
    leave(options, model.state_dict())
    return model.to(options.device), encoding, settings


def label(options: types.SimpleNamespace) -> dict:
    """Top labels of images as its evaluation finds them; ids, as ours, no texts."""
    model, _, settings = start(options)
    model.eval()
    words = bench.Words()
    images = bench.images(options.images).to(options.device)
    evaluation = importlib.import_module("evals.eval")
    begin = len(words.encode(f"<|image|>{bench.PROMPT}", bos=True))
    rows = []

    class Decoder(evaluation.OneShotDecoder):
        def __init__(self, k: int):
            super().__init__(k, max_update_iter=bench.LABEL_TOKENS + 1)

        def finalize(self, tokens, *rest, **more):  # it loses track of unfinished rows
            rows[:] = tokens[:, begin : begin + bench.LABEL_TOKENS].tolist()
            return super().finalize(tokens, *rest, **more)

    evaluation.OneShotDecoder = Decoder
    evaluation.post_process = lambda *args, **more: None

    def step() -> None:
        evaluation.engine_lang_classifier(settings, None, model, words, images)

    result = measure(step, options)
    # up to the first delimiter, included
    tokens = [row[: (row + [bench.COMMA]).index(bench.COMMA) + 1] for row in rows]
    by_image = [tokens[i : i + options.labels] for i in range(0, len(rows), options.labels)]
    return {**result, "tokens": by_image}


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits[:, :-1].reshape(-1, logits.shape[-1])
    target = target[:, 1:].reshape(-1).to(logits.device)
    return F.cross_entropy(logits, target, ignore_index=-1)


def train(options: types.SimpleNamespace) -> dict:
    """A step of both branches as its training loop computes them, under our loop and optimizer."""
    model, encoding, settings = start(options)
    words, captions = bench.Words(), bench.captions(options.batch)
    bench.freeze(model)
    table = model.language_decoder.tok_embeddings.weight
    trained_row = torch.zeros_like(table)
    trained_row[bench.IMAGE] = 1
    table.register_hook(lambda grad: grad.mul_(trained_row))
    decode = model.language_decoder.forward

    def loss_of(image: Tensor) -> Tensor:
        tokens = model.decode_images(model.encode_images(image))[:, 1:]
        count = tokens.shape[1]
        texts = encoding.construct_text_inputs(settings, captions, words, offset=count)
        ids = [part.to(image.device) for part in texts[:2]]
        embedded = [table[part] for part in ids]
        caption, labels, seen = encoding.construct_embd_inputs(
            tokens, *embedded, *texts[4:], *ids, words
        )
        shared = {"dummy_token_index": 0, "offset": count, "prefix_image_tok_embeds": True}
        caption_loss = next_token_loss(decode(caption, **shared), texts[2])
        logits = decode(
            labels, input_tokens=seen, decouple_label_tok_embeds=True, is_train=True, **shared
        )
        return caption_loss * 0.0 + next_token_loss(logits, texts[3])

    model.forward = loss_of
    options.compile = options.activation_checkpointing = False  # are ours
    batch = {"image": bench.images(options.batch)}
    return training_step(model, batch, lambda loss: loss, bench.ADAMW, options)
