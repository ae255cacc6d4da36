"""Visual grounding without boxes in training (RefCOCO+) with SIMLA or ALBEF: where is what the text says?

    train       torchrun Grounding.py --config configs/Grounding/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 Grounding.py --config configs/Grounding/refcoco.yaml --checkpoint ALBEF.pth
    evaluate    python Grounding.py --config configs/Grounding/refcoco.yaml --checkpoint refcoco.pth --evaluate
                --gradcam_mode itm --block_num 8

Training sees images and expressions only, as in retrieval: contrast (ITA) and matching (ITM). Evaluation makes a
Grad-CAM map of each expression, from the cross-attention of a text layer (itm) or from what [CLS] attends to in a block
of the vision transformer (itc), and picks the detected box with most heat for its size; a box is right where its IoU
with the annotated one is at least 0.5. The pointing game asks whether the map's maximum lies inside the annotated box.

Published, val / testA / testB, itm at layer 8, 14M images: ALBEF 58.5 / 65.9 / 46.3. Results: result/metrics.json with
chance beside it, result/report.html with heat maps and boxes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from base import distributed
from base.errors import UserError
from base.files import read_json
from dataset.images.decode import check_image_root, decode_image
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.tasks.grounding import ReferringExpressions
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.retrieval import RetrievalCollate, RetrievalPair, number_images
from dataset.text.wordpiece import TextCollate, Tokenizer
from evaluation.grounding import Pointing, enlarge, grounding_accuracy, point_all
from evaluation.predict import over_split
from evaluation.report.examples import box_case, gallery
from evaluation.report.page import card, score_table, table
from evaluation.report.results import write_results
from models.fusion.config import networks
from models.fusion.grounding import contrast_map, matching_map
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run, section
from runtime.finetune import FineTuneConfig, FineTuning, prepare
from runtime.optim.build import Optimizer, Precision
from runtime.parallel import parallelize
from runtime.safe_pickle import load_plain


@dataclass
class Config(FineTuneConfig):
    """Weakly supervised grounding."""

    output_dir: Path = knob(Path("output/Grounding"), "folder of this run: log, checkpoints, result/")
    train_file: list[Path] = knob([], "expressions to train on: {image, text}")
    test_file: list[Path] = knob([], "expressions to find: {image, text, ref_id}")
    image_root: Path = knob(Path("."), "folder that image paths start from")
    refcoco_data: Path | None = knob(None, "folder that holds refcoco+/refs(unc).p and refcoco+/instances.json")
    det_file: Path | None = knob(None, "detected boxes [x, y, w, h] by image_id (JSON)")
    coco_file: Path | None = knob(None, "accepted from old configurations, not needed")
    gradcam_mode: str = knob("itm", "where maps come from: matching or contrast", choices=("itm", "itc"))
    block_num: int = knob(8, "text layer (itm) or block of the vision transformer (itc) that maps come from", low=0)
    temp: float = knob(0.07, "initial temperature without a checkpoint", low=0.001, high=0.5)
    batch_size_train: int = knob(32, "pairs per process and micro-batch", low=2, aliases=("batch_size",))
    crop_scale: tuple[float, float] | None = knob(None, "range of the random crop's share; none = whole image")
    flip: bool = knob(
        False, "mirror half of the training images, as the originals do though texts say left and right"
    )
    optimizer: Optimizer = section(Optimizer, lr=1e-5)


def build_model(config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The retrieval network on the CPU, with random weights."""
    space = (config.embed_dim, config.queue_size, config.temp, config.distill, config.compat)
    return Retrieval(RetrievalConfig(*networks(config, tokenizer.vocab_size), *space))


def training_data(config: Config, world, tokenizer: Tokenizer, longest: int, state: dict | None) -> StreamLoader:
    """Endless batches of this process. Expressions about one image, told by its file name, are no negatives."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate to ground with a checkpoint")
    records = Records(config.train_file, ("image", "text"))
    check_image_root(config.image_root, (records[i]["image"] for i in range(min(10, len(records)))))
    numbers = number_images(record["image"].rsplit("/", 1)[-1] for record in records)
    pair = RetrievalPair(training_view(config), config.image_root, numbers, config.max_words, field="text")
    sources = [RecordSource(records, pair, "train_file")]
    return train_loader(sources, RetrievalCollate(tokenizer, longest), config, world, state)


def test_data(config: Config) -> ReferringExpressions | None:
    """The expressions to find, with their boxes."""
    if not config.test_file:
        return None
    if config.refcoco_data is None or config.det_file is None:
        raise UserError("test_file needs refcoco_data (refs and annotations) and det_file (detected boxes)")
    folder, content = config.refcoco_data / "refcoco+", []
    for file in (folder / "instances.json", config.det_file):
        content.append(read_json(file, dict, "check refcoco_data and det_file"))
    records, refs = Records(config.test_file, ("image", "text", "ref_id")), load_plain(folder / "refs(unc).p")
    data = ReferringExpressions(records, refs, *content, config.image_root, test_view(config), config.max_words)
    check_image_root(config.image_root, data.images)
    return data


def locate(
    model: Retrieval, data: ReferringExpressions, tokenizer: Tokenizer, config: Config, world, precision: Precision
) -> tuple[torch.Tensor, list[Pointing]]:
    """Maps float32 [R,g,g] of all expressions and what they point to, the same on every process."""
    make_map = {"itm": matching_map, "itc": contrast_map}[config.gradcam_mode]
    training, (own, batches) = model.training, split_loader(data, TextCollate(tokenizer), config, world)

    def predict(image, text_ids, text_mask):
        return (make_map(model, image, text_ids, text_mask, config.block_num),)

    model.eval()
    with precision.autocast():
        (maps,) = over_split(predict, batches, own, len(data), world, "grounding")
    model.train(training)
    return maps, point_all(maps, data.targets, data.boxes, world)


def scores(found: list[Pointing], data: ReferringExpressions) -> dict[str, dict[str, float]]:
    """Accuracy, pointing game and chance in percent by split."""
    return grounding_accuracy(found, [target.split for target in data.targets])


def train(config: Config, world, model: Retrieval, tokenizer: Tokenizer, data, precision) -> Path:
    """Train; the checkpoint with the best accuracy on the split val, where there is one, else the last."""
    tuning, longest = FineTuning(config, world, metric="accuracy"), model.config.bert.max_position_embeddings
    loader = training_data(config, world, tokenizer, longest, tuning.data_state())
    model = parallelize(model, world, config).train()
    teacher = MomentumPairs(model, config.momentum)
    tuning.begin("Weakly supervised grounding", model, loader, precision)
    validates = data is not None and any(target.split == "val" for target in data.targets)
    for alpha in tuning:
        teacher.update()
        tuning.learn(lambda batch, alpha=alpha: model(**batch, alpha=alpha))
        if validates and tuning.validation_due:
            network = tuning.network(lambda: build_model(config, tokenizer))
            _, found = locate(network, data, tokenizer, config, world, precision)
            tuning.keep(scores(found, data)["val"])
    return tuning.result


def report(data: ReferringExpressions, maps: torch.Tensor, found: list[Pointing]) -> list[str]:
    """The table of splits, and heat maps over images with the detected, chosen (thick) and true (dashed) boxes."""
    splits = scores(found, data).items()
    accuracy = [(f"{split}, {s['expressions']} expressions", s["accuracy"], s["chance"]) for split, s in splits]
    pointing = ([split, f"{s['pointing']:.1f}"] for split, s in splits)
    right = torch.tensor([result.iou >= 0.5 for result in found])

    def case(i: int) -> str:
        target, result, image = data.targets[i], found[i], decode_image(data.file(i))
        heat, boxes = enlarge(maps[i], *image.shape[1:]), data.boxes[i]
        return box_case(image, heat, data.texts[i], boxes, result.box, target.box, result.iou)

    tables = score_table(["the chosen box has IoU >= 0.5, in %", "accuracy", "a box at random"], accuracy, None)
    game = table(["the map's maximum lies in the true box, in %", "pointing game"], pointing)
    intro = "Thin: detected boxes. Thick: the chosen one, green where right. Dashed: the true one."
    return [card("Accuracy", tables, game), gallery("Found", right, case, intro=intro)]


def main(config: Config) -> None:
    world, weights, precision = prepare(config)
    if config.evaluate and not config.test_file:
        raise UserError("--evaluate needs test_file")
    data, tokenizer = test_data(config), Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer)
    left_out = start_from(model, weights, "retrieval") if weights else None
    if world.is_main and left_out is not None:
        print(f"{config.checkpoint}:", left_out.text(), sep="\n", flush=True)
    if not config.evaluate:
        config.checkpoint = train(config, world, model, tokenizer, data, precision)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "retrieval")
    if data is not None:
        maps, found = locate(model.to(world.device), data, tokenizer, config, world, precision)
        if world.is_main:
            metrics = {"gradcam_mode": config.gradcam_mode, "block_num": config.block_num, **scores(found, data)}
            write_results(config, "Visual grounding", metrics, report(data, maps, found))
    distributed.shutdown()


if __name__ == "__main__":
    run(main, Config, __doc__)
