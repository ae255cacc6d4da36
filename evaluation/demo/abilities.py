"""What a checkpoint can do, as plain functions of images and texts; the tabs of the page call them.

Images are uint8 [3,H,W], as decoded; each function transforms them as its network wants them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Ranked = list[tuple[str, float]]  # names with their probabilities, best first


@dataclass
class Embedder:
    """Images, and texts where there is a text encoder, as unit vectors of one space.

    view: image -> one input. images: inputs [B,...] -> float32 [B,E]; texts: B texts -> float32
    [B,E], both on the CPU. scale: from a cosine to a logit. signature: changes with the embeddings.
    template: what a class name is put into, at {}.
    """

    view: Callable[[Tensor], Tensor]
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None
    scale: float
    signature: str
    template: str = "{}"


@dataclass
class Abilities:
    """title: what the checkpoint is. What it cannot do is None.

    match: image, texts -> probability that each text describes the image (ITM).
    word_maps: image, text -> words with heat float32 [g,g] in [0,1].
    answer: image, question, answers to choose from -> the likeliest; answers: the list to choose
    from where the user types none. entail: image, sentence -> classes.
    recognise: image -> labels. attention: image, labels -> the image as the network sees it, uint8
    [3,S,S], and heat [g,g] in [0,1] of each label.
    """

    title: str
    embedder: Embedder | None = None
    match: Callable[[Tensor, Sequence[str]], list[float]] | None = None
    word_maps: Callable[[Tensor, str], list[tuple[str, Tensor]]] | None = None
    answer: Callable[[Tensor, str, Sequence[str]], Ranked] | None = None
    answers: list[str] = field(default_factory=list)
    entail: Callable[[Tensor, str], Ranked] | None = None
    recognise: Callable[[Tensor], Ranked] | None = None
    attention: Callable[[Tensor, Sequence[str]], tuple[Tensor, list[Tensor]]] | None = None

    @property
    def texts(self) -> bool:
        """Whether texts can be compared with images."""
        return self.embedder is not None and self.embedder.texts is not None


def together(found: Sequence[Abilities]) -> Abilities:
    """All that several checkpoints can do; of several that can do the same, the first does it."""
    result = Abilities(" + ".join(each.title for each in found))
    for each in found:
        if each.texts and not result.texts:
            result.embedder = each.embedder
        result.embedder = result.embedder or each.embedder
        if each.match and not result.match:
            result.match = each.match
            result.word_maps = each.word_maps  # of that score
        result.entail = result.entail or each.entail
        if each.answer and not result.answer:
            result.answer = each.answer
            result.answers = each.answers
        if each.recognise and not result.recognise:
            result.recognise = each.recognise
            result.attention = each.attention
    return result


def lacking(abilities: Abilities, folder: bool) -> list[str]:
    """What the page does not show, each with what makes it. folder: whether images are searched."""
    lines = []
    if not abilities.embedder:
        lines.append("search (checkpoints of Pretrain.py, Retrieval.py, main.py)")
    elif not folder:
        lines.append("search (add --images FOLDER)")
    elif not abilities.texts:
        lines.append("search by words (checkpoints of Pretrain.py, Retrieval.py, main.py)")
    if not abilities.texts:
        lines.append("zero-shot classification (checkpoints of Pretrain.py, Retrieval.py, main.py)")
    if not abilities.word_maps:
        lines.append("grounding (checkpoints of Pretrain.py, Retrieval.py, Grounding.py)")
    if not abilities.answer:
        lines.append("question answering (VQA.py makes a checkpoint)")
    if not abilities.entail:
        lines.append("entailment (VE.py makes a checkpoint)")
    if not abilities.recognise:
        lines.append("recognition (Recognition.py makes a checkpoint)")
    return lines
