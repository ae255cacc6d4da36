"""The endless, deterministic, exactly resumable stream of training batches, and in-order loading
for evaluation."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from base.distributed import ALONE, World
from base.errors import BadSample, UserError
from dataset.images.decode import reading
from dataset.loading.randomness import mix, permuted, seeded
from dataset.loading.workers import signals_held, worker_init

COUNTS = ("bad", "missing", "truncated")  # of samples, in the position of a worker
EARLY = "the image ends early; its missing rows are grey"
LISTED = 20  # bad samples named when the budget is exceeded
ENOUGH = 1000  # samples after which the fraction of bad ones means something


class RecordSource:
    """Annotations in shuffled order: an endless sequence of epochs, each a permutation, dealt out
    to all workers.

    records: a sequence of dicts. build: makes a sample of a record (to which `index`, its number,
    is added); raises BadSample to drop it. Worker j of T takes places j, j+T, j+2T ... of the
    sequence; its position is how many it took.
    """

    def __init__(
        self, records: Sequence[dict], build: Callable[[dict], dict], name: str = "records"
    ):
        if not len(records):
            raise UserError(f"{name}: no records")
        self.records, self.build, self.name = records, build, name

    def __len__(self) -> int:
        return len(self.records)

    def start(self, taken: int, slot: int, slots: int) -> int:
        """Position of every worker once all have taken about `taken` records together."""
        return taken // slots

    def read(
        self, seed: int, slot: int, slots: int, position: int
    ) -> Iterator[tuple[int, dict, int]]:
        """Endless `(sample seed, record, position after it)` for worker `slot` of `slots`."""
        while True:
            epoch, place = divmod(slot + position * slots, len(self.records))
            index = permuted(place, len(self.records), mix(seed, epoch))
            position += 1
            yield mix(seed, epoch, index), {**self.records[index], "index": index}, position


class Stream:
    """A mixture of sources and the collate function that makes a batch (dict of tensors) of their
    samples.

    sources: each a RecordSource or ShardSource. weights: fraction of each in the samples drawn, by
    default its fraction of all samples. Sources take turns so that after any number of draws each
    is within one sample of its fraction. exif: turn images by their EXIF orientation.
    `len(stream)`, the samples of one epoch, is the sum over the sources.
    """

    def __init__(
        self,
        sources: Sequence,
        collate: Callable[[list[dict]], dict],
        weights: Sequence[float] | None = None,
        exif: bool = False,
    ):
        self.exif = exif
        weights = list(weights or map(len, sources))
        if not sources or len(weights) != len(sources) or min(weights) <= 0:
            raise UserError(
                f"{len(sources)} sources with weights {weights}: give every source one positive weight"
            )
        self.sources, self.collate = list(sources), collate
        self.shares = [weight / sum(weights) for weight in weights]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def start(self, taken: int, slot: int, slots: int) -> dict:
        """Position of worker `slot` of `slots` once all have taken about `taken` samples together.

        Per source: `at` its own position; `drawn`, `bad` and `truncated` the samples that this
        worker drew, dropped, and used though their image ended early; `missing`, samples counted as
        bad without being drawn, because the rest of a shard was lost.
        """
        counts = [int(taken * share) for share in self.shares]
        at = [
            source.start(count, slot, slots)
            for source, count in zip(self.sources, counts, strict=True)
        ]
        drawn = [count // slots for count in counts]
        return {"at": at, "drawn": drawn, **{name: [0] * len(counts) for name in COUNTS}}

    def batches(
        self, batch_size: int, seed: int, slot: int, slots: int, position: dict
    ) -> Iterator[tuple]:
        """Endless `(batch, position after it, messages about the bad samples dropped on the way,
        messages about truncated images)`.

        The samples and the batch depend on their own seeds only; the global random generators are
        left as they were.
        """
        position = copy.deepcopy(position)
        readers = [
            source.read(mix(seed, number), slot, slots, at)
            for number, (source, at) in enumerate(zip(self.sources, position["at"], strict=True))
        ]
        samples, dropped, truncated, batch_seed = [], [], [], 0
        while True:
            number = self._next_source(position["drawn"])
            source = self.sources[number]
            sample_seed, record, position["at"][number] = next(readers[number])
            position["drawn"][number] += 1
            batch_seed = mix(batch_seed, sample_seed)
            try:
                if isinstance(record, BadSample):
                    raise record
                with seeded(sample_seed), reading(self.exif) as noticed:
                    samples.append(source.build(record))
                position["truncated"][number] += bool(noticed.truncated)
                truncated += [f"{source.name}: {name}: {EARLY}" for name in noticed.truncated]
            except BadSample as error:
                lost = error.lost or 1
                position["bad"][number] += lost
                position["missing"][number] += lost - 1
                dropped.append(f"{source.name}: {error}")
            if len(dropped) >= max(batch_size, min(ENOUGH, len(self))):
                raise UserError(too_many(dropped, len(dropped), len(dropped) + len(samples)))
            if len(samples) == batch_size:
                with seeded(batch_seed):
                    batch = self.collate(samples)
                yield batch, copy.deepcopy(position), dropped[:LISTED], truncated[:LISTED]
                samples, dropped, truncated, batch_seed = [], [], [], 0

    def _next_source(self, drawn: list[int]) -> int:
        """The source that lags most behind its fraction."""
        total = sum(drawn) + 1
        lags = [share * total - count for share, count in zip(self.shares, drawn, strict=True)]
        return lags.index(max(lags))


class StreamLoader:
    """Iterator over the endless stream of one rank's batches, made by `workers` processes (0: in this process).

    world: this rank and how many there are; batches for CUDA are pinned. steps_per_epoch: batches per rank and epoch.
    errors: bad samples dropped so far per source. state_dict() refers to the last batch handed out; passing it as
    `state` continues behind it, exactly if nothing about data, seed, ranks and workers has changed, otherwise at about
    the same fraction of the data, with a warning.
    error_budget: fraction of bad samples (after the first thousand, or all) above which a UserError
    lists them.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        workers: int = 4,
        world: World = ALONE,
        seed: int = 0,
        state: dict | None = None,
        error_budget: float = 0.01,
        prefetch: int = 2,
    ):
        samples = batch_size * world.size
        self.steps_per_epoch = len(stream) // samples
        if not self.steps_per_epoch:
            raise UserError(
                f"a batch of {batch_size} on each of {world.size} ranks needs {samples} samples, "
                f"but there are only {len(stream)}; lower batch_size or add data"
            )
        self.stream, self.batch_size, self.seed, self.error_budget = (
            stream,
            batch_size,
            seed,
            error_budget,
        )
        self.workers, self.rank, self.world_size = workers, world.rank, world.size
        self.pin_memory, self.prefetch = world.device.type == "cuda", prefetch
        self.slots = max(workers, 1)
        self.bad_samples: list[str] = []
        self._named: set[str] = set()
        self._state = self._resume(state) if state else self._start(0)
        self._batches = None

    @property
    def errors(self) -> dict[str, int]:
        return self._counted("bad")

    @property
    def truncated(self) -> dict[str, int]:
        """Samples used so far whose image ended early, per source."""
        return self._counted("truncated")

    def _counted(self, name: str) -> dict[str, int]:
        counts = zip(*(slot[name] for slot in self._state["slots"]), strict=True)
        return {
            source.name: sum(count)
            for source, count in zip(self.stream.sources, counts, strict=True)
        }

    def state_dict(self) -> dict:
        return copy.deepcopy(self._state)

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> dict:
        if self._batches is None:
            with signals_held():
                self._batches = iter(self._data_loader())
        try:
            batch, slot, position, dropped, truncated = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise  # a mistake in our code
            raise UserError(
                f"a data loading worker died ({error}); often the machine was out of memory or of shared memory: "
                "use fewer workers, a smaller shuffle_buffer or a larger /dev/shm"
            ) from error
        if isinstance(batch, UserError):
            raise batch
        self._state["slots"][slot] = position
        self._state["batches"] += 1
        self._state["samples"] += self.batch_size * self.world_size
        self.bad_samples = (self.bad_samples + dropped)[:LISTED]
        self._name([f"unusable sample, left out: {message}" for message in dropped])
        self._name([f"damaged sample, used: {message}" for message in truncated])
        self._check_budget()
        return batch

    def _name(self, messages: list[str]) -> None:
        """Print what was not said before; after LISTED messages they are only counted."""
        for message in messages:
            if message in self._named or len(self._named) > LISTED:
                continue
            self._named.add(message)
            if len(self._named) > LISTED:
                message = "further unusable or damaged samples are counted, not named"
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stops the workers; the next batch asked for starts new ones behind the last batch handed
        out."""
        self._batches = None

    def _data_loader(self) -> DataLoader:
        slots = _Slots(
            self.stream, self.batch_size, self.seed, self.rank, self.world_size, self.state_dict()
        )
        return DataLoader(
            slots,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory,
            worker_init_fn=worker_init,
            prefetch_factor=self.prefetch if self.workers else None,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # its own, or starting it would draw from the global one
        )

    def _start(self, samples: int) -> dict:
        slots = self.slots * self.world_size
        own = [
            self.stream.start(samples, self.rank * self.slots + slot, slots)
            for slot in range(self.slots)
        ]
        return {"made_with": self._made_with(), "samples": samples, "batches": 0, "slots": own}

    def _made_with(self) -> dict:
        """What the order of the batches depends on."""
        sources = [[source.name, len(source)] for source in self.stream.sources]
        shares = [round(share, 9) for share in self.stream.shares]
        ranks = {"world_size": self.world_size, "workers": self.slots}
        return {"seed": self.seed, **ranks, "sources": sources, "shares": shares}

    def _resume(self, state: dict) -> dict:
        now = self._made_with()
        changed = [key for key, value in now.items() if state["made_with"].get(key) != value]
        if not changed:
            state = copy.deepcopy(state)
            for slot in state["slots"]:
                for name in COUNTS:  # checkpoints of earlier versions lack some
                    slot.setdefault(name, [0] * len(self.stream.sources))
            return state
        changes = ", ".join(f"{key} {state['made_with'].get(key)} -> {now[key]}" for key in changed)
        warnings.warn(
            f"data order changed on resuming ({changes}): continuing at about the same position",
            stacklevel=3,
        )
        return self._start(state["samples"])

    def _check_budget(self) -> None:
        slots = self._state["slots"]
        drawn = sum(sum(slot["drawn"]) + sum(slot["missing"]) for slot in slots)
        bad = sum(self.errors.values())
        if bad > self.error_budget * drawn and drawn >= min(ENOUGH, len(self.stream)):
            counts = ", ".join(f"{name} {count}" for name, count in self.errors.items())
            raise UserError(too_many(self.bad_samples, bad, drawn) + f"\nper source: {counts}")


class _Slots(IterableDataset):
    """The batches of one worker process: that of the slot whose turn it would be had loading never
    stopped."""

    def __init__(
        self, stream: Stream, batch_size: int, seed: int, rank: int, world_size: int, state: dict
    ):
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.rank, self.world_size, self.state = rank, world_size, state

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        positions = self.state["slots"]
        slot = (self.state["batches"] + (worker.id if worker else 0)) % len(positions)
        number, of = self.rank * len(positions) + slot, self.world_size * len(positions)
        try:
            batches = self.stream.batches(self.batch_size, self.seed, number, of, positions[slot])
            for batch, position, dropped, truncated in batches:
                yield batch, slot, position, dropped, truncated
        except (
            UserError
        ) as error:  # handed over as a value: raising it here would bury the message in a traceback
            while True:
                yield error, slot, positions[slot], [], []


def too_many(listed: list[str], bad: int, drawn: int) -> str:
    """The message that ends a run with too many bad samples."""
    lines = "\n  ".join(listed[:LISTED])
    return (
        f"{bad} of {drawn} samples are unusable, more than the error budget allows; fix the data or raise the budget. "
        f"The first {min(len(listed), LISTED)}:\n  {lines}"
    )


def _as_is(item):
    return item
