"""What counts as a block for checkpointing and sharding, and help of a model's options."""

import torch
from torch import nn

from base.knobs import section
from models.dual_encoder.config import DualConfig
from models.layers.efficientnet import Block as MBConv
from models.layers.efficientnet import EfficientNetShape
from runtime.config.schema import Schema
from runtime.parallel import ParallelOptions, compile_parts, is_stage, transformer_blocks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_lists_and_stages_of_one_class_hold_blocks():
    stage, mixed = (
        nn.Sequential(Block(), Block()),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)),
    )
    assert is_stage(stage) and not is_stage(mixed) and not is_stage(nn.Sequential(Block()))
    assert not is_stage(nn.Sequential(nn.ReLU(), nn.ReLU()))
    listed = nn.ModuleList([Block()])
    network = nn.ModuleDict({"a": stage, "b": mixed, "c": listed, "again": stage})
    assert transformer_blocks(network) == [*stage, *listed]


def test_blocks_of_convolutions_are_compiled_once_a_size(monkeypatch):
    """Each with sizes that the compiler knows: of variable ones it makes slow code, or none."""
    symbols = []  # for each graph, the sizes that vary

    def backend(graph, inputs):
        symbols.append([size for size in inputs if isinstance(size, torch.SymInt)])
        return graph

    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda block, mode, **options: compile(block, backend=backend, **options),
    )
    torch._dynamo.reset()
    shape = EfficientNetShape(virtual_batch=2)
    rows = [
        (3, 8, 8, 2, 1),
        (3, 8, 8, 2, 1),
        (3, 8, 16, 2, 2),
        (3, 16, 16, 2, 1),
        (3, 16, 16, 2, 1),
    ]
    stages = nn.Sequential(*(MBConv(row, shape, 0.1 * n) for n, row in enumerate(rows, start=1)))
    compile_parts(stages, ParallelOptions(compile=True, compile_mode="blocks"))
    stages(torch.rand(4, 8, 8, 8, requires_grad=True)).sum().backward()
    assert symbols == [[]] * len(set(rows))


def test_options_of_models_have_their_help_in_the_field():
    from dataclasses import make_dataclass

    config = make_dataclass("Config", [("network", DualConfig, section(DualConfig, flat=True))])
    knobs = Schema(config).knobs
    assert knobs["network.label_smoothing"].help.startswith("of the local terms only")
    assert knobs["network.separate_proj"].help.startswith("local views")
