"""AdamW that leaves alone the rows of a table that never have a gradient."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Rows = dict[Tensor, tuple[int, int]]  # parameter -> first row and number of rows


class RowsAdamW(torch.optim.AdamW):
    """torch's AdamW that of a parameter in `rows` reads and writes these rows alone.

    Where the other rows have no gradient and no weight decay, the numbers are those of AdamW over
    the whole table. States have the shape of the parameter, so that checkpoints stay the same.
    """

    def __init__(self, params, rows: Rows, **options):
        super().__init__(params, **options)
        self.rows = rows

    def _init_group(self, group, *given):
        found = super()._init_group(group, *given)
        # parameters, gradients and both moments; torch 2.6 has a flag between them
        lists = [tensors for tensors in given if isinstance(tensors, list)][:4]
        for number, parameter in enumerate(lists[0]):
            if parameter in self.rows:
                first, count = self.rows[parameter]
                for tensors in lists:
                    tensors[number] = tensors[number].narrow(0, first, count)
        return found


def rows_in_training(model: nn.Module, groups: Iterable[dict]) -> Rows:
    """The rows from the first to the last that a network trains of its tables, by its own
    `rows_in_training` (name -> row numbers). Tables with weight decay change everywhere: none."""
    named: Mapping[str, tuple[int, ...]] = getattr(model, "rows_in_training", {})
    free = {p for group in groups if not group["weight_decay"] for p in group["params"]}
    rows = {}
    for name, numbers in named.items():
        parameter = model.get_parameter(name)
        if parameter in free:
            rows[parameter] = (min(numbers), max(numbers) - min(numbers) + 1)
    return rows
