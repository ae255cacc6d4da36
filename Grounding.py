"""Visual grounding (RefCOCO+) with SIMLA or ALBEF, trained without boxes.

    train       torchrun Grounding.py --config configs/Grounding/digitscenes.yaml
    8 GPUs      torchrun --nproc_per_node=8 Grounding.py --config configs/Grounding/refcoco.yaml \\
                    --checkpoint ALBEF.pth
    evaluate    python Grounding.py --config configs/Grounding/refcoco.yaml \\
                    --checkpoint refcoco.pth --evaluate --gradcam_mode itm --block_num 8

Training sees images and expressions only, as in retrieval: contrastive loss (ITA) and matching
(ITM). Evaluation makes a Grad-CAM map of each expression, from the cross-attention of a text layer
(itm) or from what [CLS] attends to in a block of the vision transformer (itc), and picks the
detected box with most heat for its size; a box is right if its IoU with the annotated one is at
least 0.5. The pointing game asks whether the map's maximum lies inside the annotated box.

Published, val / testA / testB, itm at layer 8, 14M images: ALBEF 58.5 / 65.9 / 46.3. Results:
result/metrics.json with chance beside it, result/report.html with heat maps and boxes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base.errors import UserError
from base.reading import read_json
from dataset.images.decode import check_image_root, decode_image, reading
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.tasks.expressions import refs_file
from dataset.tasks.grounding import ReferringExpressions, read_detections, referred_boxes
from dataset.tasks.loaders import split_loader, test_view, train_loader, training_view
from dataset.tasks.retrieval import RetrievalCollate, RetrievalPair, number_images
from dataset.text.wordpiece import Tokenizer, WholeTexts
from evaluation.grounding import Pointing, choosing_metric, enlarge, grounding_accuracy, point_all
from evaluation.predict import over_split
from evaluation.report.examples import box_case, gallery
from evaluation.report.page import card, score_table
from evaluation.report.results import write_results
from models.fusion.config import retrieval_config
from models.fusion.grounding import check_layer, contrast_map, matching_map
from models.fusion.momentum import MomentumPairs
from models.fusion.retrieval import Retrieval
from models.weights.albef import check_kind, start_from, start_task
from runtime.checkpoint import read_weights
from runtime.config.cli import knob, run_script, section
from runtime.config.fusion import FineTuneConfig, Start, prepare
from runtime.optim.build import Optimizer, set_learning_rate
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run
from runtime.safe_pickle import load_plain


@dataclass
class Config(FineTuneConfig):
    """Weakly supervised grounding."""

    output_dir: Path = knob(Path("output/Grounding"), "this run: log, checkpoints, result/")
    train_file: list[Path] = knob([], "expressions to train on: {image, text}")
    test_file: list[Path] = knob([], "expressions to find: {image, text, bbox}, or with ref_id")
    image_root: Path = knob(Path("."), "folder that image paths start from")
    refcoco_data: Path | None = knob(
        None, "REFER's folder with refs(unc).p and instances.json, or the one above refcoco+"
    )
    det_file: Path | None = knob(
        None, "detected boxes [x, y, w, h] by image_id (JSON); none = the annotated boxes"
    )
    gradcam_mode: str = knob(
        "itm", "maps from ITM's cross-attention or from ITC's [CLS]", choices=("itm", "itc")
    )
    block_num: int = knob(
        8, "text layer (itm) or block of the vision transformer (itc) that maps come from", low=0
    )
    temp: float = knob(0.07, "initial temperature without a checkpoint", low=0.001, high=0.5)
    batch_size_train: int = knob(
        32, "pairs per process and micro-batch", low=2, aliases=("batch_size",)
    )
    crop_scale: tuple[float, float] | None = knob(
        None, "area of the random crop, as a fraction of the image; none = whole", low=0, high=1
    )
    flip: bool = knob(
        False, "horizontal flip, probability 0.5, as the originals do; texts say left and right"
    )
    optimizer: Optimizer = section(Optimizer, flat=True, lr=1e-5)
    text_fields = ("text",)  # that `text_encoder: trained` learns from
    OF_CHECKPOINT = ("gradcam_mode", "block_num")


def build_model(config: Config, tokenizer: Tokenizer) -> Retrieval:
    """The retrieval network on the CPU, with random weights."""
    return Retrieval(retrieval_config(config, tokenizer.vocab_size))


def training_data(config: Config, tokenizer, longest: int, world, state) -> StreamLoader:
    """Endless batches of this process, from the position `state` on. Expressions about one image,
    known by its file name, are no negatives of each other."""
    if not config.train_file:
        raise UserError("train_file: none is given; give one, or --evaluate a checkpoint")
    records = Records(config.train_file, ("image", "text"))
    check_image_root(config.image_root, (record["image"] for record in records))
    names = (record["image"].replace("\\", "/") for record in records)
    image_ids = number_images(name.rsplit("/", 1)[-1] for name in names)
    view = training_view(config)
    pair = RetrievalPair(view, config.image_root, image_ids, config.max_words, field="text")
    sources = [RecordSource(records, pair, "train_file")]
    return train_loader(sources, RetrievalCollate(tokenizer, longest), config, world, state)


def test_data(config: Config) -> ReferringExpressions | None:
    """The expressions to find, with their boxes."""
    if not config.test_file:
        return None
    known_by = "ref_id" if config.refcoco_data else "bbox"
    records = list(Records(config.test_file, ("image", "text", known_by)).complete())
    check_image_root(config.image_root, [record["image"] for record in records])
    if config.refcoco_data:
        refs_at = refs_file(config.refcoco_data)
        refs = load_plain(refs_at)
        instances = read_json(refs_at.with_name("instances.json"), dict, "check refcoco_data")
    else:
        records, refs, instances = referred_boxes(records, config.image_root)
    boxes = read_detections(config.det_file, instances)
    return ReferringExpressions(
        records, refs, instances, boxes, config.image_root, test_view(config), config.max_words
    )


def train_step(model, teacher, next_batch, alpha, config: Config, precision) -> dict[str, Tensor]:
    """Gradients of one update: the teacher first, as in retrieval. Boxes play no part. Returns the
    losses, 0-d means over the micro-batches."""
    teacher.update()
    total = {}
    for micro in range(config.accumulate):
        batch = next_batch()
        with gradient_sync(model, last=micro == config.accumulate - 1), precision.autocast():
            losses = model(**batch, alpha=alpha)
            loss = losses["loss_ita"] + losses["loss_itm"]
        precision.backward(loss / config.accumulate)
        for name, value in {"loss": loss, **losses}.items():
            total[name] = total.get(name, 0) + value.detach() / config.accumulate
    return total


def locate(
    model: Retrieval, data: ReferringExpressions, tokenizer: Tokenizer, config: Config, start: Start
) -> tuple[Tensor, list[Pointing], dict[str, int]]:
    """Maps float32 [R,g,g] of all expressions, what they point to, and damaged images, the same on
    every process. Grad-CAM needs gradients: the network is in eval mode, but autograd stays on.
    """
    make_map = {"itm": matching_map, "itc": contrast_map}[config.gradcam_mode]
    own, batches = split_loader(data, WholeTexts(tokenizer, model.positions), config, start.world)

    def predict(image: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor]:
        return (make_map(model, image, text_ids, text_mask, config.block_num),)

    training = model.training
    model.eval()
    with start.precision.autocast():
        (maps,) = over_split(predict, batches, own, len(data), start.world, "grounding")
    model.train(training)
    return maps, point_all(maps, data.targets, data.boxes, start.world), batches.damages()


def scores(found: list[Pointing], data: ReferringExpressions) -> dict[str, dict[str, float]]:
    """Accuracy, pointing game and chance in percent by split."""
    return grounding_accuracy(found, [target.split for target in data.targets])


def train(model: Retrieval, data: ReferringExpressions | None, tokenizer, config, start) -> Path:
    """Train; returns the checkpoint to test: the best on the split val, else the last."""
    metric = None if data is None else choosing_metric(data.targets, data.boxes)
    run = Run(config, start.world, metric=metric)
    longest = model.config.bert.max_position_embeddings
    loader = training_data(config, tokenizer, longest, start.world, run.data_state())
    title = "Weakly supervised grounding"
    model, optimizer, plan = run.begin(title, model, loader, start.precision)
    teacher = MomentumPairs(model, config.momentum)

    if run.validation_due(run.step):  # resumed after a kill in a validation
        _, found, damages = locate(whole_model(model), data, tokenizer, config, start)
        run.keep_best(scores(found, data)["val"] | damages, run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        alpha = torch.full((), config.alpha_at(step, plan), device=start.world.device)
        losses = train_step(model, teacher, run.next_batch, alpha, config, start.precision)
        grad_norm = start.precision.step(optimizer, model.parameters())
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            _, found, damages = locate(whole_model(model), data, tokenizer, config, start)
            run.keep_best(scores(found, data)["val"] | damages, step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()


def report(data: ReferringExpressions, maps: Tensor, found: list[Pointing], by_split) -> list[str]:
    """The table of splits, and heat maps over images with the detected, chosen (thick) and true
    (dashed) boxes."""
    accuracy = []
    pointing = []
    for split, score in by_split.items():
        name = f"{split}, {score['expressions']} expressions"
        accuracy.append((name, score["accuracy"], score["chance"]))
        pointing.append((split, score["pointing"], score["pointing_chance"]))
    right = torch.tensor([result.iou >= 0.5 for result in found])

    def case(i: int) -> str:
        image = decode_image(data.file(i))
        heat = enlarge(maps[i], *image.shape[1:])
        best, true = found[i], data.targets[i]
        return box_case(image, heat, data.written[i], data.boxes[i], best.box, true.box, best.iou)

    head = ["the chosen box has IoU >= 0.5, in %", "accuracy", "a box at random"]
    game = ["the map's maximum lies in the true box, in %", "pointing game", "a pixel at random"]
    intro = "Thin: detected boxes. Thick: the chosen one, green where right. Dashed: the true one."
    return [
        card("Accuracy", score_table(head, accuracy, None), score_table(game, pointing, None)),
        gallery("Found", right, case, intro=intro),
    ]


def main(config: Config) -> None:
    if config.evaluate and not config.test_file:
        raise UserError("--evaluate needs test_file: the expressions to find")
    start = prepare(config)
    check_kind(start.weights, "retrieval")
    data = test_data(config)
    tokenizer = Tokenizer(config.text_encoder)
    model = build_model(config, tokenizer)
    check_layer(model, config.gradcam_mode, config.block_num)
    start_task(model, start.weights, "retrieval", config.checkpoint)
    if not config.evaluate:
        config.checkpoint = train(model, data, tokenizer, config, start)
        model = build_model(config, tokenizer)
        start_from(model, read_weights(config.checkpoint), "retrieval")
    if data is None:
        return
    maps, found, damages = locate(model.to(start.world.device), data, tokenizer, config, start)
    by_split = scores(found, data)
    metrics = {"gradcam_mode": config.gradcam_mode, "block_num": config.block_num, **by_split}
    metrics |= damages
    if start.world.is_main:
        with reading(config.exif, grey=True):  # images as the network saw them
            sections = report(data, maps, found, by_split)
        write_results(config, "Visual grounding", metrics, sections)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
