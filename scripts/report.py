"""One self-contained HTML page of what a model learnt: table against chance, curves, gallery,
attention maps.

    python scripts/report.py --pretrain_dir output/quickstart/pretrain \\
        --retrieval_dir output/quickstart/retrieval --output report.html

retrieval_dir is what `Retrieval.py` wrote: result/metrics.json, result/config.yaml,
result/ranking_test.safetensors; it names checkpoint, annotations and images. With --finetuned_dir
its scores stand beside. No GPU, a few seconds.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from base.errors import UserError
from base.pixels import OPENAI, timm_statistics
from base.reading import read_json
from base.writing import write_text
from dataset.images.albef import TestTransform, resize
from dataset.images.decode import decode_image, reading
from dataset.sources.records import Records
from dataset.tasks.retrieval import RetrievalSet
from dataset.text.wordpiece import Tokenizer
from evaluation.report.attention_maps import merge_pieces, word_layer
from evaluation.report.images import heat_map
from evaluation.report.page import (
    card,
    figure,
    group,
    join,
    line_chart,
    page,
    quote,
    recall_table,
    thumbnail,
)
from evaluation.report.retrieval import load_rankings, retrieval_gallery
from evaluation.report.runs import read_log
from evaluation.retrieval import Ranking, chance
from models.fusion.grounding import token_maps
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script
from runtime.config.yaml import read_yaml

FILLERS = set(
    "a an the of on in at to and or is are with its it by from for this that there".split()
)


def is_telling(word: str) -> bool:
    """Whether a word of a caption is worth a map: no filler and no mark."""
    return word not in FILLERS and any(map(str.isalnum, word))


@dataclass
class Config:
    pretrain_dir: Path | None = knob(None, "run directory of Pretrain.py, for the curves")
    retrieval_dir: Path = knob(
        Path("output/Retrieval"), "output directory of Retrieval.py --evaluate"
    )
    finetuned_dir: Path | None = knob(
        None, "output directory of a fine-tuned Retrieval.py, for a row and its curves"
    )
    data: Path | None = knob(
        None, "folder with retrieval_test.json and its images; none = as retrieval_dir says"
    )
    output: Path = knob(Path("report.html"), "page to write")
    title: str = knob("Vision-language pre-training", "headline")
    cases: int = knob(4, "right and wrong queries shown, each way", low=1)
    images: int = knob(4, "images with attention maps", low=0)
    words: int = knob(8, "words mapped per image", low=1)
    layer: int | None = knob(
        None,
        "layer whose cross-attention is shown, from 0; none = at two thirds of the depth",
        low=0,
    )


def read_result(folder: Path) -> tuple[dict, dict]:
    """(metrics, configuration) that Retrieval.py left in `folder`. UserError where these are no
    scores of a test_file."""
    files = [folder / "result" / name for name in ("metrics.json", "config.yaml")]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; run Retrieval.py with --output_dir {folder} first"
            )
    metrics = read_json(files[0], dict)
    scores = metrics.get("test")
    if not isinstance(scores, dict) or "r_mean" not in scores:
        raise UserError(
            f"{folder}: no scores of a test_file by Retrieval.py; evaluate with --test_file"
        )
    return metrics, read_yaml(files[1])[0]


def timed_log(folder: Path | None) -> list[dict]:
    """Lines of log.jsonl with `minutes` of training added; empty where there is none."""
    path = folder / "log.jsonl" if folder else None
    if path is None or not path.is_file():
        return []
    lines = []
    minutes = 0.0
    before = 0
    for line in read_log(path):
        if "step" not in line:
            continue
        minutes += line.get("step_s", 0.0) * (line["step"] - before) / 60
        before = line["step"] if "step_s" in line else before
        lines.append({**line, "minutes": minutes})
    return lines


def points(lines: list[dict], name: str, x: str = "step") -> list[tuple[float, float]]:
    """The values of one quantity over x; what is no number (a NaN is written as text) is left
    out."""
    return [(line[x], line[name]) for line in lines if isinstance(line.get(name), (int, float))]


def curves(title: str, lines: list[dict], guess: dict[str, float]) -> str:
    """Charts of recalls where the log has them, of all losses, and of the learning rate."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    recalls = {}
    for way, found in (("txt", "captions"), ("img", "images")):
        for name in (n for n in names if re.fullmatch(rf"(.*_)?{way}_r1", n)):
            recalls[found] = points(lines, name, "minutes")
    charts = []
    if any(len(line) > 1 for line in recalls.values()):
        charts.append(
            line_chart(recalls, "recall@1 in %, by minutes", "minutes", ("chance", guess["img_r1"]))
        )
    losses = [name for name in names if name == "loss" or name.startswith("loss_")]
    charts += [
        line_chart({name: points(lines, name)}, name.replace("loss_", "loss: ")) for name in losses
    ]
    charts.append(line_chart({"lr": points(lines, "lr")}, "learning rate"))
    last = lines[-1]
    intro = f"{last['step']:,} updates in {last['minutes']:.1f} minutes of training. Each point is a mean since the last."
    return card(title, group("grid", charts), intro=intro)


def load_model(config: dict, checkpoint: str, tokenizer: Tokenizer) -> Retrieval:
    """The evaluated network, in eval mode on the CPU."""
    bert = read_json(config["bert_config"], dict)
    tower = config.get("vision_tower")
    bert |= {"encoder_width": config["vision_width"], "vocab_size": tokenizer.vocab_size}
    vit = ViTConfig(
        image_size=config["image_res"],
        patch_size=config["patch_size"],
        width=config["vision_width"],
        depth=config["vision_depth"],
        heads=config["vision_heads"],
        stem=tuple(config["vision_stem"]),
        tower=tower,
        pixels=timm_statistics(tower) if tower else OPENAI,
    )
    model = Retrieval(
        RetrievalConfig(
            vit=vit,
            bert=BertConfig.from_json(bert),
            embed_dim=config["embed_dim"],
            queue_size=0,
        )
    )
    start_from(model, read_weights(checkpoint), "retrieval")
    return model.eval()


def attention_section(
    model, tokenizer: Tokenizer, data: RetrievalSet, by_text: Ranking, config: Config
) -> str:
    """Maps for the words of captions that found their image."""
    depth = model.config.bert.num_hidden_layers
    first, last = model.config.bert.fusion_layer, depth - 2
    layer = word_layer(first, depth) if config.layer is None else config.layer
    if not first <= layer <= last:
        raise UserError(
            f"layer: {layer} does not tell words apart; choose {first}..{last}, or --images 0"
        )
    owner = torch.tensor(data.txt2img)
    found = (by_text.candidates[:, 0] == owner).nonzero().flatten()
    shown = min(config.images, len(found))
    found = found[torch.linspace(0, max(0, len(found) - 1), shown).long()]  # evenly among them
    rows = []
    for text in found.tolist():
        file = data.image_root / data.images[data.txt2img[text]]
        with reading(grey=True):  # one that cannot be read, as in the evaluation
            raw_image = decode_image(file)
        ids, mask = tokenizer([data.captions[text]], lengths=None)
        maps = token_maps(model, data.transform(raw_image)[None], ids, mask, layer)[0]
        merged = merge_pieces(ids[0].tolist(), maps, tokenizer.backend.id_to_token)
        words = [(word, heat) for word, heat in merged if is_telling(word)][: config.words]
        small = resize(raw_image, 192, 192)
        cells = [figure(thumbnail(small, 100), "image")]
        for word, heat in words:
            cells.append(figure(thumbnail(heat_map(small, heat), 100), word))
        rows.append(join(quote(data.written[text]), group("words", cells)))
    intro = (
        f"Cross-attention of layer {layer} from each word to the patches, times the positive part of its gradient for "
        "the matching score, averaged over heads; each map is scaled to its own maximum."
    )
    return card("Where the words look", *rows, intro=intro) if rows else ""


def order_of(metrics: dict, saved: dict) -> str:
    """What a run of Retrieval.py ordered its hits by."""
    if not metrics["k_test"]:
        return "ITC"
    score = "ITM + ITC" if saved.get("score") == "sum" else "ITM"
    return f"best {metrics['k_test']} of ITC re-ranked by {score}"


def main(config: Config) -> None:
    metrics, saved = read_result(config.retrieval_dir)
    test_file = Path(saved["test_file"])
    image_root = Path(saved["image_root"])
    if config.data:
        test_file = config.data / "retrieval_test.json"
        image_root = config.data
    data = RetrievalSet(
        Records(test_file), image_root, TestTransform(saved["image_res"]), saved["max_words"]
    )
    owner = torch.tensor(data.txt2img)
    tokenizer = Tokenizer(saved["text_encoder"])
    guess = chance(owner, len(data))
    file = config.retrieval_dir / "result/ranking_test.safetensors"
    rankings = load_rankings(file)
    if [len(ranking.candidates) for ranking in rankings] != [len(data), len(owner)]:
        raise UserError(f"{file}: of another list than {test_file}; evaluate again")
    rows = {f"this model, {order_of(metrics, saved)}": metrics["test"]}
    if config.finetuned_dir:
        rows |= {"fine-tuned": read_result(config.finetuned_dir)[0]["test"]}
    intro = f"{len(data)} unseen images, {len(owner)} captions; each is searched among all of the other kind."
    sections = [
        card(
            "Image-text retrieval",
            recall_table({**rows, "chance": guess}, len(rows) - 1),
            intro=intro,
        )
    ]
    for title, folder in (
        ("Pre-training", config.pretrain_dir),
        ("Fine-tuning", config.finetuned_dir),
    ):
        if lines := timed_log(folder):
            sections.append(curves(title, lines, guess))
    files = [image_root / name for name in data.images]
    sections.append(retrieval_gallery(files, data.written, owner, *rankings, config.cases))
    if config.images:
        model = load_model(saved, metrics["checkpoint"], tokenizer)
        sections.append(attention_section(model, tokenizer, data, rankings[1], config))
    write_text(
        config.output, page(config.title, sections, f"{metrics['checkpoint']} on {test_file}")
    )
    heads = ("captions R@1", "R@5", "images R@1", "R@5", "mean")
    keys = ("txt_r1", "txt_r5", "img_r1", "img_r5", "r_mean")
    print(f"{'recall in %':<24}" + "".join(f"{head:>14}" for head in heads))
    for name, row in {**rows, "chance": guess}.items():
        print(f"{name:<24}" + "".join(f"{row[key]:>14.1f}" for key in keys))
    print(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
