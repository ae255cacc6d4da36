"""Zero-shot classification: text classifiers from class names and templates, ensembles of embeddings, accuracy."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.split import over_split
from runtime.distributed import World
from runtime.errors import InputError

Embeddings = dict[str, Tensor]
WEIGHTS = tuple(n / 10 for n in range(1, 10))  # of z in the ensemble of z and h


def class_prompts(classes: Sequence[str | Sequence[str]], templates: Sequence[str], name: str = "") -> list[list[str]]:
    """For every class all templates filled with its name; a class of several names gets every template with each."""
    for template in templates:
        if "{}" not in template:
            raise InputError(
                f"template {template!r} of {name or 'the templates'} has no {{}} for the class name; add it"
            )
    if not templates or not classes:
        raise InputError(f"{name or 'zero-shot classification'}: needs class names and at least one template")
    names = [[each] if isinstance(each, str) else each for each in classes]
    return [[template.replace("{}", one) for template in templates for one in each] for each in names]


def text_classifier(
    embed_text: Callable[[Tensor], Embeddings],
    tokenize: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    device: torch.device,
    batch_size: int = 256,
) -> Embeddings:
    """For every embedding but `feats` (z, h) a classifier [C,E]: unit embeddings of a class's prompts, averaged, made
    unit again (Radford et al. 2021, section 3.1.4).
    """
    texts = [text for each in prompts for text in each]
    parts = [embed_text(tokenize(texts[i : i + batch_size]).to(device)) for i in range(0, len(texts), batch_size)]
    sizes = [len(each) for each in prompts]
    joined = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0] if name != "feats"}
    means = {k: [group.mean(0) for group in F.normalize(v, dim=-1).split(sizes)] for k, v in joined.items()}
    return {name: F.normalize(torch.stack(groups), dim=-1) for name, groups in means.items()}


def class_scores(image: Embeddings, classifier: Embeddings) -> Embeddings:
    """Cosine of every picture and class [B,C]: `z`, and for models with local projectors `h` and w z + (1 - w) h as
    `zh_w` for w = 0.1 ... 0.9.
    """
    scores = {name: F.normalize(image[name].float(), dim=-1) @ matrix.T for name, matrix in classifier.items()}
    if "h" in scores:
        scores |= {f"zh_{w}": w * scores["z"] + (1 - w) * scores["h"] for w in WEIGHTS}
    return scores


def score_names(classifier: Embeddings) -> list[str]:
    """Names of what `class_scores` returns, in its order."""
    return [*classifier, *(f"zh_{w}" for w in WEIGHTS if "h" in classifier)]


def best_classes(
    embed_image: Callable[[Tensor], Embeddings],
    classifier: Embeddings,
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
    k: int = 5,
) -> Tensor:
    """The k best classes of every picture by each score of `score_names`: int64 [N,S,k] on every process.

    batches: dicts with `image` of the pictures `own`, this process's part of all `total` (see over_split).
    """
    names, k = score_names(classifier), min(k, len(next(iter(classifier.values()))))

    def predict(image: Tensor) -> tuple[Tensor]:
        scores = class_scores(embed_image(image), classifier)
        return (torch.stack([scores[name].topk(k).indices for name in names], 1),)

    return over_split(predict, batches, own, total, world, "zero-shot")[0]


def topk_accuracy(best: Tensor, labels: Tensor, names: Sequence[str], at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`acc<k>_<name>` in percent of `best_classes` int64 [N,S,K]; S `names` of the scores; labels [N]. With fewer than
    k classes all are among the best k.
    """
    hits = best == labels.view(-1, 1, 1)
    return {
        f"acc{k}_{name}": 100 * hits[:, number, :k].any(-1).double().mean().item()
        for number, name in enumerate(names)
        for k in at
    }


def zero_shot_accuracy(embed_image, classifier: Embeddings, batches, own, labels: Tensor, world: World) -> dict:
    """Top-1 and top-5 accuracy in percent by every score, over all pictures; labels int64 [N] (see best_classes)."""
    best = best_classes(embed_image, classifier, batches, own, len(labels), world)
    return topk_accuracy(best, labels, score_names(classifier))
