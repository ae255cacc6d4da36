"""Zero-shot classification: text classifiers from class names and templates, ensembles of
embeddings, accuracy."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base import distributed
from base.caches import digest, weights_digest
from base.distributed import World
from base.errors import UserError
from base.writing import write_json
from evaluation.compositional import choices, example_scores
from evaluation.predict import cosines, over_split, percent
from evaluation.retrieval import best_of_both, recalls, units
from evaluation.zeroshot_metrics import (
    KEPT,
    NEEDS_SCORES,
    by_score,
    class_figures,
    measure,
    random_map11,
)
from runtime.checkpoint import export_safetensors, read_weights

Embeddings = dict[str, Tensor]
EMBEDDINGS = ("z", "h")  # what is compared; `feats` is not
WEIGHTS = tuple(n / 10 for n in range(1, 10))  # of z in the ensemble of z and h


def embed_texts(
    embed_text: Callable[[Tensor], Embeddings],
    tokenize: Callable[[Sequence[str]], Tensor],
    texts: Sequence[str],
    world: World,
    batch_size: int = 256,
) -> Embeddings:
    """Unit embeddings float32 [T,E] of texts by name (z, h), on the CPU of every process.

    Batches are dealt out to the processes; any number of processes gives the same bits.
    """
    own = units(len(texts), batch_size, world)

    def embed(text_ids: Tensor) -> tuple[Tensor, ...]:
        return unit_rows(embed_text(text_ids))

    batches = ({"text_ids": tokenize([texts[i] for i in unit])} for unit in own)
    rows = [i for unit in own for i in unit]
    found = over_split(embed, batches, rows, len(texts), world, "texts", steps=len(own))
    return dict(zip(EMBEDDINGS, found, strict=False))


def embed_images(
    embed_image: Callable[[Tensor], Embeddings],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
) -> Embeddings:
    """Unit embeddings float32 [I,E] of images by name, on the CPU of every process; batches of
    `image` of `own`."""

    def embed(image: Tensor) -> tuple[Tensor, ...]:
        return unit_rows(embed_image(image))

    found = over_split(embed, batches, own, total, world, "images")
    return dict(zip(EMBEDDINGS, found, strict=False))


def unit_rows(found: Embeddings) -> tuple[Tensor, ...]:
    """The embeddings [B,E] that are compared, in float32 at length 1, in the order of EMBEDDINGS."""
    return tuple(F.normalize(found[name].float(), dim=-1) for name in EMBEDDINGS if name in found)


def text_classifier(
    embed_text: Callable[[Tensor], Embeddings],
    tokenize: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    world: World,
    batch_size: int = 256,
) -> Embeddings:
    """For every embedding (z, h) a classifier [C,E]: unit embeddings of a class's prompts,
    averaged, made unit again (Radford et al. 2021, section 3.1.4); on `world.device`.
    """
    texts = [text for of_class in prompts for text in of_class]
    sizes = [len(of_class) for of_class in prompts]
    classifier = {}
    for name, rows in embed_texts(embed_text, tokenize, texts, world, batch_size).items():
        means = torch.stack([of_class.mean(0) for of_class in rows.split(sizes)])
        classifier[name] = F.normalize(means, dim=-1).to(world.device)
    return classifier


def cached_classifier(file: Path, make: Callable[[], Embeddings], world: World) -> Embeddings:
    """The classifier stored in `file`, or else the one that `make()` returns, which is stored there
    (safetensors)."""
    stored = distributed.on_main(partial(_stored, file))
    if stored is None:
        stored = make()
        distributed.on_main(partial(_store, stored, file), share=False)
    return {name: matrix.to(world.device) for name, matrix in stored.items()}


def prompt_classifier(
    opened, signature: str, prompts: Sequence[Sequence[str]], folder: Path, size: int, world: World
) -> Embeddings:
    """The text classifier of the prompts of every class by score, kept in `folder`.

    opened: has `model` and `tokenize`. signature: what its text embeddings depend on; size: texts
    per forward pass and process.
    """
    file = folder / f"classifiers/{digest(signature, size, prompts)}.safetensors"
    make = partial(text_classifier, opened.model.embed_text, opened.tokenize, prompts, world, size)
    return cached_classifier(file, make, world)


def fingerprint(model: nn.Module, *more) -> str:
    """Digest of a network (its configuration, what its modules compute, names and values of its
    weights) and of further plain values."""
    return digest(model.config, modules_of(model), weights_digest(model.state_dict()), *more)


def modules_of(model: nn.Module) -> list:
    """Every module with the options that its weights do not show: activation, epsilon, heads."""
    found: list = []
    for part in model.modules():
        options = {name: value for name, value in vars(part).items() if is_plain(value)}
        options.pop("training")
        found.append((type(part).__name__, sorted(options.items())))
        config = vars(part).get("config")  # of ours, and of transformers
        if is_dataclass(config) and config not in found:
            found.append(config)
        elif hasattr(config, "to_dict") and (plain := config.to_dict()) not in found:
            found.append(plain)
    return found


def is_plain(value: object) -> bool:
    """Whether a value is numbers or texts."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, int | float | str)


def _store(classifier: Embeddings, file: Path) -> None:
    try:
        export_safetensors(classifier, file)
    except (OSError, UserError) as error:
        warnings.warn(
            f"{file}: the text classifier is not kept ({error}); name another --cache", stacklevel=2
        )


def _stored(file: Path) -> Embeddings | None:
    if not file.is_file():
        return None
    try:
        found = read_weights(file)  # in the order of the file
    except UserError:  # cut off or of another making: it is written again
        return None
    return {name: found[name] for name in EMBEDDINGS if name in found}


def class_scores(image: Embeddings, classifier: Embeddings) -> Embeddings:
    """Cosine of every image and class [B,C]: `z`, and for models with local projectors `h` and w z
    + (1 - w) h as `zh_w` for w = 0.1 ... 0.9.
    """
    scores = {
        name: cosines(F.normalize(image[name].float(), dim=-1), matrix)
        for name, matrix in classifier.items()
    }
    if "h" in scores:
        for w in WEIGHTS:
            scores[f"zh_{w}"] = w * scores["z"] + (1 - w) * scores["h"]
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
) -> Tensor:
    """The KEPT best classes of every image by each score of `score_names`, or all where there are
    fewer: int64 [N,S,K] on every process.

    batches: dicts with `image` of the images `own`, this process's part of all `total` (see
    over_split).
    """
    names = score_names(classifier)
    kept = min(KEPT, len(next(iter(classifier.values()))))

    def predict(image: Tensor) -> tuple[Tensor, Tensor]:
        scores = class_scores(embed_image(image), classifier)
        best = torch.stack([scores[name] for name in names], 1).topk(kept)
        return best.indices, best.values[..., 0]  # NaN where any score is

    return over_split(predict, batches, own, total, world, "zero-shot")[0]


class Classified(NamedTuple):
    """Figures of a data set, and what the score z says of every image.

    scores: `<metric>_<score>` in percent by every score of `score_names`, with relatives of the
    metric. best int64 [N,K]: classes, best first. targets int64 [N] or [N,C]. by_class float64 [C]:
    see `class_figures`.
    """

    scores: dict[str, float]
    best: Tensor
    targets: Tensor
    by_class: Tensor


def classify(
    embed_image: Callable[[Tensor], Embeddings],
    classifier: Embeddings,
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
    metric: str,
    title: str = "images",
) -> Classified:
    """Classify every image of a data set by every score of `score_names`.

    batches: dicts of `image` and `target` of the images `own`, this process's part of all `total`
    (see over_split).
    """
    names = score_names(classifier)
    kept = min(KEPT, len(next(iter(classifier.values()))))

    def predict(image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        scores = class_scores(embed_image(image), classifier)
        stacked = torch.stack([scores[name] for name in names], 1)
        if metric in NEEDS_SCORES:
            return stacked, target
        best = stacked.topk(kept)
        return best.indices, target, best.values[..., 0]  # NaN where any score is

    found, targets, *_ = over_split(predict, batches, own, total, world, title)
    known = len(next(iter(classifier.values())))
    if targets.ndim == 1 and int(targets.max()) >= known:
        raise UserError(
            f"class {int(targets.max())} occurs, but the list of labels names {known} classes; extend it"
        )
    scores = by_score(names, lambda number: measure(metric, found[:, number], targets))
    by_z = found[:, names.index("z")]
    best = by_z.topk(kept).indices if metric in NEEDS_SCORES else by_z
    by_class = class_figures(metric, by_z if metric == "map11" else best, targets, known)
    return Classified(scores, best, targets, by_class)


def joined(side: Embeddings) -> Embeddings:
    """The embeddings, and of models with local projectors those of every ensemble: the inner
    product of joined rows is the weighted sum of the two."""
    side = dict(side)
    if "h" in side:
        for w in WEIGHTS:
            pair = [w**0.5 * side["z"], (1 - w) ** 0.5 * side["h"]]
            side[f"zh_{w}"] = torch.cat(pair, 1)
    return side


def choose_captions(
    image: Embeddings, text: Embeddings, example_images: Tensor, example_captions: Tensor
) -> dict[str, float]:
    """`text_acc_<score>` and others in percent (see `evaluation.compositional`), by every score.

    image, text: unit embeddings [M,E], [T,E] by name; which of them an example has, int64 [N,I] and
    [N,C].
    """
    images, texts = joined(image), joined(text)
    names = list(images)

    def measured(number: int) -> dict[str, float]:
        name = names[number]
        return choices(example_scores(images[name], texts[name], example_images, example_captions))

    return by_score(names, measured)


def retrieve(
    image: Embeddings, text: Embeddings, text_image: Tensor, world: World
) -> dict[str, float]:
    """`<recall>_<score>` in percent, both ways (see `evaluation.retrieval.recalls`), by every
    score.

    image, text: unit embeddings [I,E], [T,E] by name; text_image int64 [T]: the image of each text.
    """
    sides = []
    for side in (image, text):
        sides.append(joined({name: rows.to(world.device) for name, rows in side.items()}))
    names = list(sides[0])

    def measured(number: int) -> dict[str, float]:
        images, texts = (side[names[number]] for side in sides)
        return recalls(*best_of_both(images, texts, world), text_image)

    return by_score(names, measured)


def topk_accuracy(best: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`acc1_<name>` and `acc5_<name>` in percent of `best_classes` int64 [N,S,K], S `names` of the
    scores; labels int64 [N]."""
    hits = best == labels.view(-1, 1, 1)
    accuracy = {}
    for number, name in enumerate(names):
        accuracy[f"acc1_{name}"] = percent(hits[:, number, 0])
        accuracy[f"acc5_{name}"] = percent(hits[:, number].any(-1))
    return accuracy


def zero_shot_chance(metric: str, classes: int, targets: Tensor) -> float:
    """What guessing scores in percent; targets: as of `Classified`, which decide where it depends
    on how often a class occurs."""
    if metric == "map11":
        return random_map11(targets)
    top1 = 100 / classes
    top5 = 100 * min(5, classes) / classes
    known = {
        "acc1": top1,
        "mean_per_class": top1,
        "roc_auc": 50.0,
        "acc1_acc5": (top1 + top5) / 2,
    }
    return known[metric]


def zero_shot_accuracy(
    embed_image, classifier: Embeddings, batches, own, labels: Tensor, world: World
) -> dict:
    """Top-1 and top-5 accuracy in percent by every score, over all images; labels int64 [N] (see
    best_classes)."""
    best = best_classes(embed_image, classifier, batches, own, len(labels), world)
    return topk_accuracy(best, labels, score_names(classifier))


def word_probabilities(
    image: Tensor, text: Tensor, words: Sequence[str], scale: float
) -> list[tuple[str, float]]:
    """The words with the softmax over their scaled cosines to one image, likeliest first: image
    [1,E], text [T,E] (Radford et al. 2021, figure 3)."""
    cosines = F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1)[0].to(
        text.device
    )
    probability = (scale * cosines).softmax(0)
    order = probability.argsort(descending=True, stable=True).tolist()
    return [(words[i], probability[i].item()) for i in order]


def write_words(config, title: str, found: Sequence[tuple[str, float]]) -> None:
    """Print words with their probabilities beside chance, and write result/words.json below
    config.output_dir; rank 0 does."""
    if distributed.rank() != 0:
        return
    chance = 1 / len(found)
    print(f"{title}, {config.image}; chance {chance:.1%}")
    print(*(f"{probability:7.1%}  {word}" for word, probability in found), sep="\n")
    file = config.output_dir / "result/words.json"
    labels = [{"text": word, "probability": probability} for word, probability in found]
    about = {"checkpoint": str(config.checkpoint or config.model), "image": str(config.image)}
    write_json(file, {**about, "chance": chance, "words": labels}, indent=2)
    print(f"written: {file}", flush=True)
