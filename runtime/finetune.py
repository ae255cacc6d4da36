"""What the fine-tuning scripts share beside their method: knobs, the start, validation and the best checkpoint."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from base import distributed
from base.distributed import World
from runtime.config.fusion import FineTuneConfig, starting_weights
from runtime.optim.build import Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, ramp
from runtime.parallel import gradient_sync, whole_model
from runtime.run import Run, seed_everything


class Setting(NamedTuple):
    """What a script starts from: processes, weights of `--checkpoint` ({} without one), precision."""

    world: World
    weights: dict[str, Tensor]
    precision: Precision


def prepare(config: FineTuneConfig) -> Setting:
    """Join the processes, seed them alike, read `--checkpoint` and take over the geometry it was made with."""
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    weights = starting_weights(config, world)
    return Setting(
        world, weights, Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    )


class FineTuning(Run):
    """The loop of scripts that do not write it out yet; `Run` holds what it does."""

    def __init__(self, config: FineTuneConfig, world: World, metric: str):
        super().__init__(config, world, metric or None)

    def begin(
        self, title: str, model: nn.Module, loader, precision: Precision, decayed=None
    ) -> None:
        """Optimizer and plan for the wrapped model; go on where the run was interrupted; the banner."""
        config = self.config
        seed_everything(config.seed, self.world.rank)  # dropout and negatives differ from here on
        optimizer = build_optimizer(model, config.optimizer, decayed)
        self.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
        self.start(
            title, Plan.of_loader(config.scheduler, config.optimizer.lr, loader, config.accumulate)
        )

    def start(
        self, title: str, plan: Plan, parameters: int = 0, flops: float = 0.0, **facts
    ) -> None:
        super().start(title, plan, flops)

    def __iter__(self) -> Iterator[Tensor]:
        """The updates still to do: the weight of the teacher's soft targets in each, 0-d float32 on the device."""
        config, plan = self.config, self.plan
        for step in range(self.step, plan.total):
            set_learning_rate(self.optimizer, plan.lr(step))
            alpha = config.alpha * ramp(step, plan.epoch_steps if config.warm_up else 0)
            yield torch.full((), alpha, device=self.world.device)
            self.save_if_due(step + 1)
            self.leave_if_interrupted(step + 1)
        self.close()

    def learn(self, forward: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """One update by the gradient of the sum of the named losses that `forward` makes of a micro-batch."""
        total: dict[str, Tensor] = {}
        for micro in range(self.config.accumulate):
            batch = self.next_batch()
            last = micro == self.config.accumulate - 1
            with gradient_sync(self.model, last), self.precision.autocast():
                losses = forward(batch)
                loss = torch.stack(list(losses.values())).sum()
            self.precision.backward(loss / self.config.accumulate)
            for name, value in {"loss": loss, **losses}.items():
                total[name] = total.get(name, 0) + value.detach() / self.config.accumulate
        norm = self.precision.step(self.optimizer, list(self.model.parameters()))
        self.log_step(self.step + 1, **total, grad_norm=norm)

    @property
    def validation_due(self) -> bool:
        """Whether the update just made is one to validate after."""
        return super().validation_due(self.step)

    def keep(self, metrics: dict[str, float]) -> None:
        """Log the validation, save, and name the checkpoint best if it is."""
        self.keep_best(metrics, self.step)

    def network(self, build: Callable[[], nn.Module]) -> nn.Module:
        return whole_model(self.model)
