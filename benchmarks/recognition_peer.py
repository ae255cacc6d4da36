"""The original's side of benchmarks/recognition.py: its own encoding, decoding and networks out of
a checkout.

Started by benchmarks.recognition with its options as JSON; prints one line of JSON. Its numeric
code runs unchanged;
modules that it imports for other purposes are replaced by empty ones, `clip` by the two layers it
uses.
"""

import contextlib
import io
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import recognition_common as common
from benchmarks.common import about, chosen_device, measure


class LayerNorm(nn.LayerNorm):
    """In float32, back in the type of its input."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def stand_in(name: str, **content) -> types.ModuleType:
    """An empty module of that name with some content."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def import_original(checkout: str):
    """Its modules `encoding`, `decoding`, `evals.eval`, `models.lang`, `models.clip`,
    `models.classifier`."""
    sys.path.insert(0, str(Path(checkout) / "src"))
    stand_in("clip", model=types.SimpleNamespace(LayerNorm=LayerNorm, QuickGELU=QuickGELU))
    stand_in(
        "utils",
        get_noun_words=lambda text, **_: ",".join(common.labels_of(text)),
        load_checkpoint=None,
    )
    stand_in("train", load_llama=None, load_clip=None)
    stand_in("loader", build_preprocess=None)
    evals = stand_in("evals")
    evals.__path__ = [str(Path(checkout) / "src/evals")]
    stand_in("evals.engine", prepare=None, evaluate=None, _TEST_DATASETS=None, _CLIP_MODELS=None)
    import decoding
    import encoding
    import evals.eval as evaluation
    from models.classifier import LangClassifier
    from models.clip import CLIPViT
    from models.lang import LLaMATransformer, ModelArgs

    encoding.shuffle = lambda labels: None  # its order of labels is not seeded
    return encoding, decoding, evaluation, LangClassifier, CLIPViT, LLaMATransformer, ModelArgs


def build_model(classifier, tower, transformer, arguments) -> nn.Module:
    """The same network of the original's classes."""
    vision, sizes = common.VISION, common.DECODER
    encoder = tower(
        vision["side"],
        vision["patch"],
        vision["width"],
        vision["layers"],
        vision["heads"],
        sizes["dim"],
    )
    del encoder.proj
    encoder.proj = nn.Linear(vision["width"], sizes["dim"], bias=False)
    settings = arguments(
        dim=sizes["dim"],
        n_layers=sizes["layers"],
        n_heads=sizes["heads"],
        multiple_of=sizes["multiple_of"],
        vocab_size=common.Words.vocab_size,
        max_seq_len=common.LENGTH,
    )
    settings.shave_language_decoder_at = 0
    return classifier(vision_encoder=encoder, language_decoder=transformer(settings))


def arguments_of(options: dict) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        max_seq_len=common.LENGTH,
        special_tokens=["<|image|>"],
        enable_prompt_augmentation=False,
        rm_eos_token_for_objs=True,
        label_contains_number=True,
        prefix_image_tok_embeds=True,
        decouple_label_tok_embeds=True,
        text_decoder_strategy="one_shot",
        max_gen_len=64,
        **{"k_for_topk": options["labels"]},
    )


def inputs(encoding, model, args, images, captions, training: bool):
    """Image tokens and the original's text and embedding inputs."""
    tokens = model.decode_images(model.encode_images(images))[:, 1:]
    texts = encoding.construct_text_inputs(
        args, captions, common.Words(), offset=tokens.shape[1], is_train=training
    )
    device, table = images.device, model.language_decoder.tok_embeddings.weight
    ids = [part.to(device) for part in texts[:2]]
    embedded = encoding.construct_embd_inputs(
        tokens, table[ids[0]], table[ids[1]], texts[4], texts[5], ids[0], ids[1], common.Words()
    )
    return tokens.shape[1], texts, ids, embedded


def labelling(modules, model, options: dict, device: torch.device):
    """A function that labels the images as its evaluation does, and the dict that receives its
    tokens."""
    encoding, decoding, evaluation = modules[:3]
    args, images, found = arguments_of(options), common.images(options["images"]).to(device), {}

    def step() -> None:
        with torch.inference_mode():
            count, texts, ids, embedded = inputs(
                encoding, model, args, images, [""] * len(images), False
            )
            decoder = decoding.OneShotDecoder(
                k=options["labels"], max_update_iter=options["tokens"] + 1
            )
            decoder.reset()
            rows = []
            finish = decoder.finalize

            def finalize(
                tokens, *rest, **more
            ):  # of unfinished rows it loses track: take them before
                rows.append(tokens[:, prompt_length(ids[1]) :])
                return finish(tokens, *rest, **more)

            decoder.finalize = finalize
            evaluation.generate(
                args,
                count,
                texts[5],
                ids[1],
                embedded[1],
                embedded[2],
                common.Words(),
                model,
                device,
                decoder,
            )
            tokens = rows[0][:, : options["tokens"]].unflatten(0, (len(images), -1))
            found["tokens"] = [[first_label(row) for row in image] for image in tokens.tolist()]

    return step, found


def prompt_length(ids: torch.Tensor) -> int:
    return int((ids[0] >= 0).sum())


def first_label(row: list[int]) -> list[int]:
    """Up to the first delimiter, included."""
    return row[: row.index(common.COMMA) + 1] if common.COMMA in row else row


def training(modules, model, options: dict, device: torch.device):
    """A function that takes a step as its training loop does (both branches), and the dict that
    receives its loss."""
    encoding, args, found = modules[0], arguments_of(options), {}
    images, captions = common.images(options["batch"]).to(device), common.captions(options["batch"])
    blocks = tuple(
        f"vision_encoder.transformer.resblocks.{i}." for i in range(common.VISION["layers"])
    )
    frozen = blocks[: -common.TRAINED_BLOCKS]
    start = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.startswith((*frozen, *(f"vision_encoder.{part}" for part in start)))
        )
    table = model.language_decoder.tok_embeddings.weight
    rows = torch.zeros_like(table)
    rows[common.IMAGE] = 1
    table.register_hook(lambda grad: grad.mul_(rows))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
    )

    def loss_of(logits, target):
        logits, target = (
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            target[:, 1:].reshape(-1).to(device),
        )
        return F.cross_entropy(logits, target, ignore_index=-1)

    def step() -> None:
        count, texts, _, (caption, labels, seen) = inputs(
            encoding, model, args, images, captions, True
        )
        shared = {"dummy_token_index": 0, "offset": count, "prefix_image_tok_embeds": True}
        decode = model.language_decoder.forward
        caption_loss = loss_of(decode(caption, **shared), texts[2])
        own = {"input_tokens": seen, "decouple_label_tok_embeds": True, "is_train": True}
        label_loss = loss_of(decode(labels, **shared, **own), texts[3])
        found.setdefault("loss", label_loss.item())
        (caption_loss * 0.0 + label_loss * 1.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, found


def main() -> None:
    options = json.loads(sys.argv[1])
    device = chosen_device(options["device"])
    torch.manual_seed(0)
    modules = import_original(options["peer"])
    model = build_model(*modules[3:])
    saved = Path(options["exchange"]) / "weights.pt"
    if not saved.exists():
        with torch.no_grad():  # the head of a trained network is sharper than torch's default
            model.language_decoder.output.weight.mul_(8)
        torch.save(model.state_dict(), saved)
    model.load_state_dict(torch.load(saved, weights_only=True, mmap=True))
    model = model.to(device).train(options["case"] == "train")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints warnings
        step, found = (training if options["case"] == "train" else labelling)(
            modules, model, options, device
        )
        result = measure(step, device, options["warmup"], options["steps"])
    print(json.dumps({**result, **found} | about(device)))


if __name__ == "__main__":
    main()
