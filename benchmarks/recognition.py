"""Speed of NXTP with 51.5M parameters: labels a second, and a training step.

    python -m benchmarks.recognition                                      # ours alone, all cases
    python -m benchmarks.recognition --peer PATH/TO/nxtp                  # against a checkout
    python -m benchmarks.recognition --peer PATH --cases train --steps 3

Cases: `1` and `8`, the top 20 labels of so many images, cut off at three tokens (two and a
delimiter); `train`, a step of four images with five labels each. The network is random: image tower
256 wide, 6 blocks, 256 image tokens of 224 px; decoder 512 wide, 4 blocks, 32,002 tokens.
The original's own functions run with equal weights, and its labels and losses are compared with
ours. It pads texts to 512 positions and computes the caption's branch, whose weight is 0.
--precision is that of both training steps.
"""

import itertools
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import nxtp_inputs as inputs
from benchmarks.gauge import measure
from benchmarks.inputs import PEER_FILE, left
from benchmarks.runner import OURS, PEER, TrainOptions, check_peer, device_of, take_turns
from benchmarks.steps import training_step
from benchmarks.table import MEMORY, Column, publish
from dataset.tasks.recognition import Sequences, pad_batch
from models.layers.llama import LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.recognition.decoding import one_shot
from models.recognition.nxtp import Nxtp, NxtpConfig
from runtime.config.cli import knob, run_script
from runtime.optim.build import Optimizer

CASES = {"1": 1, "8": 8, "train": 0}  # images labelled
COLUMNS = [
    Column("seconds", "seconds"),
    Column("CPU seconds", "cpu_seconds"),
    Column("labels or images/s", "rate", "{:.1f}"),
    MEMORY,
    Column("ours is faster by", "seconds", "{:.1f} x", ratio="lower"),
    Column("by CPU time", "cpu_seconds", "{:.1f} x", ratio="lower"),
    Column("as ours", "agreement"),
]


@dataclass
class Config(TrainOptions):
    """What to measure."""

    cases: list[str] = knob(list(CASES), "cases to measure", choices=tuple(CASES))
    labels: int = knob(20, "labels of an image", low=1)
    batch: int = knob(4, "images of a training step", low=1)


def build_model(options: SimpleNamespace) -> Nxtp:
    """The network with random weights, or those that the peer left, on the device."""
    torch.manual_seed(0)
    width, blocks, decoder = inputs.sizes_of(options)
    tower = OpenAIConfig(
        embed_dim=decoder["dim"],
        image_size=inputs.SIDE,
        vision_width=width,
        vision_layers=blocks,
        patch_size=inputs.PATCH,
    )
    llama = LlamaConfig(vocab_size=inputs.Words.vocab_size, **decoder)
    model = Nxtp(NxtpConfig(tower, llama, trained_rows=(inputs.IMAGE,)))
    weights = left(options, PEER_FILE)
    if weights:
        model.load_state_dict(weights)
    return model.to(options.device)


def label(options: SimpleNamespace) -> dict:
    """Top labels of images; `tokens` [images][labels] are their ids."""
    model = build_model(options).eval()
    words = inputs.Words()
    prompt = [inputs.IMAGE, words.bos, *words.encode(inputs.PROMPT)]
    prompt = torch.tensor(prompt, device=options.device)
    images = inputs.images(options.images).to(options.device)
    tokens = []

    @torch.inference_mode()
    def step() -> None:
        seen = model.encode_image(images)
        drafts = one_shot(model, seen, prompt, inputs.COMMA, options.labels, inputs.LABEL_TOKENS)
        tokens[:] = [[row[0] for row in drafts.rows(i)] for i in range(len(images))]

    return {**measure(step, options), "tokens": tokens}


def train(options: SimpleNamespace) -> dict:
    """A training step; `loss` is the first one's."""
    model = build_model(options)
    words = inputs.Words()
    sequences = Sequences(words, inputs.LENGTH - 256, many_prompts=False, original=True)
    texts = []
    for caption in inputs.captions(options.batch):
        texts.append(sequences.labels(inputs.labels_of(caption), inputs.PROMPT))
    batch = pad_batch(texts, words.pad)
    batch["image"] = inputs.images(options.batch)
    inputs.freeze(model)

    def loss_of(losses: dict) -> Tensor:
        return losses["loss_objs"]  # the only one with a weight

    adamw = Optimizer(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    return training_step(model, batch, loss_of, adamw, options)


def agreement(ours: dict, theirs: dict) -> str:
    """Whether both sides found the same, in words."""
    if "loss" in ours:
        return f"first loss {ours['loss']:.6f} and {theirs['loss']:.6f}"
    mine = [tokens for image in ours["tokens"] for tokens in image]
    others = [tokens for image in theirs["tokens"] for tokens in image]
    same = sum(a == b for a, b in zip(mine, others, strict=True))
    return f"{same} of {len(mine)} labels alike"


def add_figures(results: dict[str, list[dict]], count: int) -> None:
    """Add the `rate` of so many labels or images, and `agreement` to the original's results."""
    for run in itertools.chain(*results.values()):
        run["rate"] = count / run["seconds"]
    if PEER in results:
        results[PEER][0]["agreement"] = agreement(results[OURS][0], results[PEER][0])


def main(config: Config) -> None:
    check_peer(config, "src/decoding.py", "NXTP", one_size=False)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in config.cases:
            images = CASES[case]
            what = "label" if images else "train"
            # the original first: it leaves the weights
            sides = {PEER: f"benchmarks.peers.nxtp:{what}"} if config.peer else {}
            sides[OURS] = f"benchmarks.recognition:{what}"
            found = take_turns(config, sides, exchange=folder, images=images)
            add_figures(found, images * config.labels or config.batch)
            name = f"top {config.labels}, case {case}"
            if case == "train":
                name = f"training step, {config.batch} images"
            results |= {f"{name}: {side}": runs for side, runs in found.items()}
    title = ["Recognition"] + ["51.5M parameters"] * (not config.tiny)
    title += [*config.cases, config.precision, device_of(config)]
    title += ["against the original"] * bool(config.peer)
    publish(config, "recognition", title, results, COLUMNS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
