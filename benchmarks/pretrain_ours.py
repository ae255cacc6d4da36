"""Our side of benchmarks/pretrain.py: one training step of SIMLA or ALBEF as Pretrain.py takes it.

    python -m benchmarks.pretrain_ours '{"system": "simla", "batch": 4, ...}'      # started by benchmarks.pretrain

Prints one line of JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from base.distributed import World
from benchmarks.common import ALPHA, QUEUE_SIZE, about, chosen_device, measure, synthetic_batch
from models.fusion.dvae import ImageTokenizer, TokenizerConfig
from models.fusion.momentum import MomentumPairs
from models.fusion.simla import Simla, SimlaConfig
from runtime.log import peak_flops, training_flops
from runtime.optim.build import Optimizer, Precision, build_optimizer
from runtime.parallel import Features, parallelize


def build_model(options: dict) -> Simla:
    """SIMLA or ALBEF at full size, random weights, on the CPU."""
    config = SimlaConfig if options["system"] == "simla" else SimlaConfig.albef
    return Simla(config(queue_size=QUEUE_SIZE, compat=options["compat"]))


def build_tokenizer(precision: str) -> ImageTokenizer:
    """The image tokenizer with DALL-E's full-size encoder, random weights, in the type of the
    run."""
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    return ImageTokenizer(TokenizerConfig(), with_decoder=False).freeze(dtype)


def training_batch(options: dict, device: torch.device) -> dict[str, Tensor]:
    """The common batch under the names of the model's forward, masked positions padded to a
    multiple of 32."""
    batch = synthetic_batch(options["batch"])
    labels = batch.pop("mlm_labels").flatten()
    positions = (labels >= 0).nonzero().flatten()
    padding = -len(positions) % 32
    batch["mlm_positions"] = nn.functional.pad(positions, (0, padding))
    batch["mlm_labels"] = nn.functional.pad(labels[positions], (0, padding), value=-100)
    if options["system"] == "albef":
        del batch["token_image"], batch["patch_mask"]
    return {name: value.to(device) for name, value in batch.items()} | {
        "alpha": torch.tensor(ALPHA, device=device)
    }


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP per second of processor time in a square matrix product on the CPU: the yardstick of its
    MFU."""
    a = torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(5):
        begin = time.process_time()
        a @ a
        best = max(best, 2 * size**3 / (time.process_time() - begin))
    return best


def utilisation(flops: float, result: dict, device: torch.device, precision: Precision) -> float:
    """MFU: of the data sheet's peak on a GPU (0 where unknown), of a matrix product's rate on the
    CPU."""
    if device.type == "cpu":
        return flops / result["cpu_seconds"] / matmul_rate(precision.dtype or torch.float32)
    peak = peak_flops(device, "fp32" if precision.dtype is None else "bf16")
    return flops / result["seconds"] / peak if peak else 0.0


def check(options: dict, device: torch.device) -> dict[str, float]:
    """Losses with the peer's weights and codes, no dropout, the likeliest negatives."""
    saved = torch.load(
        Path(options["check"]) / "peer.pt", weights_only=True, mmap=True, map_location=device
    )
    model = build_model({**options, "compat": "original"}).to(device).eval()
    model.load_state_dict(saved["model"])
    del saved["model"]
    batch = training_batch(options, device)
    if batch.pop("token_image", None) is not None:
        batch["visual_codes"] = saved["visual_codes"]
    model.draw_negatives = lambda i2t, t2i, same: tuple(
        logits.masked_fill(same, -torch.inf).argmax(-1) for logits in (t2i, i2t)
    )
    MomentumPairs(model).update()
    with torch.no_grad():
        return {name: loss.item() for name, loss in model(**batch).items()}


def main() -> None:
    options = json.loads(sys.argv[1])
    device = chosen_device(options["device"])
    torch.manual_seed(0)
    if options.get("check"):
        print(json.dumps({"losses": check(options, device)} | about(device)))
        return
    model, batch = build_model(options).train(), training_batch(options, device)
    tokenizer = (
        build_tokenizer(options["precision"]).to(device) if options["system"] == "simla" else None
    )
    codes = (
        {}
        if tokenizer is None
        else {"visual_codes": torch.zeros_like(batch["patch_mask"], dtype=torch.int64)}
    )
    inputs = {name: value for name, value in batch.items() if name != "token_image"}
    wrappers = Features(
        compile=options["compile"], activation_checkpointing=options["activation_checkpointing"]
    )
    model = parallelize(model, World(0, 1, 0, device), wrappers)
    pairs, precision = MomentumPairs(model), Precision(options["precision"], device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, Optimizer())
    losses: dict[str, Tensor] = {}

    def step() -> None:
        if tokenizer is not None:
            codes["visual_codes"] = tokenizer.codes(batch["token_image"]).flatten(1)
        pairs.update()
        with precision.autocast():
            losses.update(model(**inputs, **codes))
        precision.backward(sum(losses.values()))
        precision.step(optimizer, parameters)

    result = measure(step, device, options["warmup"], options["steps"])
    result["losses"] = {name: loss.item() for name, loss in losses.items()}
    with torch.device(
        "meta"
    ):  # counted last, and with no weights: the count must not raise the peak
        flops = training_flops(build_model(options).train(), inputs | codes)
    result["mfu"] = utilisation(flops, result, device, precision)
    print(json.dumps({**result, "flops": flops} | about(device)))


if __name__ == "__main__":
    main()
