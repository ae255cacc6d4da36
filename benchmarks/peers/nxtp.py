"""The original's side of benchmarks.recognition: NXTP's functions and networks out of a checkout.

Its numeric code runs unchanged; modules that it imports for other purposes are replaced by empty
ones, `clip` by the two layers it uses.
"""

import importlib
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import recognition as bench
from benchmarks.child import measure
from benchmarks.inputs import PEER_FILE, leave, left
from benchmarks.peers.stand_ins import open_checkout, stand_in
from runtime.optim.build import PRECISIONS


class LayerNorm(nn.LayerNorm):
    """In float32, back in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def start(options: types.SimpleNamespace) -> types.SimpleNamespace:
    """Its modules without those that neither case uses, its settings, and its network with weights
    that both sides share."""
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
    settings = types.SimpleNamespace(
        max_seq_len=bench.LENGTH,
        special_tokens=["<|image|>"],
        enable_prompt_augmentation=False,
        rm_eos_token_for_objs=True,
        label_contains_number=True,
        prefix_image_tok_embeds=True,
        decouple_label_tok_embeds=True,
        text_decoder_strategy="one_shot",
        max_gen_len=64,
        k_for_topk=options.labels,
    )
    lang = importlib.import_module("models.lang")
    width, blocks, decoder = bench.sizes_of(options)
    dim = decoder["dim"]
    tower = importlib.import_module("models.clip").CLIPViT
    encoder = tower(bench.SIDE, bench.PATCH, width, blocks, width // 64, dim)
    del encoder.proj
    encoder.proj = nn.Linear(width, dim, bias=False)
    lengths = {"vocab_size": bench.Words.vocab_size, "max_seq_len": bench.LENGTH}
    arguments = lang.ModelArgs(**decoder, **lengths)
    arguments.shave_language_decoder_at = 0
    classifier = importlib.import_module("models.classifier").LangClassifier
    model = classifier(vision_encoder=encoder, language_decoder=lang.LLaMATransformer(arguments))
    with torch.no_grad():  # the head of a trained network is sharper than torch's default
        model.language_decoder.output.weight.mul_(8)
    if left(options, PEER_FILE) is None:
        leave(options, PEER_FILE, model.state_dict())
    model.load_state_dict(left(options, PEER_FILE))
    return types.SimpleNamespace(
        encoding=encoding,
        decoding=importlib.import_module("decoding"),
        evaluation=importlib.import_module("evals.eval"),
        settings=settings,
        model=model.to(options.device),
    )


def encode(original, images: Tensor, captions: list[str], training: bool) -> tuple:
    """Number of image tokens; texts, token ids and embeddings as its functions return them."""
    tokens = original.model.decode_images(original.model.encode_images(images))[:, 1:]
    words = bench.Words()
    texts = original.encoding.construct_text_inputs(
        original.settings, captions, words, offset=tokens.shape[1], is_train=training
    )
    ids = [part.to(images.device) for part in texts[:2]]
    table = original.model.language_decoder.tok_embeddings.weight
    embedded = original.encoding.construct_embd_inputs(
        tokens, table[ids[0]], table[ids[1]], texts[4], texts[5], ids[0], ids[1], words
    )
    return tokens.shape[1], texts, ids, embedded


def label(options: types.SimpleNamespace) -> dict:
    """Top labels of images as its evaluation finds them."""
    original = start(options)
    model = original.model.eval()
    images = bench.images(options.images).to(options.device)
    found = []

    @torch.inference_mode()
    def step() -> None:
        count, texts, ids, embedded = encode(original, images, [""] * len(images), False)
        limit = bench.LABEL_TOKENS + 1
        decoder = original.decoding.OneShotDecoder(k=options.labels, max_update_iter=limit)
        decoder.reset()
        finish = decoder.finalize
        rows = []

        def finalize(tokens, *rest, **more):  # it loses track of unfinished rows: take them now
            rows.append(tokens)
            return finish(tokens, *rest, **more)

        decoder.finalize = finalize
        prompt = [texts[5], ids[1], embedded[1], embedded[2], bench.Words()]
        original.evaluation.generate(
            original.settings, count, *prompt, model, images.device, decoder
        )
        begin = int((ids[1][0] >= 0).sum())  # the prompt's length
        tokens = rows[0][:, begin : begin + bench.LABEL_TOKENS].unflatten(0, (len(images), -1))
        found[:] = [[first_label(row) for row in image] for image in tokens.tolist()]

    return {**measure(step, options), "tokens": found}


def first_label(row: list[int]) -> list[int]:
    """Up to the first delimiter, included."""
    return row[: row.index(bench.COMMA) + 1] if bench.COMMA in row else row


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits[:, :-1].reshape(-1, logits.shape[-1])
    target = target[:, 1:].reshape(-1).to(logits.device)
    return F.cross_entropy(logits, target, ignore_index=-1)


def train(options: types.SimpleNamespace) -> dict:
    """A step as its training loop takes it, with both branches; `loss` is the first one's."""
    original = start(options)
    model = original.model.train()
    images = bench.images(options.batch).to(options.device)
    captions = bench.captions(options.batch)
    bench.freeze(model)
    table = model.language_decoder.tok_embeddings.weight
    trained_row = torch.zeros_like(table)
    trained_row[bench.IMAGE] = 1
    table.register_hook(lambda grad: grad.mul_(trained_row))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
    )
    decode = model.language_decoder.forward
    dtype = PRECISIONS[options.precision]
    losses = []

    def step() -> None:
        with torch.autocast(options.device, dtype, enabled=dtype is not None):
            count, texts, _, (caption, labels, seen) = encode(original, images, captions, True)
            shared = {"dummy_token_index": 0, "offset": count, "prefix_image_tok_embeds": True}
            caption_loss = next_token_loss(decode(caption, **shared), texts[2])
            logits = decode(
                labels, input_tokens=seen, decouple_label_tok_embeds=True, is_train=True, **shared
            )
            label_loss = next_token_loss(logits, texts[3])
        losses.append(label_loss.item())
        (caption_loss * 0.0 + label_loss * 1.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**measure(step, options), "loss": losses[0]}
