"""Predictions for every sample of a split, each made once, whatever the number of processes; and their results."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaluation.page import page
from runtime.config import save
from runtime.distributed import World, gather_objects, gather_rows


def over_split(
    predict: Callable[..., tuple[Tensor, ...]],
    batches: Iterable[dict],
    own: Sequence[int],
    total: int,
    world: World,
    name: str = "evaluating",
) -> list[Tensor]:
    """Tables [total, ...] on the CPU of every process; this one predicts the rows `own`, in the order of `batches`.

    predict: called with a batch's tensors, except `label`, on `world.device`; gives tensors [B, ...].
    """
    found = []
    for batch in progress(batches, name, world):
        inputs = {k: v.to(world.device, non_blocking=True) for k, v in batch.items() if k != "label"}
        found.append(predict(**inputs))
    columns = [torch.cat(parts) for parts in zip(*found, strict=True)]
    known = gather_objects([(part.shape[1:], part.dtype) for part in columns])
    kinds = next((kind for kind in known if kind), [])
    if not columns:  # a process without samples takes part all the same
        columns = [torch.zeros(0, *shape, dtype=dtype, device=world.device) for shape, dtype in kinds]
    rows = torch.as_tensor(list(own), dtype=torch.int64)
    return [gather_rows(column, rows, total).cpu() for column in columns]


def progress(items: Iterable, name: str, world: World) -> Iterable:
    """A progress bar on the first process."""
    if not world.is_main:
        return items
    from tqdm import tqdm

    return tqdm(items, name, leave=False, dynamic_ncols=True, unit="batch")


def write_results(config, title: str, metrics: dict, sections: Sequence[str], text: str = "") -> None:
    """result/metrics.json, result/config.yaml and result/report.html below config.output_dir; prints `text` or, by
    default, the metrics.
    """
    folder = Path(config.output_dir) / "result"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"checkpoint": str(config.checkpoint), **metrics}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    save(config, folder / "config.yaml")
    (folder / "report.html").write_text(page(title, sections, str(config.checkpoint)))
    print(text or json.dumps(metrics, indent=2), flush=True)
