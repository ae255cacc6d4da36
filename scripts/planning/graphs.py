"""What torch.compile makes of a recipe: graphs, what breaks them, and recompilations, on fakes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch

from base.distributed import ALONE
from runtime.simulate.stand_ins import simulated_gpu
from scripts.planning.steps import setup_of


@dataclass
class Graphs:
    """graphs: captured in the first step; recompiled: in two more steps of the same shapes."""

    graphs: int = 0
    recompiled: int = 0
    breaks: Counter = field(default_factory=Counter)  # reason -> times


@contextmanager
def _casts_anew() -> Iterator[None]:
    """Autocast keeps no casts of weights: one that two views share would be missed where the second
    is recomputed."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def capture(script: ModuleType, config) -> Graphs:
    """Three steps of the recipe on one process, whose graphs TorchDynamo captures and runs as they
    are: nothing is generated or compiled."""
    from runtime.optim.build import Precision, build_optimizer
    from runtime.parallel import ParallelOptions, parallelize

    found = Graphs()

    def backend(graph: torch.fx.GraphModule, _inputs):
        found.graphs += 1
        return graph.forward

    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with simulated_gpu(), _casts_anew():
        setup = setup_of(script, config)
        features = ParallelOptions(activation_checkpointing=config.activation_checkpointing)
        model = parallelize(setup.model, ALONE, features).train()
        model.compile(backend=backend)
        optimizer = build_optimizer(model, config.optimizer, setup.decayed)
        precision = Precision(config.precision, ALONE.device, config.optimizer.clip_grad_norm)
        for number in range(3):
            setup.step(model, optimizer, precision)
            if number == 0:
                first = found.graphs
    found.graphs, found.recompiled = first, found.graphs - first
    found.breaks = Counter({_one_line(reason): times for reason, times in breaks.items()})
    torch._dynamo.reset()
    return found


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:200]
