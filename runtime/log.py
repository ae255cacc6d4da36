"""Run logging: banner, progress bar, a line of `log.jsonl` per log step, TensorBoard, W&B."""

import contextlib
import os
import secrets
import sys
import threading
import time
from pathlib import Path

import torch

from base import distributed
from base.bars import progress_bar
from base.distributed import World
from base.errors import UserError, first_line
from base.processes import peak_resident_bytes
from base.reading import parse_json
from base.writing import file_errors, strict_json, write_bytes, write_text
from runtime.checkpoint import RESUMABLE
from runtime.options import starts_over


class Meters:
    """Running means kept on the device. Adding never waits for it; reading is one copy.

    meters.add(loss_ita=..., loss_itm=...)   # 0-d tensors
    meters.read() -> {"loss_ita": float, ...}  # mean since the last reading, over all processes
    """

    def __init__(self):
        self.names: list[str] = []
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, **values: torch.Tensor) -> None:
        row = torch.stack([v.detach().float() for v in values.values()])
        self.names = list(values)
        self.total = row if self.total is None else self.total + row
        self.count += 1

    def read(self) -> dict[str, float]:
        if self.total is None:
            return {}
        means = distributed.all_reduce(self.total / self.count, "mean").tolist()
        self.total = None
        self.count = 0
        return dict(zip(self.names, means, strict=True))

    def state_dict(self) -> dict:
        total = None if self.total is None else self.total.cpu()
        return {"names": self.names, "total": total, "count": self.count}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.names = list(state["names"])
        self.count = state["count"]
        self.total = None if state["total"] is None else state["total"].to(device)


class Stopwatch:
    """Throughput between log points: samples/s, fraction of time spent waiting for data, MFU and
    memory."""

    def __init__(
        self,
        world: World,
        samples_per_step: int,
        flops_per_step: float = 0.0,
        peak_flops: float = 0.0,
    ):
        self.world = world
        self.samples = samples_per_step
        self.flops = flops_per_step
        self.peak = peak_flops
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def waiting(self, batches):
        """Next batch of the iterator `batches`; the time it takes counts as data wait."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    def read(self) -> dict[str, float]:
        """Figures since the last reading; call after the meters were read, which waited for the
        device."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        figures = {
            "images_per_s": self.steps * self.samples / seconds,
            "data_wait": self.waited / seconds,
            "step_s": seconds / max(1, self.steps),
        }
        if self.world.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        elif sys.platform == "linux":
            figures["memory_gb"] = peak_resident_bytes() / 1e9
        if self.flops and self.peak:
            figures["mfu"] = self.flops * self.steps / seconds / self.peak
        self.restart()
        return figures


class RunLog:
    """Writes on rank 0 only: `log.jsonl`, TensorBoard events in `tensorboard/`, W&B where `wandb`
    is not `off`.

    Opening for a resumed run cuts lines of steps at or after `first_step`, which are about to be
    written again.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        config: dict,
        first_step: int = 0,
        *,
        tensorboard: bool = True,
        wandb: str = "off",
    ):
        self.main = world.is_main
        self.writer = None
        self.wandb = None
        self.bar = None
        if not self.main:
            return
        self.path = folder / "log.jsonl"
        with file_errors(self.path, RESUMABLE):
            folder.mkdir(parents=True, exist_ok=True)
            keep_before(self.path, first_step)
            self.file = self.path.open("ab", buffering=0)  # a full disk shows at once
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _quiet_about_full_disks
            events = folder / "tensorboard"
            with file_errors(events, f"{RESUMABLE}, or use --tensorboard false"):
                self.writer = SummaryWriter(str(events), purge_step=first_step)
        if wandb != "off":
            self.wandb = _start_wandb(folder, config, wandb)

    def banner(self, title: str, **facts) -> None:
        """Print the title and what the configuration comes to, one aligned line a fact."""
        if not self.main:
            return
        width = max(map(len, facts))
        print(title)
        for name, value in facts.items():
            print(f"  {name.replace('_', ' '):<{width}}  {value}")
        sys.stdout.flush()

    def progress(self, total: int, done: int) -> None:
        """Start the progress bar of the training loop."""
        if not self.main:
            return
        self.bar = progress_bar(total=total, initial=done, unit="step")

    def tick(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def write(self, step: int, **values) -> None:
        """One line of `log.jsonl` with `step` and `values` (numbers or strings), and the same
        numbers elsewhere."""
        if not self.main:
            return
        numbers = {name: value for name, value in values.items() if is_number(value)}
        # JSON knows no NaN: a reader that is strict must still be able to read the line
        with file_errors(self.path, RESUMABLE):
            line = strict_json({"step": step, **values}).encode() + b"\n"
            while line:
                line = line[self.file.write(line) :]
        if self.writer is not None:
            with file_errors(self.writer.log_dir, f"{RESUMABLE}, or use --tensorboard false"):
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        if self.bar is not None:
            shown = {}
            for name, value in numbers.items():
                if name.startswith("loss") or name in ("lr", "images_per_s"):
                    shown[name] = f"{value:.4g}"
            self.bar.set_postfix(shown, refresh=False)

    def sync(self) -> None:
        """Make the lines so far outlast a power failure. Where the file was removed, its lines from
        here on go to a new one."""
        if not self.main:
            return
        with file_errors(self.path, RESUMABLE):
            os.fsync(self.file.fileno())
            if not self.path.exists():
                self.say(f"warning: {self.path} was removed under way; a new one begins here")
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file.close()
                self.file = self.path.open("ab", buffering=0)

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar."""
        if not self.main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.main:
            with file_errors(self.path.parent, RESUMABLE):
                for sink in (self.bar, self.writer, self.file):
                    if sink is not None:
                        sink.close()
            if self.wandb is not None:
                self.wandb.finish()


def is_number(value: object) -> bool:
    """Whether a value can be drawn as a curve."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log whose `step` is >= `step`, and a last line that a kill cut
    short."""
    if not path.exists():
        return
    kept = []
    damaged = 0
    *lines, last = path.read_bytes().split(b"\n")
    for line in [*lines, last]:
        try:
            record = parse_json(line, path, dict)
        except UserError:
            damaged += line is not last
            continue
        at = record.get("step", -1)
        if not isinstance(at, int):
            damaged += 1
        elif at < step:
            kept.append(line + b"\n")
    if damaged:
        print(f"{path}: {damaged} damaged lines left out", file=sys.stderr, flush=True)
    write_bytes(path, b"".join(kept))


def logged_values(path: Path, name: str) -> dict[int, float]:
    """The numbers called `name` in a JSONL log, by step; of a line that a kill cut short none."""
    found = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            if name.encode() not in line:
                continue
            with contextlib.suppress(UserError, ValueError, TypeError):
                record = parse_json(line, path, dict)
                if name in record and isinstance(record.get("step"), int):
                    found[record["step"]] = float(record[name])  # NaN is text there
    return found


def _quiet_about_full_disks(failure) -> None:
    """TensorBoard's thread hands an OSError over to the next call, which reports it: no traceback."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _start_wandb(folder: Path, config: dict, mode: str):
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"--wandb {mode}: the package is not installed; `pip install wandb`, or --wandb off"
        ) from None
    # one W&B run over all resumes, whose id is kept in the folder; it takes no step a second time,
    # so that a run from scratch is another one
    note = folder / "wandb_id.txt"
    if not note.exists() or starts_over(config.get("resume", "auto")):
        write_text(note, secrets.token_hex(8))
    try:
        return wandb.init(
            project="quintet",
            dir=str(folder),
            config=config,
            mode=mode,
            id=note.read_text(),
            resume="allow",
        )
    except wandb.Error as error:  # no key, a key that is refused, no network
        remedy = "run `wandb login`, or write --wandb offline"
        raise UserError(f"--wandb {mode}: {first_line(error)}; {remedy}") from None
