"""A small training for torchrun, which waits where the test wants it to: `elastic_trainer FOLDER`.

On two processes it waits after six updates until FOLDER/go exists, on one after three until it is
asked to leave because another one joins.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from base import distributed
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from runtime.config.cli import section
from runtime.optim.build import Optimizer, Precision, set_learning_rate
from runtime.optim.schedule import Schedule
from runtime.options import RunConfig
from runtime.run import Run

RECORDS, EPOCHS = 200, 2


class Config(RunConfig):
    optimizer = section(Optimizer)
    scheduler = section(Schedule)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, number):
        return {"loss": self.layer(x).square().mean()}


def build(record: dict) -> dict:
    return {"number": record["number"], "x": [record["number"] / RECORDS, 1.0]}


def collate(samples: list[dict]) -> dict:
    return {
        "number": torch.tensor([sample["number"] for sample in samples]),
        "x": torch.tensor([sample["x"] for sample in samples]),
    }


def main(folder: Path) -> None:
    world = distributed.init("cpu")
    config = Config(output_dir=folder / "run", log_every=1, save_every="4 steps", tensorboard=False)
    config.optimizer = Optimizer(lr=0.05)
    config.scheduler = Schedule(duration=f"{EPOCHS} epochs", warmup="10%")
    torch.manual_seed(0)
    run = Run(config, world)
    begun = distributed.broadcast_object(time.time())
    records = RecordSource([{"number": number} for number in range(RECORDS)], build)
    stream = Stream([records], collate)
    loader = StreamLoader(stream, 2, workers=0, world=world, state=run.data_state())
    precision = Precision("fp32", world.device)
    model, optimizer, plan = run.begin("elastic", Net(), loader, precision)
    taken = (folder / f"taken_{begun}_{world.rank}.jsonl").open("w", buffering=1)

    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        batch = run.next_batch()
        loss = model(**batch)["loss"]
        precision.backward(loss)
        grad_norm = precision.step(optimizer, model.parameters())
        run.log_step(step + 1, loss=loss.detach(), grad_norm=grad_norm)
        line = {"step": step + 1, "numbers": batch["number"].tolist(), "processes": world.size}
        taken.write(json.dumps(line) + "\n")
        run.save_if_due(step + 1)
        if step + 1 == run.first_step + (6 if world.size == 2 else 3):
            wait(folder / "go" if world.size == 2 else None, run)
        run.leave_if_interrupted(step + 1)
    run.finish()
    distributed.shutdown()


def wait(file: Path | None, run: Run) -> None:
    while not (file and file.exists()) and run.interrupt.received is None:
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
