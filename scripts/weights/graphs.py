"""Networks as ONNX graphs, checked with onnxruntime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError

OPSET = 18  # the oldest that torch's exporter writes natively; onnxruntime reads it since 1.14
ANY = torch.export.Dim.DYNAMIC
NEEDED = ("onnx", "onnxscript")


class _Graphed(nn.Module):
    """A function of a network as a module that has the network's weights."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def write_graph(
    model: nn.Module,
    function: Callable,
    inputs: Sequence[Any],
    shapes: Sequence[Any],
    path: Path,
    names: tuple[Sequence[str], Sequence[str] | None],
) -> None:
    """Export `function(*inputs)`, computed with `model`, to `path`, its weights in a file beside it.

    shapes: of each input the dimensions of any size, as torch.export takes them ({0: ANY}), or
    None. names: of inputs and outputs, these None = torch's. Raises UserError where a package is
    missing.
    """
    check_packages(NEEDED)
    path.parent.mkdir(parents=True, exist_ok=True)
    module = _Graphed(model, function).eval()
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=(tuple(shapes),))
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            optimize=False,
            input_names=names[0],
            output_names=names[1],
        )
    forget_where_it_was_made(exported.model)
    exported.save(path, external_data=True)


def forget_where_it_was_made(model) -> None:
    """Drop what torch notes of every node and value: the lines of code, with their paths on this
    machine, that it comes from. model: onnx_ir's."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def check_packages(names: Sequence[str]) -> None:
    """UserError names the packages that are missing."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Graph:
    """An exported graph under onnxruntime, on the CPU: tensors in, tensors out."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            path, sess_options=options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, *values: Tensor) -> list[Tensor]:
        names = [entry.name for entry in self.session.get_inputs()]
        inputs = {key: value.contiguous().numpy() for key, value in zip(names, values, strict=True)}
        return [torch.from_numpy(value) for value in self.session.run(None, inputs)]


@torch.no_grad()
def largest_error(function: Callable, path: Path, inputs: Sequence[Tensor]) -> float:
    """Largest difference of any output under onnxruntime, relative to that output's largest value.
    UserError where it is over 1e-4."""
    expected = function(*inputs)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    apart = 0.0
    for found, value in zip(Graph(path)(*inputs), expected, strict=True):
        apart = max(apart, float((found - value).abs().max() / value.abs().max().clamp(min=1)))
    if not apart <= 1e-4:
        raise UserError(f"{path}: onnxruntime's outputs are {apart:.1e} apart from torch's")
    return apart
