"""Our side of benchmarks/recognition.py: top labels of images, or a training step.

Started by benchmarks.recognition with its options as JSON; prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks import recognition_common as common
from benchmarks.common import about, chosen_device, measure
from dataset.tasks.recognition import Sequences, pad_batch
from models.layers.llama import LlamaConfig
from models.layers.openai_towers import OpenAIConfig
from models.recognition.decoding import one_shot
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.nxtp import trained_names
from runtime.optim.build import Optimizer, Precision, build_optimizer


def build_model() -> Nxtp:
    """The 51.5M-parameter network, random weights, on the CPU."""
    vision, decoder = common.VISION, common.DECODER
    sizes = {
        "vision_width": vision["width"],
        "vision_layers": vision["layers"],
        "patch_size": vision["patch"],
    }
    tower = OpenAIConfig(embed_dim=decoder["dim"], image_size=vision["side"], **sizes)
    llama = LlamaConfig(
        dim=decoder["dim"],
        n_layers=decoder["layers"],
        n_heads=decoder["heads"],
        vocab_size=common.Words.vocab_size,
        multiple_of=decoder["multiple_of"],
    )
    return Nxtp(NxtpConfig(tower, llama, trained_rows=(common.IMAGE,)))


def labelling(model: Nxtp, options: dict, device: torch.device):
    """A function that labels the images, and the dict that receives its tokens."""
    words, found = common.Words(), {}
    prompt = torch.tensor([common.IMAGE, words.bos, *words.encode(common.PROMPT)], device=device)
    images = common.images(options["images"]).to(device)

    def step() -> None:
        with torch.inference_mode():
            drafts = one_shot(
                model,
                model.encode_image(images),
                prompt,
                common.COMMA,
                options["labels"],
                options["tokens"],
            )
            found["tokens"] = [[row[0] for row in drafts.rows(i)] for i in range(len(images))]

    return step, found


def training(model: Nxtp, options: dict, device: torch.device):
    """A function that takes one training step, and the dict that receives its loss."""
    words, found = common.Words(), {}
    sequences = Sequences(
        words, common.LENGTH - 256, many_prompts=False, original=options["compat"] == "original"
    )
    texts = [
        sequences.labels(common.labels_of(text), common.PROMPT)
        for text in common.captions(options["batch"])
    ]
    batch = {name: value.to(device) for name, value in pad_batch(texts, words.pad).items()}
    batch["image"] = common.images(options["batch"]).to(device)
    trained = trained_names([name for name, _ in model.named_parameters()], common.TRAINED_BLOCKS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = build_optimizer(
        model, Optimizer(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    )
    precision = Precision(options["precision"], device)

    def step() -> None:
        with precision.autocast():
            loss = model(**batch)["loss_objs"]
        found.setdefault("loss", loss.item())
        precision.backward(loss)
        precision.step(optimizer, list(model.parameters()))

    return step, found


def main() -> None:
    options = json.loads(sys.argv[1])
    device = chosen_device(options["device"])
    torch.manual_seed(0)
    model = build_model()
    saved = Path(options["exchange"]) / "weights.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved, weights_only=True, mmap=True))
    model = model.to(device).train(options["case"] == "train")
    step, found = (training if options["case"] == "train" else labelling)(model, options, device)
    result = measure(step, device, options["warmup"], options["steps"])
    print(json.dumps({**result, **found} | about(device)))


if __name__ == "__main__":
    main()
