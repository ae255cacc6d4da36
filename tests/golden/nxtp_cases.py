"""The recorded NXTP network, tokenizer and batches, in our classes."""

import torch

from dataset.tasks.recognition import Sequences, pad_batch
from dataset.text.sentencepiece import PieceTokenizer
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.loading import load_checkpoint
from models.weights.nxtp import geometry, openai_layout, recognition_state
from tests.helpers.golden import golden_file, golden_json, golden_tensors


def tensors(name: str) -> dict[str, torch.Tensor]:
    """A safetensors file, half precision cast to float32."""
    return golden_tensors("nxtp", f"{name}.safetensors")


def meta(name: str):
    return golden_json("nxtp", f"{name}.json")


def config() -> dict:
    """Sizes and special ids of the recorded system."""
    return meta("config")


def text_length() -> int:
    """Most text tokens behind the image."""
    return config()["max_seq_len"] - config()["vision"]["n_image_tokens"]


def prompt() -> str:
    """The prompt that asks for labels; its last token is the one that answers."""
    return meta("decoder")["prompt_objects"]


def tokenizer() -> PieceTokenizer:
    return PieceTokenizer(golden_file("nxtp", "tokenizer.model"))


def weights() -> dict[str, torch.Tensor]:
    clip = openai_layout(tensors("clip_openai_style"))
    return recognition_state(tensors("checkpoint_trainable"), clip)


def network(**changes) -> Nxtp:
    """The network of the recorded checkpoint; changes: of NxtpConfig."""
    state = weights()
    vision, decoder = geometry(state, config()["llama_params"]["n_heads"])
    model = Nxtp(NxtpConfig(vision, decoder, **changes))
    assert not load_checkpoint(model, state)
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


def segments_of(ids: list[int], answer: int, delimiter: int, decouple: bool = True) -> list[int]:
    """Which label a token belongs to: 0 up to the answering token, then 1, 2, … each with its delimiter.

    The last label has no delimiter and is in no segment, -1, as in the original.
    """
    segments, current = [], 1
    for place, token in enumerate(ids):
        behind = place > ids.index(answer)
        segments.append(current if behind and decouple else 0)
        current += token == delimiter and behind
    return [-1 if segment == current else segment for segment in segments]


def batch_of(
    tokens: torch.Tensor, targets: torch.Tensor, images: int, labels: bool
) -> dict[str, torch.Tensor]:
    """The recorded token and target matrices [B,T], [B,N+T] (-1: nothing) as a batch of the model's
    forward.

    labels: whether they are labels, whose segments are to be found, or captions.
    """
    pieces, rows = tokenizer(), []
    answer = config()["answer_token_id"]
    for row, aim in zip(tokens.tolist(), targets.tolist(), strict=True):
        ids = [token for token in row if token >= 0]
        segments = segments_of(ids, answer, pieces.delimiter) if labels else [0] * len(ids)
        goals = [goal if goal >= 0 else -100 for goal in aim[images + 1 : images + 1 + len(ids)]]
        goals += [-100] * (len(ids) - len(goals))
        rows.append({"text_ids": ids, "segments": segments, "targets": goals})
    return pad_batch(rows, pieces.pad)
