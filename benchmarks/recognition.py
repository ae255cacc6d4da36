"""Speed of NXTP with 51.5M parameters: labels a second, and a training step, ours and the
original's.

    python -m benchmarks.recognition                                        # ours alone, all cases
    python -m benchmarks.recognition --peer PATH/TO/nxtp                    # against a checkout, alternating
    python -m benchmarks.recognition --peer PATH --cases train --steps 3

Cases: `1` and `8`, the top 20 labels of so many images, cut off at three tokens (two and a
delimiter); `1-limit`, the same with nineteen tokens, as of weights that never end a label; `train`,
a step of four images with five labels each.
The network is random: image tower 256 wide, 6 blocks, 256 image tokens of 224 px; decoder 512 wide,
4 blocks, 32,002 tokens. The original's own functions run with equal weights, and its labels and
losses are compared with ours. It pads texts to 512 positions and computes the caption's branch,
whose weight is 0. --precision is that of our training step.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import nxtp_inputs as inputs
from benchmarks.gauge import measure
from benchmarks.runner import (
    OURS,
    Side,
    TrainOptions,
    check_peer,
    device_of,
    load_at_start,
    take_turns,
)
from benchmarks.steps import training_step
from benchmarks.table import MEMORY, markdown, median, publish, ratio
from dataset.tasks.recognition import Sequences, pad_batch
from models.layers.llama import LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.recognition.decoding import one_shot
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.nxtp import trained_names
from runtime.config.cli import knob, run_script
from runtime.optim.build import Optimizer

PEER = "original"
CASES = {  # images, tokens of a label
    "1": (1, 3),
    "8": (8, 3),
    "1-limit": (1, 19),
    "train": (0, 0),
}


@dataclass
class Config(TrainOptions):
    """What to measure."""

    cases: list[str] = knob(["1", "8", "train"], "cases to measure", choices=tuple(CASES))
    labels: int = knob(20, "labels of an image", low=1)
    batch: int = knob(4, "images of a training step", low=1)
    compat: str = knob(
        "original", "ours: none = also the last label sees itself", choices=("none", "original")
    )


def build_model(options: SimpleNamespace) -> Nxtp:
    """The network with random weights, or those that the peer left, on the device."""
    sizes = inputs.sizes_of(options)
    tower = OpenAIConfig(
        embed_dim=sizes.dim,
        image_size=inputs.SIDE,
        vision_width=sizes.vision_width,
        vision_layers=sizes.vision_layers,
        patch_size=inputs.PATCH,
    )
    llama = LlamaConfig(
        dim=sizes.dim,
        n_layers=sizes.layers,
        n_heads=sizes.heads,
        vocab_size=inputs.Words.vocab_size,
        multiple_of=sizes.multiple_of,
    )
    model = Nxtp(NxtpConfig(tower, llama, trained_rows=(inputs.IMAGE,)))
    saved = Path(options.exchange) / "weights.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved, weights_only=True, mmap=True))
    return model.to(options.device)


def label(options: SimpleNamespace) -> dict:
    """Top labels of images; `tokens` [images][labels] are their ids."""
    torch.manual_seed(0)
    model = build_model(options).eval()
    words = inputs.Words()
    prompt = [inputs.IMAGE, words.bos, *words.encode(inputs.PROMPT)]
    prompt = torch.tensor(prompt, device=options.device)
    images = inputs.images(options.images).to(options.device)
    tokens = []

    def step() -> None:
        with torch.inference_mode():
            drafts = one_shot(
                model,
                model.encode_image(images),
                prompt,
                inputs.COMMA,
                options.labels,
                options.tokens,
            )
        tokens[:] = [[row[0] for row in drafts.rows(i)] for i in range(len(images))]

    result = measure(step, options)
    result["tokens"] = tokens
    return result


class LabelLoss(nn.Module):
    """NXTP under its only loss with a weight, 0-d."""

    def __init__(self, model: Nxtp):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch)["loss_objs"]


def train(options: SimpleNamespace) -> dict:
    """A training step; `loss` is the first one's."""
    torch.manual_seed(0)
    model = build_model(options)
    words = inputs.Words()
    sequences = Sequences(
        words, inputs.LENGTH - 256, many_prompts=False, original=options.compat == "original"
    )
    texts = []
    for caption in inputs.captions(options.batch):
        texts.append(sequences.labels(inputs.labels_of(caption), inputs.PROMPT))
    batch = pad_batch(texts, words.pad)
    batch["image"] = inputs.images(options.batch)
    trained = trained_names([name for name, _ in model.named_parameters()], inputs.TRAINED_BLOCKS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    adamw = Optimizer(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    return training_step(LabelLoss(model), batch, adamw, options)


def agreement(ours: dict, theirs: dict) -> str:
    """Whether both sides found the same, in words."""
    if "loss" in ours:
        return f"first loss {ours['loss']:.6f} and {theirs['loss']:.6f}"
    mine = [tokens for image in ours["tokens"] for tokens in image]
    others = [tokens for image in theirs["tokens"] for tokens in image]
    same = sum(a == b for a, b in zip(mine, others, strict=True))
    return f"{same} of {len(mine)} labels alike"


def row(case: str, results: dict[str, list[dict]], config: Config) -> list[str]:
    """Cells of one case."""
    if case == "train":
        cells = [f"training step, {config.batch} images"]
        count = config.batch
    else:
        cells = [f"top {config.labels}, case {case}"]
        count = CASES[case][0] * config.labels
    for side, runs in results.items():
        seconds = median(runs, "seconds")
        cells += [f"{seconds:.2f}", f"{median(runs, 'cpu_seconds'):.2f}"]
        cells += [f"{count / seconds:.1f}", MEMORY.cell(results, side)]
    if PEER in results:
        cells.append(f"{ratio(results, PEER, 'seconds'):.1f} x")
        cells.append(f"{ratio(results, PEER, 'cpu_seconds'):.1f} x")
        cells.append(agreement(results[OURS][0], results[PEER][0]))
    return cells


def measure_case(case: str, config: Config, folder: str) -> dict[str, list[dict]]:
    """Both sides' measurements, the original's first: it leaves the weights."""
    what = "train" if case == "train" else "label"
    sides = [Side(OURS, f"benchmarks.recognition:{what}")]
    if config.peer:
        sides.insert(0, Side(PEER, f"benchmarks.peers.nxtp:{what}", original=True))
    images, tokens = CASES[case]
    return take_turns(config, sides, exchange=folder, images=images, tokens=tokens)


def main(config: Config) -> None:
    check_peer(config, "src/decoding.py", "NXTP", one_size=False)
    load = load_at_start(config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in config.cases:
            rows.append(row(case, measure_case(case, config, folder), config))
    head = [""]
    for side in [OURS, PEER] if config.peer else [OURS]:
        for figure in ("s", "CPU s", "labels or images/s", "peak"):
            head.append(f"{side}: {figure}")
    if config.peer:
        head += ["by the clock", "by CPU time", "agreement"]
    title = ["Recognition"]
    if not config.tiny:
        title.append("51.5M parameters")
    title += [*config.cases, config.precision, device_of(config)]
    if config.peer:
        title.append("against the original")
    publish(config, "recognition", title, markdown(head, rows), load)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
