"""One training run: its folder, resuming, checkpoints, log and signals. The loop and the method are in the scripts."""

import contextlib
import errno
import os
import random
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from base import distributed
from base.caches import is_at
from base.distributed import World
from base.errors import UserError, brief
from base.memory import check_batches, check_fits
from base.reading import read_json
from base.writing import check_output_folder, file_errors, write_json
from runtime.checkpoint import (
    NUMBERED,
    CheckpointFolder,
    export_safetensors,
    find_damage,
    load_checked,
)
from runtime.config.values import differences
from runtime.config.yaml import save, to_dict
from runtime.flops import peak_flops
from runtime.interrupt import EXIT_REQUEUE, Interrupt
from runtime.log import Meters, RunLog, Stopwatch, logged_values
from runtime.optim.build import Precision, build_optimizer
from runtime.optim.schedule import Plan, steps
from runtime.options import RunConfig, starts_over
from runtime.parallel import parallelize, to_device
from runtime.profiling import StepProfiler
from runtime.resume import check_same_run, check_weights_fit, script_of
from runtime.saving import Saver, is_sharded_format
from runtime.scores import score_line
from runtime.sharded import is_sharded, read_state
from runtime.watchdog import Watchdog

ATTEMPTS = 3  # starts of one validation without an end before the run stops
SEEN = 0.9  # of the samples: where an epoch has fewer it is said


def make_deterministic() -> None:
    """Kernels that give the same bits in every run on the same machine and number of processes;
    one that cannot raises RuntimeError with its name, of which `run_script` makes a sentence."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, rank: int) -> None:
    """Generators of torch (all devices) and Python; the data stream has its own, which depend on
    the sample."""
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)


def check_durations(config: RunConfig) -> None:
    """UserError for a duration that is none; those of the schedule are checked with it."""
    for name in ("save_every", "eval_every", "alpha_ramp"):
        duration = getattr(config, name, "1")
        if not steps(duration, epoch_steps=1, batch=1, total=1) and name != "alpha_ramp":
            raise UserError(
                f"{name} {duration!r}: every 0 updates is never or always; give a number above 0, "
                "or '100%' for the end alone"
            )


class Run:
    """Folder, log, checkpoints and signals of one run. Every training script has this loop:

    run = Run(config, world, metric="accuracy")         # metric: None where nothing is validated
    loader = training_data(…, run.data_state())
    model, optimizer, plan = run.begin("title", model, loader, precision)     # wraps, resumes

    if run.validation_due(run.step):                    # resumed after a kill in a validation
        run.keep_best(evaluate(…), run.step)
    for step in range(run.step, plan.total):
        set_learning_rate(optimizer, plan.lr(step))
        losses = train_step(model, run.next_batch, config, precision)
        grad_norm = precision.step(optimizer, parameters)
        run.log_step(step + 1, **losses, grad_norm=grad_norm)
        if run.validation_due(step + 1):
            run.keep_best(evaluate(…), step + 1)
        run.save_if_due(step + 1)
        run.leave_if_interrupted(step + 1)
    return run.finish()                                 # the checkpoint to test
    """

    def __init__(self, config: RunConfig, world: World, metric: str | None = None):
        check_batches(config)
        check_durations(config)
        if config.deterministic:
            make_deterministic()
        self.config = config
        self.world = world
        self.folder = Path(config.output_dir)
        self.attempts = self.folder / "validation.json"
        self.metric = metric  # name of the score that the best checkpoint is best by
        self._lock = distributed.on_main(self._take_lock, share=False)
        self.checkpoints = CheckpointFolder(self.folder, keep=config.keep)
        self.saved_path, self.saved = self._find_saved()
        self.resumed = self.saved is not None
        self.step = self.first_step = self.saved["step"] if self.saved else 0
        self.saved_on = len(self.saved["per_rank"]) if self.saved else world.size  # processes
        self.saved_scores = self.saved.get("scores", {}) if self.saved else {}
        self.saver: Saver | None = None  # the format depends on the network: `start`
        numbered = self.resumed and NUMBERED.fullmatch(self.saved_path.name)
        self.saved_at = self.step if numbered else None  # step of the newest checkpoint
        self.scores: dict[int, float] = {}  # of the validations, by step
        self.best = float("-inf")
        self.validated = False  # by this process
        self.rng: dict = {}  # before the validation under way
        self.log: RunLog | None = None  # nothing is written before all is known to be good: `start`
        self.meters = Meters()
        self.watch = Stopwatch(world, 1)
        self.watchdog = Watchdog(world, config.stall_minutes, self.folder)
        self.interrupt = Interrupt(world, self._finish_write)

    def _take_lock(self):
        """Two runs must not write one folder: the second is refused.

        A record lock: it belongs to this process alone, so that loader workers of a killed run, which
        inherit its open files, do not hold it.
        """
        import fcntl

        check_output_folder(self.folder)
        lock = self.folder / ".lock"
        with file_errors(lock, "choose another --output_dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = lock.open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what earlier versions hold
            fcntl.flock(handle, fcntl.LOCK_UN)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # somebody holds it
                raise UserError(
                    f"{self.folder}: another run writes to this folder; choose another --output_dir"
                ) from None
            distributed.say(  # such as Lustre without its mount option flock
                f"warning: {self.folder}: this file system has no locks ({error.strerror}); take "
                "care that no second run writes here"
            )
        return handle

    def _keep_lock(self) -> None:
        """Where the folder or its lock was removed under way, lock what stands there now, that no
        second run begins in it; UserError where one has."""
        if is_at(self.folder / ".lock", self._lock):
            return
        self._lock.close()
        self._lock = self._take_lock()
        save(self.config, self.folder / "config.yaml")

    def _find_saved(self) -> tuple[Path | None, dict | None]:
        """Newest intact checkpoint, whose hash rank 0 has verified, and its content."""
        resume = self.config.resume.lower()
        if resume not in ("auto", "true", "yes") and not starts_over(resume):
            raise UserError(
                f"--resume {resume!r}: use auto, yes or no (--checkpoint FILE starts from weights)"
            )
        if starts_over(resume):
            return None, None
        path = distributed.on_main(self.checkpoints.newest_valid)
        if path is None:
            if resume in ("true", "yes"):
                weights = self.config.checkpoint
                distributed.say(
                    f"--resume {resume}: {self.folder} holds no checkpoint to resume from; update 0 "
                    + (f"is next, from the weights of {weights}" if weights else "is next")
                )
            return None, None
        saved = load_checked(path)
        options = to_dict(self.config)
        check_same_run(
            saved,
            path,
            script_of(self.config),
            options,
            processes=self.world.size,
            insist=resume == "yes",
        )
        changed = differences(saved["config"], options)
        distributed.say(
            f"resuming {self.folder} at step {saved['step']}", *(f"  {line}" for line in changed)
        )
        return path, saved

    def _scores_before(self) -> tuple[dict[int, float], float]:
        """Scores of a resumed run's validations, by step, and that of its best checkpoint, which is
        chosen again if it is lost or damaged; -inf where there is none.

        A checkpoint holds the scores before its own validation, which are in the log as well.
        """
        if not self.resumed or self.metric is None:
            return {}, float("-inf")
        scores = logged_values(self.folder / "log.jsonl", f"val_{self.metric}")
        scores = {**scores, **self.saved_scores.get(self.metric, {})}  # whose hash is right
        damaged = self.checkpoints.best
        damage = find_damage(damaged) if damaged else None
        best = self.checkpoints.restore_best(self.metric, scores)
        if damage:
            found = "none"
            if best > float("-inf"):
                found = f"now a numbered one ({self.metric} {best:.4g})"
            warnings.warn(
                f"CHECKPOINT DAMAGED: {damaged} ({damage}). The best one: {found}", stacklevel=2
            )
        return {step: score for step, score in scores.items() if step <= self.step}, best

    def _open_folder(self) -> RunLog:
        """The log of this run and its config.yaml: the first things written."""
        config = self.config
        save(config, self.folder / "config.yaml")
        self.checkpoints.clear_unfinished()
        if self.resumed:
            self.checkpoints.drop_old(self.step)
        else:
            self.attempts.unlink(missing_ok=True)
        options = {"tensorboard": config.tensorboard, "wandb": config.wandb}
        return RunLog(self.folder, self.world, to_dict(config), self.step + 1, **options)

    def data_state(self) -> dict | list[dict] | None:
        """Data position in the checkpoint, for the loader: that of this process, or those of all
        that saved where others resume (collective)."""
        if not self.saved:
            return None
        per_rank = self.saved["per_rank"]
        before = (self.saved_on, self.saved["config"].get("workers"))
        if before == (self.world.size, self.config.workers):
            return per_rank[self.world.rank]["data"]
        return distributed.on_main(lambda: [own["data"] for own in per_rank])

    def track(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, loader
    ) -> None:
        """Name what checkpoints hold, and restore it if the run is resumed."""
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.loader = loader
        if not self.saved:
            return
        from torch.distributed.checkpoint import state_dict as dcp

        network = distributed.unwrap(model)
        check_weights_fit(self.saved, self.saved_path, network, to_dict(self.config))
        state = self.saved
        whole = True
        if is_sharded(self.saved_path):
            state = read_state(self.saved_path, self.saved, model, self.world.rank)
            whole = False
        options = dcp.StateDictOptions(full_state_dict=whole, broadcast_from_rank0=False)
        # not through DDP, where it names once a layer that occurs twice, as those of NLVR
        dcp.set_model_state_dict(network, state["model"], options=options)
        given = configured_options(optimizer)  # what the configuration says now wins over the file
        try:
            dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{self.saved_path}: its optimizer state does not fit the parameters trained here "
                f"({brief(str(error))}); give the options it was made with, or another --output_dir"
            ) from error
        for group, own_options in zip(optimizer.param_groups, given, strict=True):
            group.update(own_options)
        precision.load_state_dict(self.saved["scaler"])
        own = self.saved["per_rank"]
        if len(own) == self.world.size:
            own = own[self.world.rank]
            self.meters.load_state_dict(own["meters"], self.world.device)
            restore_rng(own["rng"], self.world.device)
        self.saved = None  # up to gigabytes, not needed any more

    @property
    def peak_flops(self) -> float:
        """FLOP/s of this device at most; 0 where unknown: no MFU is logged, no FLOPs need counting."""
        return peak_flops(self.world.device, self.config.precision, self.config.peak_tflops)

    def begin(
        self,
        title: str,
        model: nn.Module,
        loader,
        precision: Precision,
        decayed: Collection[str] | None = None,
        flops: float = 0.0,
        **facts,
    ) -> tuple[nn.Module, torch.optim.Optimizer, Plan]:
        """Wrapped model, optimizer and plan, resumed if there is a checkpoint; prints the banner.

        From here on the ranks differ in their random numbers. decayed: names of the parameters with
        weight decay (see parameter_groups); flops: of one update, per process; facts: for the banner.
        """
        config = self.config
        if config.parallel == "ddp":
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            check_fits(trained, f"{title}: training", copies=3, device=self.world.device)
        if config.compile:  # on GPUs torch 2.6 starts its compilers when it is asked to compile
            self.interrupt.spare_children()
        model = parallelize(model, self.world, config).train()
        seed_everything(config.seed, self.world.rank)
        optimizer = build_optimizer(model, config.optimizer, decayed)
        self.track(model=model, optimizer=optimizer, precision=precision, loader=loader)
        lr = config.optimizer.lr
        plan = Plan.of_loader(config.scheduler, lr, loader, config.accumulate, self.step)
        self.start(title, plan, flops, **facts)
        return model, optimizer, plan

    def start(self, title: str, plan: Plan, flops: float, **facts) -> None:
        """Print what the configuration comes to, and start the clock. flops: of one update, per process.

        Says so where nothing is left to train, and ends the process where --max_steps is reached already.
        """
        config, world, self.plan = self.config, self.world, plan
        self._check_all_train_alike()
        self.scores, self.best = distributed.on_main(self._scores_before)
        opened = distributed.on_main(self._open_folder, share=False)
        self.log = opened or RunLog(self.folder, world, {})  # silent on other ranks than 0
        in_shards = is_sharded_format(config.checkpoint_format, self.model, world, config.parallel)
        self.saver = Saver(
            self.checkpoints,
            world,
            sharded=in_shards,
            in_background=in_shards if config.async_save is None else config.async_save,
            fresh=not self.resumed,
        )
        self.save_every = max(1, plan.steps(config.save_every))
        if self.metric is not None:
            self.eval_every = max(1, plan.steps(config.eval_every))
        self.watch = Stopwatch(world, plan.batch, flops, self.peak_flops)
        self.profiler = StepProfiler(config.profile, self.folder, world)
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        micro = plan.batch // (config.accumulate * world.size)
        self.log.banner(
            f"{title} -> {self.folder}",
            trainable_parameters=f"{parameters:,}",
            effective_batch=f"{plan.batch} = {micro} x {config.accumulate} micro-batches x {world.size} processes",
            samples_an_epoch=f"{len(self.loader.stream):,}",
            updates=f"{plan.total:,} ({plan.epoch_steps:,} an epoch), from {self.step:,}",
            learning_rate=f"{plan.lr(-plan.shift):.3g} first, {plan.peak_lr:.3g} peak, {plan.lr(plan.total - 1):.3g} last",
            device=f"{world.device}, {config.precision}, {config.parallel}"
            + ", compiled" * config.compile,
            **facts,
        )
        self._say_processes()
        self._warn_of_schedule()
        if self.step >= plan.total:
            self.log.say(
                f"nothing left to train: {self.folder} has made all {plan.total:,} updates"
            )
        elif self._stops_at(self.step) and not self._is_validation(self.step):
            self.log.say(f"step {self.step:,} of --max_steps {config.max_steps:,}: nothing to do")
            self._leave(0)
        elif self.interrupt.pending(world.device):  # the first update may compile for minutes
            self.log.say("nothing to save yet; start the same command again")
            self._leave(EXIT_REQUEUE)
        self._look_at_data()
        if config.compile and self.step < plan.total:
            self.log.say("compiling the network: the first update takes minutes")
        self.log.progress(plan.total, self.step)

    def _check_all_train_alike(self) -> None:
        """UserError where processes read data of other sizes or other options, as nodes with copies of
        their own do: each would follow its own learning rate, and wait for the others in the end."""
        own = (len(self.loader.stream), self.plan)
        everyone = distributed.gather_objects(own)
        for rank, (samples, plan) in enumerate(everyone):
            if (samples, plan) != everyone[0]:
                first, of_first = everyone[0]
                raise UserError(
                    f"rank {rank} would train otherwise than rank 0: it has {samples:,} samples an "
                    f"epoch and {plan.total:,} updates at {plan.peak_lr:.3g}, rank 0 {first:,} and "
                    f"{of_first.total:,} at {of_first.peak_lr:.3g}; give all processes the same "
                    "data and options"
                )

    def _warn_of_schedule(self) -> None:
        """Say where an epoch or the learning rate does not do what its options suggest."""
        plan = self.plan
        samples = len(self.loader.stream)
        in_epoch = plan.epoch_steps * plan.batch
        if in_epoch < SEEN * samples:
            self.log.say(
                f"note: an epoch is {plan.epoch_steps:,} updates of {plan.batch:,}, {in_epoch:,} of "
                f"the {samples:,} samples; the others begin the next one. Lower the batch, or count "
                "the duration in samples"
            )
        if plan.warmup > plan.warmup_room:
            self.log.say(
                f"warning: the warm-up of {plan.warmup:,} updates does not fit into {plan.warmup_room:,}: "
                "the learning rate does not rise to its peak; shorten --warmup (a number without "
                "a unit counts epochs) or train longer"
            )
        last = plan.lr(plan.total - 1)
        if last > plan.peak_lr:
            self.log.say(
                f"warning: the learning rate rises to {last:.3g} at the end, above its peak of "
                f"{plan.peak_lr:.3g}: lower scheduler.min_lr (main.py: --lr-end)"
            )

    def _say_processes(self) -> None:
        """The line of a run that resumes on another number of processes."""
        if self.saved_on == self.world.size:
            return
        now = f"{self.world.size} process{'es' if self.world.size > 1 else ''}"
        event = f"resumed on {now} (was {self.saved_on})"
        self.log.say(
            f"{event}: they share out what is left of the data; random numbers start from the seed"
        )
        self.log.write(self.step, event=event, processes=self.world.size)

    def _look_at_data(self) -> None:
        """Say what a first look at the training data notices, when a run starts from scratch."""
        look_over = getattr(self.loader, "look_over", None)
        if not (self.config.check_data and self.world.is_main and look_over) or self.step:
            return
        held_out = {}
        for option in ("val_file", "test_file"):
            given = getattr(self.config, option, None) or []
            held_out[option] = list(map(str, given if isinstance(given, list) else [given]))
        for line in look_over({option: files for option, files in held_out.items() if files}):
            self.log.say(line)

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next micro-batch, on the device; the log shows how long the loop waited for it."""
        self.watchdog.mark("waiting for data")
        batch = to_device(self.watch.waiting(self.loader), self.world.device)
        self.watchdog.mark("in an update")
        return batch

    def log_step(self, step: int, **losses: torch.Tensor) -> None:
        """Count a finished update; at log points write the line. Raises NonFinite where a step was not finite.

        losses: 0-d tensors on the device. The line has their means over the updates since the last one, over all ranks.
        """
        self.step = step
        self.interrupt.unsaved = True
        self.watchdog.update(step)
        self.meters.add(**losses)
        self.watch.steps += 1
        self._say_trace(self.profiler.update())
        self.log.tick()
        due = self._is_log_point(step)
        # looking at the flag costs nothing on the CPU, so there the run stops at the very step
        if due or self.world.device.type == "cpu":
            self._check_finite()
        if due:
            means = self.meters.read()
            position = {
                "epoch": round(self.plan.epoch(step), 4),
                "lr": self.plan.lr(step - 1),
            }
            loader = self.loader
            own = (loader.errors, loader.drawn, loader.missing, self.saver.failure)
            errors, drawn, missing, failures = zip(*distributed.gather_objects(own), strict=True)
            bad = sum(sum(counts.values()) for counts in errors)
            self.log.write(step, **position, **means, **self.watch.read(), errors=bad)
            for failure in filter(None, failures):
                raise UserError(failure)  # of a write beside the training
            loader.check_together(errors, sum(drawn), sum(missing))

    def _say_trace(self, trace: Path | None) -> None:
        if trace:
            self.log.say(f"torch's profiler: {trace}, for ui.perfetto.dev or chrome://tracing")

    def _is_log_point(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.plan.total

    def validation_due(self, step: int) -> bool:
        """Whether to validate after update `step`: every `eval_every`, and the last; before the
        loop, whether the run resumes from updates that are still to be validated.

        Saves first: what ends the process in a validation costs that validation alone. A signal ends
        it here, for the validation may take longer than the time that is left. UserError where it
        was begun ATTEMPTS times and never came to its end.
        """
        if not self._is_validation(step):
            return False
        if self.saved_at != step:
            self.save(step)
        if self.interrupt.pending(self.world.device):
            self._leave_saved(step, EXIT_REQUEUE)
        distributed.on_main(lambda: self._count_attempt(step), share=False)
        self.interrupt.unsaved = False
        self.rng = rng_state(self.world.device)
        self.watchdog.mark("in validation")
        if self.config.compile and not self.validated:
            self.watchdog.pause()  # the first one may compile
        self.validated = True
        return True

    def _count_attempt(self, step: int) -> None:
        """Note that a validation begins. UserError where it was begun too often."""
        begun = 0
        if self.attempts.exists():
            found = read_json(self.attempts, dict)
            begun = found.get("begun", 0) if found.get("step") == step else 0
        if begun >= ATTEMPTS:
            self.attempts.unlink()
            raise UserError(
                f"{self.folder}: the validation at step {step:,} was begun {begun} times and cut off "
                "each time; give a start more time, or validate fewer samples. Nothing is lost: the "
                "same command tries again"
            )
        write_json(self.attempts, {"step": step, "begun": begun + 1})

    def _is_validation(self, step: int) -> bool:
        """Whether the updates up to `step`, some at least, are to be validated and are not yet."""
        if self.metric is None or step == 0 or step in self.scores:
            return False
        return step % self.eval_every == 0 or step == self.plan.total

    def keep_best(self, scores: dict, step: int) -> None:
        """Log a validation; if `scores[metric]` is higher than ever, the checkpoint written before
        it is the best one. Random numbers continue from there, resumed or not."""
        score = distributed.broadcast_object(float(scores[self.metric]))
        self.interrupt.unsaved = True  # its line
        restore_rng(self.rng, self.world.device)
        self.saver.wait()
        if self.world.is_main:
            self.attempts.unlink(missing_ok=True)
        # the log first: with its line the validation is done, and is not repeated
        self.log.write(
            step, **{f"val_{k}": v for k, v in scores.items() if isinstance(v, int | float)}
        )
        self.log.sync()
        self.scores[step] = score
        is_best = score > self.best
        if is_best:
            if not distributed.on_main(lambda: self.checkpoints.at(step)):  # removed meanwhile
                self.save(step)
                self.saver.wait()
            distributed.on_main(lambda: self.checkpoints.make_best(step), share=False)
        self.best = max(self.best, score)
        verdict = "best so far" if is_best else f"best so far: {self.best:.4g}"
        self.log.say(f"validation at step {step:,}: {score_line(scores, self.metric)} ({verdict})")
        self.watchdog.mark("between two updates")
        self.watch.restart()
        if step == self.first_step:  # --max_steps may be reached
            self.leave_if_interrupted(step)

    def _check_finite(self) -> None:
        newest = self.checkpoints.numbered()
        where = (
            f"The last good checkpoint is {newest[0]}."
            if newest
            else "No checkpoint was written yet."
        )
        self.precision.check(
            self.first_step,
            f"{where} Try a lower learning rate, --optimizer.clip_grad_norm 1, or fp32.",
        )

    def save(self, step: int) -> None:
        """Write a checkpoint (collective)."""
        self.watchdog.mark("saving a checkpoint")
        self._check_finite()
        distributed.on_main(self._keep_lock, share=False)
        self.log.sync()  # a checkpoint must not outlast a power failure that its log does not
        own = {
            "rng": rng_state(self.world.device),
            "data": self.loader.state_dict(),
            "meters": self.meters.state_dict(),
        }
        about = {
            "scaler": self.precision.state_dict(),
            "step": step,
            "script": script_of(self.config),
            "config": to_dict(self.config),
        }
        if self.metric is not None:
            about["scores"] = {self.metric: dict(self.scores)}
        self.saver.save(self.model, self.optimizer, about, own, step)
        self.saved_at = step
        self.watchdog.mark("between two updates")

    def save_if_due(self, step: int) -> None:
        """Every `save_every` steps and at the end, unless a validation has saved."""
        if (step % self.save_every == 0 or step == self.plan.total) and self.saved_at != step:
            self.save(step)

    def leave_if_interrupted(self, step: int) -> None:
        """After a signal, or at --max_steps: save and end with the code that asks for a requeue (0 at --max_steps)."""
        enough = self._stops_at(step)
        if not enough and not self._interrupted(step):
            return
        if self.saved_at != step:
            self.save(step)
        self._leave_saved(step, 0 if enough else EXIT_REQUEUE)

    def _finish_write(self) -> None:
        """Wait for the write under way, without the other processes' main threads."""
        if self.saver:
            self.saver.wait()

    def _leave_saved(self, step: int, status: int) -> None:
        self.saver.wait()
        again = "start the same command again" if status else "take a larger --max_steps, or none,"
        self.log.say(f"saved at step {step:,}; {again} to resume")
        self._leave(status)

    def _stops_at(self, step: int) -> bool:
        """Whether --max_steps ends the run here; a finished training continues to its final test."""
        return self.config.max_steps is not None and self.config.max_steps <= step < self.plan.total

    def _interrupted(self, step: int) -> bool:
        """Whether any process was signalled. Asking the others makes the host wait for the GPU: at log points only."""
        costs_nothing = self.world.size == 1 or self.world.device.type == "cpu"
        return (costs_nothing or self._is_log_point(step)) and self.interrupt.pending(
            self.world.device
        )

    def _leave(self, status: int) -> None:
        self.close()
        distributed.shutdown()
        sys.exit(status)

    def finish(self) -> Path:
        """Close the run. Returns the best checkpoint, or the newest where nothing was validated; the
        same on every process. From here on a signal ends the process at once."""
        self.close()
        self.interrupt.unsaved = False
        if self.interrupt.pending(self.world.device):  # since the last update was saved
            distributed.shutdown()
            sys.exit(EXIT_REQUEUE)
        validated = self.best > float("-inf")
        found = (
            self.checkpoints.best if validated else next(iter(self.checkpoints.numbered()), None)
        )
        return distributed.broadcast_object(found)

    def export(self, name: str = "model.safetensors", shown: bool = True) -> Path:
        """Write the weights alone as safetensors (collective). shown: scripts/demo.py opens them."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = dcp.get_model_state_dict(self.model, options=options)
        if self.world.is_main:
            export_safetensors(weights, self.folder / name)
        said = f"written: {self.folder / name}"
        if shown:
            demo = f"python scripts/demo.py --checkpoint {self.folder} --images FOLDER"
            said += f"; to see what it can do: {demo}"
        self.log.say(said)
        return self.folder / name

    def close(self) -> None:
        """The checkpoint under way is written, the log closed, the folder free for another run."""
        self.watchdog.stop()
        if self.saver:
            self.saver.wait()
            distributed.barrier()  # nobody takes the store away while another still asks it
        if self.log:
            self._say_trace(self.profiler.finish())
            self.log.close()
        if self._lock:
            self._lock.close()
        self.interrupt.spare_no_more()


def configured_options(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Options of every parameter group but for `updates`, which KerasAdamW counts there."""
    groups = []
    for group in optimizer.param_groups:
        groups.append({k: v for k, v in group.items() if k not in ("params", "updates")})
    return groups


def rng_state(device: torch.device) -> dict:
    """State of this process's generators, as tensors and plain Python."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The network in eval mode and without gradients; the mode before comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
