"""The batch size and the features of a recipe that fit a card and are fastest."""

from dataclasses import dataclass
from types import ModuleType

from base.errors import UserError
from runtime.simulate import bounds as b
from scripts.planning.report import Request, gigabytes, milliseconds
from scripts.planning.simulate import Simulation, read_config, simulate


@dataclass(frozen=True)
class Candidate:
    """One choice of features: figures at the recipe's own batch and at the largest that fits."""

    parallel: str
    checkpointing: bool
    batch_size: int
    memory: float
    eager: float  # seconds a step
    compiled: float

    def rate(self) -> float:
        """Samples a second and GPU, compiled."""
        return self.batch_size / self.compiled


@dataclass(frozen=True)
class Found:
    """All candidates, and the request."""

    candidates: list[Candidate]
    request: Request

    def best(self) -> Candidate:
        return max(self.candidates, key=Candidate.rate)

    def figures(self) -> dict:
        return {
            "best": vars(self.best()),
            "candidates": [vars(candidate) for candidate in self.candidates],
        }

    def text(self) -> str:
        lines = [
            "parallel  checkpointing  batch a GPU   memory    step eager    step compiled  samples/s"
        ]
        for c in sorted(self.candidates, key=Candidate.rate, reverse=True):
            lines.append(
                f"{c.parallel:<9} {'yes' if c.checkpointing else 'no':<14} {c.batch_size:>10}"
                f"{gigabytes(c.memory):>11} {milliseconds(c.eager):>12} "
                f"{milliseconds(c.compiled):>15} {c.rate():>10,.0f}"
            )
        best = self.best()
        lines.append(
            f"fastest: --compile true --parallel {best.parallel} --activation_checkpointing "
            f"{str(best.checkpointing).lower()} with {best.batch_size} samples a GPU and micro-batch"
        )
        return "\n".join(lines)


def search(script: ModuleType, recipe: list[str], request: Request) -> Found:
    """Simulate each choice of features at the recipe's batch and at half of it, and continue from there.

    Memory is a straight line in the batch size (contrastive losses bend it a little, so the answer
    is simulated, too). Raises UserError where not even two samples fit.
    """
    candidates = []
    for parallel in ("ddp", "fsdp") if request.gpus > 1 else ("ddp",):
        for checkpointing in (False, True):
            found = _largest(script, recipe, request, parallel, checkpointing)
            if found is not None:
                candidates.append(found)
    if not candidates:
        raise UserError(
            f"no batch fits {request.gpu.name}: two samples with activation checkpointing need more "
            f"than {b.FILL:.0%} of {gigabytes(request.gpu.memory)}; take a larger card, more GPUs "
            "with --parallel fsdp, or a smaller model"
        )
    return Found(candidates, request)


def _largest(script, recipe, request: Request, parallel: str, checkpointing: bool):
    """The candidate with the largest batch that fills the card to FILL, or None."""

    def at(size: int) -> Simulation:
        config = read_config(script, recipe)
        config.parallel = parallel
        config.activation_checkpointing = checkpointing
        name = "batch_size_train" if hasattr(config, "batch_size_train") else "batch_size"
        setattr(config, name, size)
        return simulate(script, config, request.gpus)

    config = read_config(script, recipe)
    unit = _unit(config)
    own = getattr(config, "batch_size_train", None) or config.batch_size
    half = max(unit, own // 2 // unit * unit)
    room = b.FILL * request.gpu.memory
    small = at(half)
    first = b.memory_needed(small.trace, request.gpus)
    large = at(half + unit)
    slope = (b.memory_needed(large.trace, request.gpus) - first) / unit
    fixed = first - slope * half  # weights, the optimizer, context
    size = half + int((room - first) / max(slope, 1.0)) // unit * unit
    for _ in range(3):
        if size < unit:
            return None
        simulation = at(size)
        needed = b.memory_needed(simulation.trace, request.gpus)
        if needed <= room:
            return _candidate(simulation, request, parallel, checkpointing, size, needed)
        share = (room - fixed) / (needed - fixed)
        size = min(size - unit, int(size * share) // unit * unit)
    return None


def _unit(config) -> int:
    """Batch sizes to try are multiples of it."""
    virtual = getattr(getattr(config, "network", None), "virtual_batch_size", 0)
    is_align = getattr(getattr(config, "network", None), "model", "").startswith("ALIGN")
    return virtual if is_align and virtual else 8


def _candidate(simulation, request, parallel, checkpointing, size, needed) -> Candidate:
    config = simulation.config
    bound = b.bounds(simulation.trace, request.gpu, config.precision, request.gpus, request.network)
    return Candidate(parallel, checkpointing, size, needed, bound.eager, bound.compiled)
