"""What counts as a block for checkpointing and sharding, and help of a model's options."""

from torch import nn

from base.knobs import section
from models.dual_encoder.config import DualConfig
from runtime.config.schema import Schema
from runtime.parallel import is_stage, transformer_blocks


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


def test_options_of_models_have_their_help_in_the_field():
    from dataclasses import make_dataclass

    config = make_dataclass("Config", [("network", DualConfig, section(DualConfig, flat=True))])
    knobs = Schema(config).knobs
    assert knobs["network.label_smoothing"].help.startswith("of the local terms only")
    assert knobs["network.separate_proj"].help.startswith("local views")
