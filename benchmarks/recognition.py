"""Speed of NXTP with 51.5M parameters: labels a second, and a training step.

    python -m benchmarks.recognition                                      # ours alone, all cases
    python -m benchmarks.recognition --peer PATH/TO/nxtp                  # against a checkout
    python -m benchmarks.recognition --peer PATH --cases train --steps 3

Cases: `1` and `8`, the top 20 labels of so many images, cut off at three tokens (two and a
delimiter); `train`, a step of four images with five labels each. The network is random: image tower
256 wide, 6 blocks, 256 image tokens of 224 px; decoder 512 wide, 4 blocks, 32,002 tokens.
The original's own functions run with equal weights, in training under our loop and optimizer, and
its labels and losses are compared with ours. It pads texts to 512 positions and computes the
caption's branch, whose weight is 0. --precision is that of both training steps.
"""

import itertools
import re
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.child import measure
from benchmarks.inputs import left
from benchmarks.runner import OURS, PEER, TrainOptions, check_peer, device_of, take_turns
from benchmarks.steps import training_step
from benchmarks.table import MEMORY, Column, publish
from dataset.tasks.recognition import Sequences, pad_batch
from models.layers.llama import LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.recognition.decoding import one_shot
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.nxtp import trained_names
from runtime.config.cli import knob, run_script
from runtime.optim.build import Optimizer

SIDE, PATCH = 224, 14  # pixels; 256 image tokens
PIECES, IMAGE, EMPTY = 32000, 32000, 32001
COMMA = 29892
KNOWN = {"<|image|>": IMAGE, ",": COMMA, "are": 526}  # ids of words, LLaMA's of the last two
PROMPT = "The objects in the image are"
LENGTH = 512  # positions of the original's sequences, image tokens included
LABEL_TOKENS = 3  # that a label is cut off at
TRAINED_BLOCKS = 2  # of the image tower, the last ones
ADAMW = Optimizer(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
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
    cases: list[str] = knob(list(CASES), "cases to measure", choices=tuple(CASES))
    labels: int = knob(20, "labels of an image", low=1)
    batch: int = knob(4, "images of a training step", low=1)


# ---- inputs and what is trained, equal for both sides
class Words:
    """Stands in for LLaMA's tokenizer: an id a word, two for labels, which have a digit in them."""

    bos_id = bos = 1
    eos_id = eos = 2
    pad_id, pad, image, delimiter = -1, EMPTY, IMAGE, COMMA
    vocab_size = PIECES + 2

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [self.bos] if bos else []
        for word in re.findall(r"<\|image\|>|,|[^\s,]+?(?=<|,|\s|$)", text):
            if word in KNOWN:
                ids.append(KNOWN[word])
                continue
            parts = (word, f"{word}-") if re.search(r"\d", word) else (word,)
            ids += [1000 + zlib.crc32(part.encode()) % 20000 for part in parts]
        return ids + ([self.eos] if eos else [])

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def sizes_of(options: SimpleNamespace) -> tuple[int, int, dict[str, int]]:
    """Width and blocks of the image tower, whose heads have 64 numbers, and the decoder's sizes."""
    if options.tiny:
        return 64, 3, {"dim": 64, "n_layers": 2, "n_heads": 2, "multiple_of": 32}
    return 256, 6, {"dim": 512, "n_layers": 4, "n_heads": 8, "multiple_of": 256}


def images(count: int) -> Tensor:
    """Random normalised images float32 [count,3,224,224]."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def captions(count: int) -> list[str]:
    """Captions of thirteen words, five of them labels of two tokens."""
    template = "thing{}" + " a word{} by" * 4
    return [template.format(i, *range(5 * i + 1, 5 * i + 5)) for i in range(count)]


def labels_of(caption: str) -> list[str]:
    """The words with a digit: what stands in for the nouns."""
    return [word for word in caption.split() if re.search(r"\d", word)]


def freeze(model: nn.Module) -> None:
    """Train what NXTP trains; both sides have the original's names."""
    trained = trained_names([name for name, _ in model.named_parameters()], TRAINED_BLOCKS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


# ---- our side
def build_model(options: SimpleNamespace) -> Nxtp:
    """The network with random weights, or those that the peer left, on the device."""
    torch.manual_seed(0)
    width, blocks, decoder = sizes_of(options)
    sizes = {"vision_width": width, "vision_layers": blocks, "image_size": SIDE}
    tower = OpenAIConfig(embed_dim=decoder["dim"], patch_size=PATCH, **sizes)
    llama = LlamaConfig(vocab_size=Words.vocab_size, **decoder)
    model = Nxtp(NxtpConfig(tower, llama, trained_rows=(IMAGE,)))
    if weights := left(options):
        model.load_state_dict(weights)
    return model.to(options.device)


def label(options: SimpleNamespace) -> dict:
    """Top labels of images; `tokens` [images][labels] are their ids."""
    model = build_model(options).eval()
    prompt = [IMAGE, Words.bos, *Words().encode(PROMPT)]
    prompt = torch.tensor(prompt, device=options.device)
    pixels = images(options.images).to(options.device)
    tokens = []

    @torch.inference_mode()
    def step() -> None:
        seen = model.encode_image(pixels)
        drafts = one_shot(model, seen, prompt, COMMA, options.labels, LABEL_TOKENS)
        tokens[:] = [[row[0] for row in drafts.rows(i)] for i in range(len(pixels))]

    return {**measure(step, options), "tokens": tokens}


def train(options: SimpleNamespace) -> dict:
    """A training step; `loss` is the first one's."""
    model = build_model(options)
    sequences = Sequences(Words(), LENGTH - 256, many_prompts=False, original=True)
    texts = [sequences.labels(labels_of(text), PROMPT) for text in captions(options.batch)]
    batch = pad_batch(texts, Words.pad)
    batch["image"] = images(options.batch)
    freeze(model)
    # the only loss with a weight
    return training_step(model, batch, lambda losses: losses["loss_objs"], ADAMW, options)


def add_figures(results: dict[str, list[dict]], count: int) -> None:
    """Add the `rate` of so many labels or images, and to the original's results the `agreement`:
    whether both sides found the same, in words."""
    for run in itertools.chain(*results.values()):
        run["rate"] = count / run["seconds"]
    if PEER not in results:
        return
    ours, theirs = results[OURS][0], results[PEER][0]
    if "loss" in ours:
        theirs["agreement"] = f"first loss {ours['loss']:.6f} and {theirs['loss']:.6f}"
        return
    mine, others = (list(itertools.chain(*side["tokens"])) for side in (ours, theirs))
    alike = sum(a == b for a, b in zip(mine, others, strict=True))
    theirs["agreement"] = f"{alike} of {len(mine)} labels alike"


def main(config: Config) -> None:
    check_peer(config, "src/decoding.py", "NXTP")
    results = {}
    for case in config.cases:
        images = CASES[case]
        what = "label" if images else "train"
        # the original first: it leaves the weights
        sides = {PEER: f"benchmarks.peers.nxtp:{what}"} if config.peer else {}
        sides[OURS] = f"benchmarks.recognition:{what}"
        found = take_turns(config, sides, images=images)
        add_figures(found, images * config.labels or config.batch)
        name = f"training step, {config.batch} images"
        if images:
            name = f"top {config.labels}, case {case}"
        results |= {f"{name}: {side}": runs for side, runs in found.items()}
    title = ["Recognition"] + ["51.5M parameters"] * (not config.tiny)
    title += [*config.cases, config.precision, device_of(config)]
    title += ["against the original"] * bool(config.peer)
    publish(config, "recognition", title, results, COLUMNS)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
