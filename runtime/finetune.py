"""What the fine-tuning scripts share beside their method: knobs, the start, validation and the best
checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from base import distributed
from base.distributed import World
from base.errors import UserError
from runtime.checkpoint import load_checked, read_weights
from runtime.config.cli import knob, section
from runtime.config.from_checkpoint import Geometry, inherit
from runtime.optim.build import Optimizer, Precision, build_optimizer, set_learning_rate
from runtime.optim.schedule import Plan, Schedule, ramp
from runtime.parallel import gradient_sync, to_device
from runtime.run import Run, RunConfig, seed_everything


@dataclass
class FineTuneConfig(Geometry, RunConfig):
    """Knobs of every fine-tuning script."""

    evaluate: bool = knob(False, "no training: score the checkpoint")
    batch_size_train: int = knob(
        32, "samples per process and micro-batch", low=1, aliases=("batch_size",)
    )
    batch_size_test: int = knob(32, "samples per forward pass in evaluation", low=1)
    eval_every: str = knob(
        "1 epochs", "between two validations: a number of 'steps', 'epochs', 'samples' or '%'"
    )
    alpha: float = knob(0.4, "weight of the teacher's soft targets", low=0, high=1)
    distill: bool = knob(True, "soft targets at all")
    warm_up: bool = knob(True, "let alpha grow from 0 during the first epoch")
    momentum: float = knob(0.995, "momentum of the teacher, per update", low=0, high=1)
    compat: str = knob(
        "none", "'original' reproduces the published code's numbers", choices=("none", "original")
    )
    max_words: int = knob(30, "words kept of a text", low=1)
    crop_scale: tuple[float, float] | None = knob(
        (0.5, 1.0), "range of the random crop's share; none = whole image"
    )
    flip: bool = knob(True, "mirror half of the training images; no where texts say left and right")
    augment_level: float = knob(
        7, "strength of RandAugment's two operations; 0 = none of them", low=0, high=10
    )
    optimizer: Optimizer = section(Optimizer, lr=2e-5)
    scheduler: Schedule = section(
        Schedule, aliases=("schedular",), epochs="5 epochs", min_lr=1e-6, warmup="100 steps"
    )
    vit_mask_token: bool = knob(False, "accepted from old configurations; no patches are masked")
    mlm_probability: float = knob(0.15, "accepted from old configurations; no words are masked")


class Setting(NamedTuple):
    """What a script starts from: processes, weights of `--checkpoint` ({} without one),
    precision."""

    world: World
    weights: dict[str, Tensor]
    precision: Precision


def prepare(config: FineTuneConfig) -> Setting:
    """Join the processes, seed them alike, read `--checkpoint` and take over the geometry it was
    made with."""
    world = distributed.init(config.device)
    seed_everything(config.seed, 0)  # the same starting weights everywhere
    if config.evaluate and config.checkpoint is None:
        raise UserError("--evaluate needs --checkpoint: a file or the directory of a run")
    weights = read_weights(config.checkpoint) if config.checkpoint else {}
    taken = inherit(config, weights)
    if world.is_main and taken:
        print(f"as in {config.checkpoint}:", *taken, sep="\n  ", flush=True)
    return Setting(
        world, weights, Precision(config.precision, world.device, config.optimizer.clip_grad_norm)
    )


class FineTuning(Run):
    """A run that validates now and then and keeps the checkpoint with the best `metric`.

    tuning = FineTuning(config, world, "accuracy")
    tuning.begin("title", model, loader, precision)         # the wrapped model; restores it where
    the run goes on for alpha in tuning:                                    # one pass is one update
        tuning.learn(lambda batch: model(**batch, alpha=alpha))
        if tuning.validation_due:
            tuning.keep(evaluate(tuning.network(build)))
    tuning.result                                           # the checkpoint to test
    """

    def __init__(self, config: FineTuneConfig, world: World, metric: str):
        super().__init__(config, world)
        self.metric, self.kept_at = metric, 0
        self.best = distributed.on_main(self._best_before)

    def _best_before(self) -> float:
        """Metric of the best checkpoint so far of a run that goes on."""
        best = self.checkpoints.best if self.first_step else None
        return load_checked(best).get(self.metric, float("-inf")) if best else float("-inf")

    def begin(
        self, title: str, model: nn.Module, loader, precision: Precision, decayed=None
    ) -> None:
        """Optimizer and plan for the wrapped model; go on where the run was interrupted; the
        banner.

        decayed: names of the parameters with weight decay, where the model tells (see
        parameter_groups).
        """
        config, size = self.config, self.world.size
        seed_everything(config.seed, self.world.rank)  # dropout and negatives differ from here on
        optimizer = build_optimizer(model, config.optimizer, decayed)
        self.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
        sizes = {"loader_steps": loader.steps_per_epoch, "accumulate": config.accumulate}
        batch = loader.batch_size * config.accumulate * size
        plan = Plan.of(config.scheduler, config.optimizer.lr, batch=batch, **sizes)
        self.every = max(1, plan.steps(config.eval_every))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.start(title, plan, trained, samples_an_epoch=len(loader.stream))

    def __iter__(self) -> Iterator[Tensor]:
        """The updates still to do: the weight of the teacher's soft targets in each, 0-d float32 on
        the device."""
        config, plan = self.config, self.plan
        for step in range(self.step, plan.total):
            set_learning_rate(self.optimizer, plan.lr(step))
            alpha = config.alpha * ramp(step, plan.epoch_steps if config.warm_up else 0)
            yield torch.full((), alpha, device=self.world.device)
            if self.kept_at != step + 1:
                self.save_if_due(step + 1)
            self.leave_if_interrupted(step + 1)
        self.close()

    def learn(self, forward: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """One update by the gradient of the sum of the named losses that `forward` makes of a
        micro-batch."""
        total: dict[str, Tensor] = {}
        for micro in range(self.config.accumulate):
            batch = to_device(self.watch.waiting(self.loader), self.world.device)
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
        """Whether the update just made is one to validate after: every `eval_every`, and the
        last."""
        return self.step % self.every == 0 or self.step == self.plan.total

    def keep(self, metrics: dict[str, float]) -> None:
        """Log the validation, save, and name the checkpoint best if it is."""
        value = metrics[self.metric]
        figures = {
            f"val_{name}": number
            for name, number in metrics.items()
            if isinstance(number, int | float)
        }
        self.log.write(self.step, **figures)
        self.save(self.step, tag="best" if value > self.best else None, **{self.metric: value})
        self.best, self.kept_at = max(self.best, value), self.step
        self.watch.restart()

    def network(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The network to evaluate: itself out of its wrappers, or a gathered copy where its
        parameters are sharded."""
        if self.config.parallel == "ddp":
            return distributed.unwrap(self.model)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        with torch.device("meta"):  # draws no random numbers, which would change the training
            copy = build()
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        copy.load_state_dict(weights, assign=True)
        return copy

    @property
    def result(self) -> Path:
        """The best checkpoint, or the newest where nothing was validated; the same on every
        process."""
        return distributed.on_main(lambda: self.checkpoints.best or self.checkpoints.numbered()[0])
