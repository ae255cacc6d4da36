"""How a run's checkpoints are written: as one file by rank 0, or by every process its part; while
training waits, or beside it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from base import distributed
from base.distributed import World, unwrap
from runtime.background import Background, together
from runtime.checkpoint import RESUMABLE, CheckpointFolder
from runtime.sharded import Staging, outline, own_pieces, with_tensors, write_part

SINGLE_BYTES = 2 << 30  # weights and optimizer state of more are sharded by `auto`


def state_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: weights and buffers, and two moments of Adam."""
    tensors = [*model.parameters(), *model.buffers()]
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in tensors) + moments


def is_sharded_format(wanted: str, model: nn.Module, world: World, parallel: str) -> bool:
    """What `--checkpoint_format` comes to: `auto` shards on several processes what FSDP shards, or
    what is large."""
    if wanted == "auto":
        return world.size > 1 and (parallel == "fsdp" or state_bytes(model) > SINGLE_BYTES)
    return wanted == "sharded"


class Saver:
    """Writes the checkpoints of one run.

    in_background: `save` returns when the state is copied to host memory; the write before must be
    done by then. Whatever fails is raised by `wait`, on every process.
    """

    def __init__(
        self,
        checkpoints: CheckpointFolder,
        world: World,
        *,
        sharded: bool,
        in_background: bool,
        fresh: bool,
    ):
        self.checkpoints = checkpoints
        self.world = world
        self.sharded = sharded
        self.in_background = in_background
        self.fresh = fresh  # the best checkpoint in the folder is that of an earlier run
        self.background = Background()
        self.staging = Staging()
        self.number = 0  # writes on which all processes agreed

    def save(self, model, optimizer, about: dict, own: dict, step: int) -> None:
        """Write a checkpoint (collective). about: plain values; own: those of this process."""
        self.wait()
        stage = self._part if self.sharded else self._whole
        write = stage(model, optimizer, about, own, step)
        if self.in_background:
            self.background.start(write)
        else:
            write()

    @property
    def failure(self) -> str | None:
        """What a write failed with, in one line."""
        return self.background.failure

    def wait(self) -> None:
        """Until the write under way is done. Raises what it failed with."""
        self.background.wait()

    def _whole(self, model, optimizer, about, own, step) -> Callable[[], None]:
        """One file, gathered by all and written by rank 0."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = dcp.get_state_dict(model, optimizer, options=options)
        state = {"model": weights, "optimizer": moments, **about}
        state["per_rank"] = distributed.gather_objects(own)
        if self.in_background and self.world.is_main:
            state = copied_to_host(state)

        def write() -> None:
            self._set_best_aside()
            self.checkpoints.save(state, step)

        if not self.in_background:
            return lambda: distributed.on_main(write, share=False)
        return self._together(lambda: "", lambda _: write())

    def _part(self, model, optimizer, about, own, step) -> Callable[[], None]:
        """Every process writes what it owns into one folder."""
        from torch.distributed.checkpoint import state_dict as dcp

        weights, moments = dcp.get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        buffers = {("model", name) for name, _ in unwrap(model).named_buffers()}
        pieces = self.staging.copy(own_pieces(state, self.world, buffers))
        own = copied_to_host(own)
        index = {**outline(state), **copied_to_host(about)}
        folder = self.checkpoints.unfinished(step)
        rank = self.world.rank

        def part() -> str:
            return write_part(folder, rank, pieces, own, RESUMABLE)

        def commit(hashes: list[str]) -> None:
            self._set_best_aside()
            self.checkpoints.commit(index, hashes, step)

        return self._together(part, commit)

    def _set_best_aside(self) -> None:
        """Before the first checkpoint of a run that is not resumed."""
        if self.fresh:
            self.checkpoints.set_best_aside()
        self.fresh = False

    def _together(self, part, finish) -> Callable[[], None]:
        self.number += 1
        number = self.number
        return lambda: together(self.world, number, part, finish)


def copied_to_host(state: Any) -> Any:
    """The state with containers and tensors of its own."""
    return with_tensors(state, lambda _, tensor: tensor.detach().to("cpu", copy=True))
