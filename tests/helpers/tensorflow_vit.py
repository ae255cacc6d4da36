"""A classifier's weights under the names of COYO-ViT's TensorFlow checkpoints."""

from torch import Tensor

from models.weights.loading import State, split_qkv
from models.weights.vit import TENSORFLOW, _names, _other_name


def to_tensorflow(state: State) -> dict[str, Tensor]:
    """Native weights under the keys of the original's checkpoints, without
    `/.ATTRIBUTES/VARIABLE_VALUE`."""
    table = _names(TENSORFLOW)
    result = {}
    for key, value in split_qkv(state).items():
        name, _, leaf = _other_name(key, table).partition(".")
        if "norm" in name.rpartition("/")[2]:
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        elif leaf == "weight":
            leaf = "kernel"
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
        result["/".join(filter(None, [name, leaf]))] = value.contiguous()
    return result
