"""The recorded NXTP network, tokenizer and batches, in our classes."""

import functools

import torch
from safetensors.torch import load_file

from dataset.tasks.recognition import Sequences
from dataset.text.sentencepiece import PieceTokenizer
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.loading import load_checkpoint
from models.weights.nxtp import geometry, openai_layout, recognition_state
from tests.helpers.golden import golden, golden_file

HEADS = 4


def tensors(name: str) -> dict[str, torch.Tensor]:
    """A safetensors file as it is, half precision cast to float32."""
    loaded = load_file(golden_file("nxtp", f"{name}.safetensors"))
    return {
        key: value.float() if value.dtype == torch.float16 else value
        for key, value in loaded.items()
    }


def meta(name: str):
    return golden("nxtp", name)[0]


def tokenizer() -> PieceTokenizer:
    return PieceTokenizer(golden_file("nxtp", "tokenizer.model"))


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    clip = openai_layout(tensors("clip_openai_style"))
    return recognition_state(tensors("checkpoint_trainable"), clip)


def network(**changes) -> Nxtp:
    """The network of the recorded checkpoint; changes: of NxtpConfig."""
    model = Nxtp(NxtpConfig(*geometry(weights(), HEADS), **changes))
    assert not load_checkpoint(model, weights())
    return model.eval()


def sequences(max_text: int, **changes) -> Sequences:
    """Without the check that every prompt fits, as some recorded cases are that short."""
    made = object.__new__(Sequences)
    fields = {
        "tokenizer": tokenizer(),
        "max_text": max_text,
        "many_prompts": False,
        "original": True,
    }
    fields |= {"end_target": False, "decouple": True} | changes
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def batch_of(
    tokens: torch.Tensor, targets: torch.Tensor, images: int, labels: bool
) -> dict[str, torch.Tensor]:
    """The recorded token and target matrices [B,T], [B,N+T] (-1: nothing) as a batch of the model's
    forward.

    labels: whether they are labels, whose segments are to be found, or captions.
    """
    pieces, rows = tokenizer(), []
    answer = pieces.encode("The objects in the image are")[-1]
    for row, aim in zip(tokens.tolist(), targets.tolist(), strict=True):
        ids = [token for token in row if token >= 0]
        segments = [0] * len(ids)
        if labels:
            current = 1
            for i in range(ids.index(answer) + 1, len(ids)):
                segments[i] = current
                current += ids[i] == pieces.delimiter
            segments = [-1 if j == current else j for j in segments]
        goals = [goal if goal >= 0 else -100 for goal in aim[images + 1 : images + 1 + len(ids)]]
        goals += [-100] * (len(ids) - len(goals))
        rows.append({"text_ids": ids, "segments": segments, "targets": goals})
    from dataset.tasks.recognition import pad_batch

    return pad_batch(rows, pieces.pad)
