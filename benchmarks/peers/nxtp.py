"""The original's side of benchmarks.recognition: NXTP's functions and networks out of a checkout.

Its numeric code runs unchanged; modules that it imports for other purposes are replaced by empty
ones, `clip` by the two layers it uses.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import nxtp_inputs as inputs
from benchmarks.gauge import measure
from benchmarks.inputs import PEER_FILE, leave, left
from benchmarks.peers.stand_ins import stand_in
from runtime.optim.build import PRECISIONS


class LayerNorm(nn.LayerNorm):
    """In float32, back in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Original:
    """The checkout's modules, and its network with weights that both sides share."""

    def __init__(self, options: types.SimpleNamespace):
        torch.manual_seed(0)
        import_stand_ins(options.peer)
        self.decoding = importlib.import_module("decoding")
        self.encoding = importlib.import_module("encoding")
        self.evaluation = importlib.import_module("evals.eval")
        self.encoding.shuffle = lambda labels: None  # its order of labels is not seeded
        self.args = types.SimpleNamespace(
            max_seq_len=inputs.LENGTH,
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
        self.model = self.build_model(*inputs.sizes_of(options))
        with torch.no_grad():  # the head of a trained network is sharper than torch's default
            self.model.language_decoder.output.weight.mul_(8)
        if left(options, PEER_FILE) is None:
            leave(options, PEER_FILE, self.model.state_dict())
        self.model.load_state_dict(left(options, PEER_FILE))
        self.model.to(options.device)

    def build_model(self, width: int, blocks: int, decoder: dict[str, int]) -> nn.Module:
        """The same network as ours, of the original's classes."""
        classifier = importlib.import_module("models.classifier").LangClassifier
        tower = importlib.import_module("models.clip").CLIPViT
        lang = importlib.import_module("models.lang")
        dim = decoder["dim"]
        encoder = tower(inputs.SIDE, inputs.PATCH, width, blocks, width // 64, dim)
        del encoder.proj
        encoder.proj = nn.Linear(width, dim, bias=False)
        lengths = {"vocab_size": inputs.Words.vocab_size, "max_seq_len": inputs.LENGTH}
        settings = lang.ModelArgs(**decoder, **lengths)
        settings.shave_language_decoder_at = 0
        return classifier(vision_encoder=encoder, language_decoder=lang.LLaMATransformer(settings))

    def encode(self, images: Tensor, captions: list[str], training: bool) -> tuple:
        """Number of image tokens; texts, token ids and embeddings as its functions return them."""
        tokens = self.model.decode_images(self.model.encode_images(images))[:, 1:]
        words = inputs.Words()
        texts = self.encoding.construct_text_inputs(
            self.args, captions, words, offset=tokens.shape[1], is_train=training
        )
        ids = [part.to(images.device) for part in texts[:2]]
        table = self.model.language_decoder.tok_embeddings.weight
        embedded = self.encoding.construct_embd_inputs(
            tokens, table[ids[0]], table[ids[1]], texts[4], texts[5], ids[0], ids[1], words
        )
        return tokens.shape[1], texts, ids, embedded


def import_stand_ins(checkout: str) -> None:
    """Make the checkout importable without the modules that neither case uses."""
    source = Path(checkout) / "src"
    sys.path.insert(0, str(source))
    stand_in("models", __path__=[str(source / "models")])  # a folder without __init__: ours has one
    stand_in("clip", model=types.SimpleNamespace(LayerNorm=LayerNorm, QuickGELU=QuickGELU))
    stand_in("utils", get_noun_words=lambda text, **_: ",".join(inputs.labels_of(text)))
    stand_in("evals", __path__=[str(source / "evals")])
    for unused in ("train", "loader", "evals.engine"):
        stand_in(unused)


def label(options: types.SimpleNamespace) -> dict:
    """Top labels of images as its evaluation finds them."""
    original = Original(options)
    model = original.model.eval()
    images = inputs.images(options.images).to(options.device)
    found = []

    @torch.inference_mode()
    def step() -> None:
        count, texts, ids, embedded = original.encode(images, [""] * len(images), False)
        limit = inputs.LABEL_TOKENS + 1
        decoder = original.decoding.OneShotDecoder(k=options.labels, max_update_iter=limit)
        decoder.reset()
        finish = decoder.finalize
        rows = []

        def finalize(tokens, *rest, **more):  # it loses track of unfinished rows: take them now
            rows.append(tokens)
            return finish(tokens, *rest, **more)

        decoder.finalize = finalize
        words = inputs.Words()
        prompt = [texts[5], ids[1], embedded[1], embedded[2], words]
        original.evaluation.generate(original.args, count, *prompt, model, images.device, decoder)
        begin = int((ids[1][0] >= 0).sum())  # the prompt's length
        tokens = rows[0][:, begin : begin + inputs.LABEL_TOKENS].unflatten(0, (len(images), -1))
        found[:] = [[first_label(row) for row in image] for image in tokens.tolist()]

    return {**measure(step, options), "tokens": found}


def first_label(row: list[int]) -> list[int]:
    """Up to the first delimiter, included."""
    return row[: row.index(inputs.COMMA) + 1] if inputs.COMMA in row else row


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits[:, :-1].reshape(-1, logits.shape[-1])
    target = target[:, 1:].reshape(-1).to(logits.device)
    return F.cross_entropy(logits, target, ignore_index=-1)


def train(options: types.SimpleNamespace) -> dict:
    """A step as its training loop takes it, with both branches; `loss` is the first one's."""
    original = Original(options)
    model = original.model.train()
    images = inputs.images(options.batch).to(options.device)
    captions = inputs.captions(options.batch)
    inputs.freeze(model)
    table = model.language_decoder.tok_embeddings.weight
    trained_row = torch.zeros_like(table)
    trained_row[inputs.IMAGE] = 1
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
            count, texts, _, (caption, labels, seen) = original.encode(images, captions, True)
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
