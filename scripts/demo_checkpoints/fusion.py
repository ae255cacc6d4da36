"""Checkpoints of SIMLA and ALBEF: search, classification and heat maps; answers; entailment."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

import Retrieval
import VE
import VQA
from base.distributed import World, say
from base.errors import UserError
from dataset.tasks.loaders import test_view
from dataset.tasks.ve_nlvr import SNLI_VE
from dataset.tasks.vqa import encode_answers, read_answer_list
from dataset.text.wordpiece import Tokenizer, pre_caption, pre_question
from evaluation.demo.abilities import Abilities, Embedder, Ranked
from evaluation.report.attention_maps import merge_pieces, word_layer
from evaluation.zeroshot import fingerprint
from models.fusion.base import first_token
from models.fusion.grounding import token_maps
from models.weights.albef import start_from
from runtime.config.from_checkpoint import saved_config
from runtime.config.fusion import prepare

SHOWN = 10  # answers of a question


def retrieval(file: Path, config, world: World) -> Abilities:
    """A checkpoint of pre-training, retrieval or grounding."""
    task = Retrieval.Config(queue_size=0, **common(file, config))
    tokenizer, model, view = opened(task, Retrieval.build_model, "retrieval", world)
    layer = word_layer(model.config.bert.fusion_layer, model.config.bert.num_hidden_layers)

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        cleaned = [pre_caption(text, task.max_words) for text in texts]
        check_words(tokenizer, cleaned, texts)
        ids, mask = tokenizer(cleaned, task.max_tokens, lengths=None)
        return ids.to(world.device), mask.to(world.device)

    @torch.no_grad()
    def embed_images(images: Tensor) -> Tensor:
        return model.encode_image(images.to(world.device))[1].cpu()

    @torch.no_grad()
    def embed_texts(texts: Sequence[str]) -> Tensor:
        parts = range(0, len(texts), config.batch_size)
        rows = [
            model.encode_text(*tokens(texts[i : i + config.batch_size]))[1].cpu() for i in parts
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def match(image: Tensor, texts: Sequence[str]) -> list[float]:
        ids, mask = tokens(texts)
        image_tokens, _ = model.encode_image(view(image)[None].to(world.device))
        stage = model.bert.text_stage(ids, mask)
        rows = torch.zeros(len(texts), dtype=torch.int64, device=world.device)
        fused = model.bert.fuse(stage, mask, image_tokens, rows=rows, keep=first_token(stage))
        return model.match_logits(fused[:, 0]).softmax(-1)[:, 1].tolist()

    def maps(image: Tensor, text: str) -> list[tuple[str, Tensor]]:
        ids, mask = tokens([text])
        found = token_maps(model, view(image)[None].to(world.device), ids, mask, layer)[0].cpu()
        return merge_pieces(ids[0].tolist(), found, tokenizer.backend.id_to_token)

    depends = (task.image_res, task.max_words, task.max_tokens, tokenizer.backend.to_str())
    embedder = Embedder(
        view=view,
        images=embed_images,
        texts=embed_texts,
        scale=1 / model.temp.item(),
        signature=fingerprint(model, *depends),
    )
    return Abilities(str(file), embedder, match=match, word_maps=maps)


def answering(file: Path, config, world: World) -> Abilities:
    """A checkpoint of VQA.py."""
    task = VQA.Config(**common(file, config))
    tokenizer, model, view = opened(task, VQA.build_model, "vqa", world)

    @torch.no_grad()
    def answer(image: Tensor, question: str, answers: Sequence[str]) -> Ranked:
        asked = pre_question(question, task.max_words_test)
        check_words(tokenizer, [asked], [question])
        ids, mask = tokenizer([asked])
        answer_ids, answer_mask = encode_answers(answers, tokenizer)
        k = min(task.k_test, len(answers))
        inputs = (view(image)[None], ids, mask, answer_ids, answer_mask.sum(1))
        best, probability = model.rank_answers(*(each.to(world.device) for each in inputs), k)
        shown = zip(best[0, :SHOWN].tolist(), probability[0].tolist(), strict=False)
        return [(answers[number], value) for number, value in shown]

    return Abilities(str(file), answer=answer, answers=answer_list(file, config))


def entailment(file: Path, config, world: World) -> Abilities:
    """A checkpoint of VE.py."""
    task = VE.Config(**common(file, config))
    tokenizer, model, view = opened(task, VE.build_model, "ve", world)

    @torch.no_grad()
    def entail(image: Tensor, sentence: str) -> Ranked:
        cleaned = pre_caption(sentence, task.max_words)
        check_words(tokenizer, [cleaned], [sentence])
        ids, mask = tokenizer([cleaned])
        inputs = (view(image)[None], ids, mask)
        logits = model.logits(*(each.to(world.device) for each in inputs))
        probability = logits[0].softmax(-1).tolist()
        found = zip(SNLI_VE.classes, probability, strict=True)
        return sorted(found, key=itemgetter(1), reverse=True)

    return Abilities(str(file), entail=entail)


def opened(task, build_model: Callable, kind: str, world: World):
    """Tokenizer, network in evaluation mode, and view of images, of a fine-tuning script's
    configuration."""
    start = prepare(task)
    tokenizer = Tokenizer(task.text_encoder)
    weights = [start.weights] if kind == "vqa" else []  # they say how deep its decoder is
    model = build_model(task, tokenizer, *weights)
    start_from(model, start.weights, kind)
    return tokenizer, model.to(world.device).eval(), test_view(task)


def common(file: Path, config) -> dict:
    """Options of every fine-tuning script for a network that is only evaluated."""
    options = {"checkpoint": file, "distill": False, "device": config.device}
    if config.tokenizer:
        options["text_encoder"] = config.tokenizer
    return options


def check_words(tokenizer: Tokenizer, cleaned: Sequence[str], texts: Sequence[str]) -> None:
    """UserError for a text of which ALBEF's cleaning, or the vocabulary, leaves nothing: it would be
    ranked as any other such text is."""
    for left, text in zip(cleaned, texts, strict=True):
        if not {*tokenizer.plain_ids(left)} - {tokenizer.unk_id}:
            raise UserError(f"{text!r}: no word is left that the vocabulary knows; use other words")


def answer_list(file: Path, config) -> list[str]:
    """The answers that are given, or those of the run; none where its list is not here."""
    if config.answer_list:
        return read_answer_list(config.answer_list)
    own = saved_config(file).get("answer_list")
    if own and Path(own).is_file():
        return read_answer_list(own)
    say(f"{file}: its list of answers is not here; type the answers, or add --answer-list")
    return []
