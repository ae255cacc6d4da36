"""The endless, deterministic, exactly resumable stream of training batches."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from base.distributed import ALONE, World, gather_objects
from base.errors import BadSample, UserError, lost_worker
from base.names import name_of
from dataset.images.decode import load_decoder, reading
from dataset.loading.randomness import generators_kept, mix, permuted, seed_generators
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
    sequence from `begin` on. Its position is [begin, how many it took, ranges of places before
    `begin` that it takes first], each range [first, end, stride]: what other workers left over.
    """

    def __init__(
        self, records: Sequence[dict], build: Callable[[dict], dict], name: str = "records"
    ):
        if not len(records):
            raise UserError(f"{name}: no records")
        self.records = records
        self.build = build
        self.name = name

    def __len__(self) -> int:
        return len(self.records)

    def start(self, taken: int, slot: int, slots: int) -> list:
        """Position of every worker once all have taken about `taken` records together."""
        return [0, taken // slots, []]

    def deal(self, before: Sequence, slots: int) -> list[list]:
        """Positions of `slots` workers that continue together where others were, all at `before`: no
        record of the sequence is taken twice, none is left out."""
        positions = [_record_position(position) for position in before]
        workers = len(positions)
        begin = positions[0][0]
        most = max(taken for _, taken, _ in positions)
        end = begin + most * workers
        left = [places for *_, ranges in positions for places in ranges if range(*places)]
        for worker, (_, taken, _) in enumerate(positions):
            if taken < most:
                left.append([begin + worker + taken * workers, end, workers])
        return [[end, 0, left[slot::slots]] for slot in range(slots)]

    def read(
        self, seed: int, slot: int, slots: int, position: list | int
    ) -> Iterator[tuple[int, dict, list]]:
        """Endless `(sample seed, record, position after it)` for worker `slot` of `slots`."""
        begin, taken, left = _record_position(position)
        for number, (first, end, stride) in enumerate(left, start=1):
            for place in range(first, end, stride):
                after = [[place + stride, end, stride], *left[number:]]
                yield *self._record(seed, place), [begin, taken, after]
        while True:
            place = begin + slot + taken * slots
            taken += 1
            yield *self._record(seed, place), [begin, taken, []]

    def _record(self, seed: int, place: int) -> tuple[int, dict]:
        """Sample seed and record at a place of the endless sequence."""
        epoch, place = divmod(place, len(self.records))
        index = permuted(place, len(self.records), mix(seed, epoch))
        return mix(seed, epoch, index), {**self.records[index], "index": index}


def _record_position(position: list | int) -> list:
    """Checkpoints of earlier versions hold only how many records a worker took."""
    return [0, position, []] if isinstance(position, int) else position


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
        self.sources = list(sources)
        self.collate = collate
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

    def deal(self, before: Sequence[dict], slots: int) -> list[dict]:
        """Positions of `slots` workers that continue together where others were, all at `before`."""
        dealt = []
        for number, source in enumerate(self.sources):
            dealt.append(source.deal([position["at"][number] for position in before], slots))
        positions = [{"at": list(at)} for at in zip(*dealt, strict=True)]
        for name in ("drawn", *COUNTS):
            counts = [position[name] for position in before]
            totals = [sum(count) for count in zip(*counts, strict=True)]
            for slot, position in enumerate(positions):
                position[name] = [total // slots + (slot < total % slots) for total in totals]
        return positions

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
        while True:
            with generators_kept():
                made = self._batch(batch_size, readers, position)
            yield made

    def _batch(self, batch_size: int, readers: list[Iterator], position: dict) -> tuple:
        """The next of `batches`; moves `position`, and leaves the global generators seeded."""
        samples = []
        dropped = []
        truncated = []
        batch_seed = 0
        while len(samples) < batch_size:
            number = self._next_source(position["drawn"])
            source = self.sources[number]
            sample_seed, record, position["at"][number] = next(readers[number])
            position["drawn"][number] += 1
            batch_seed = mix(batch_seed, sample_seed)
            try:
                if isinstance(record, BadSample):
                    raise record
                seed_generators(sample_seed)
                with reading(self.exif) as noticed:
                    sample = source.build(record)
                if check := getattr(self.collate, "check_sample", None):
                    check(sample)
                samples.append(sample)
                position["truncated"][number] += bool(noticed.truncated)
                truncated += [f"{source.name}: {name}: {EARLY}" for name in noticed.truncated]
            except BadSample as error:
                lost = error.lost or 1
                position["bad"][number] += lost
                position["missing"][number] += lost - 1
                dropped.append(f"{source.name}: {_named(record, error)}")
            if len(dropped) >= max(batch_size, min(ENOUGH, len(self))):
                raise UserError(too_many(dropped, len(dropped), len(dropped) + len(samples)))
        seed_generators(batch_seed)
        batch = self.collate(samples)
        return batch, copy.deepcopy(position), dropped[:LISTED], truncated[:LISTED]

    def _next_source(self, drawn: list[int]) -> int:
        """The source that lags most behind its fraction."""
        total = sum(drawn) + 1
        lags = [share * total - count for share, count in zip(self.shares, drawn, strict=True)]
        return lags.index(max(lags))


class StreamLoader:
    """Iterator over the endless stream of one rank's batches, made by `workers` processes (0: in this process).

    world: this rank and how many there are; batches for CUDA are pinned. steps_per_epoch: batches per rank and epoch.
    errors: bad samples dropped so far per source, by this process. state_dict() refers to the last batch handed
    out; passing it as `state` continues behind it. Other ranks or workers continue where all of them were together,
    no sample repeated or left out, given the states of all ranks in order. With other data or another seed they do at about the same
    fraction of the data, with a warning.
    error_budget: fraction of the data's samples that may be bad; where there are more (`_allowed`), a
    UserError lists them; on several processes `check_together` counts those of all.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        workers: int = 4,
        world: World = ALONE,
        seed: int = 0,
        state: dict | Sequence[dict] | None = None,
        error_budget: float = 0.01,
    ):
        samples = batch_size * world.size
        self.steps_per_epoch = len(stream) // samples
        if not self.steps_per_epoch:
            faults = _faults(stream.sources)
            unread = f", and {len(faults)} of them cannot be read ({faults[0]})" if faults else ""
            raise UserError(
                f"a batch of {batch_size} on each of {world.size} ranks needs {samples} samples, "
                f"but there are only {len(stream)}{unread}; lower batch_size or add data"
            )
        self.stream = stream
        self.batch_size = batch_size
        self.seed = seed
        self.error_budget = error_budget
        self.workers = workers
        self.rank = world.rank
        self.world_size = world.size
        self.pin_memory = world.device.type == "cuda"
        self.slots = max(workers, 1)
        self.bad_samples: list[str] = []
        self._named: set[str] = set()
        self._state = self._resume(state) if state else self._start(0)
        self._batches = None

    @property
    def samples(self) -> int:
        """Samples of the batches handed out so far, over all ranks."""
        return self._state["samples"]

    @property
    def errors(self) -> dict[str, int]:
        return self._counted("bad")

    @property
    def drawn(self) -> int:
        """Samples drawn so far by this process, those included that were lost with others."""
        return sum(sum(slot["drawn"]) for slot in self._state["slots"]) + self.missing

    @property
    def missing(self) -> int:
        """Of them those that were lost with others, the rest of a shard."""
        return sum(sum(slot["missing"]) for slot in self._state["slots"])

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

    def look_over(self, held_out: Mapping[str, Sequence[str]]) -> list[str]:
        """What a first look at a few samples notices, in lines; see `dataset.health.start`."""
        from dataset.health.start import look_over

        return look_over(self.stream.sources, self.stream.collate, held_out)

    def state_dict(self) -> dict:
        return copy.deepcopy(self._state)

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> dict:
        if self._batches is None:
            with signals_held(), warnings.catch_warnings():
                # more workers than cores: they are as asked for, since the order depends on them
                warnings.filterwarnings("ignore", "This DataLoader will create")
                self._batches = iter(self._data_loader())
        try:
            batch, slot, position, dropped, truncated = next(self._batches)
        except RuntimeError as error:
            if (sentence := lost_worker(error)) is None:
                raise  # a mistake in our code
            raise UserError(sentence) from error
        if isinstance(batch, UserError):
            raise batch
        self._state["slots"][slot] = position
        self._state["batches"] += 1
        self._state["samples"] += self.batch_size * self.world_size
        self.bad_samples = (self.bad_samples + dropped)[:LISTED]
        self._name([f"unusable sample, left out: {message}" for message in dropped])
        self._name([f"damaged sample, used: {message}" for message in truncated])
        # as all draw as many: this one has more bad samples than all together may have
        bad, drawn = sum(self.errors.values()), self.drawn * self.world_size
        if self._is_beyond(bad, drawn, self.missing):
            raise self._too_many([self.errors], self.drawn, self.bad_samples)
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
        if self.workers:
            load_decoder()
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

    def _resume(self, given: dict | Sequence[dict]) -> dict:
        states = copy.deepcopy([given] if isinstance(given, dict) else list(given))
        for slot in (slot for state in states for slot in state["slots"]):
            for name in COUNTS:  # checkpoints of earlier versions lack some
                slot.setdefault(name, [0] * len(self.stream.sources))
        state = states[self.rank % len(states)]
        now = self._made_with()
        changed = [key for key, value in now.items() if state["made_with"].get(key) != value]
        if not changed:
            return state
        if (
            set(changed) <= {"world_size", "workers"}
            and len(states) == state["made_with"]["world_size"]
        ):
            return self._deal(states)
        changes = ", ".join(f"{key} {state['made_with'].get(key)} -> {now[key]}" for key in changed)
        warnings.warn(
            f"data order changed on resuming ({changes}): continuing at about the same position",
            stacklevel=3,
        )
        return self._start(state["samples"])

    def _deal(self, states: Sequence[dict]) -> dict:
        """The state of this rank after those of other ranks, or of as many with other workers."""
        before = [slot for state in states for slot in state["slots"]]
        dealt = self.stream.deal(before, self.slots * self.world_size)
        own = dealt[self.rank * self.slots :][: self.slots]
        position = {"samples": states[0]["samples"], "batches": 0, "slots": own}
        return {"made_with": self._made_with(), **position}

    def check_together(
        self, errors: Sequence[Mapping[str, int]], drawn: int, missing: int = 0
    ) -> None:
        """UserError on every process where of the samples that all have drawn more are bad than the
        budget allows: one of many has by chance more than its share. errors: of each process;
        missing: see the property, of all."""
        if self._is_beyond(sum(sum(counts.values()) for counts in errors), drawn, missing):
            listed = dict.fromkeys(chain.from_iterable(gather_objects(self.bad_samples)))
            raise self._too_many(errors, drawn, list(listed))

    def _is_beyond(self, bad: int, drawn: int, missing: int) -> bool:
        enough = drawn >= min(ENOUGH, len(self.stream))
        return enough and bad > self._allowed(drawn, missing)

    def _allowed(self, drawn: int, missing: int) -> float:
        """The most bad samples among `drawn` of data that are within the budget.

        An epoch may begin with all of its bad samples: never more than the budget of whole epochs,
        those that have begun for the worker that is furthest ahead. Long before an epoch's end the
        bound is that of chance: four stds of a Poisson count and 4 above its mean, beside the
        `missing` samples, which a damaged shard takes all at once.
        """
        ahead = self.batch_size * (self.slots * self.world_size - 1)
        begun = 0
        for source, share in zip(self.stream.sources, self.stream.shares, strict=True):
            begun += math.ceil((share * drawn + ahead) / len(source)) * len(source)
        mean = self.error_budget * drawn
        # 0.29 of 100 is 28.999...
        return round(min(self.error_budget * begun, mean + 4 * math.sqrt(mean) + 4 + missing), 6)

    def _too_many(self, errors: Sequence[Mapping[str, int]], drawn: int, listed: list) -> UserError:
        sums = {name: sum(counts[name] for counts in errors) for name in errors[0]}
        counts = ", ".join(f"{name} {count}" for name, count in sums.items())
        message = too_many(listed, sum(sums.values()), drawn)
        return UserError(f"{message}\nper source: {counts}")


class _Slots(IterableDataset):
    """The batches of one worker process: that of the slot whose turn it would be had loading never
    stopped."""

    def __init__(
        self, stream: Stream, batch_size: int, seed: int, rank: int, world_size: int, state: dict
    ):
        self.stream = stream
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.state = state

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        positions = self.state["slots"]
        slot = (self.state["batches"] + (worker.id if worker else 0)) % len(positions)
        number = self.rank * len(positions) + slot
        of = self.world_size * len(positions)
        try:
            batches = self.stream.batches(self.batch_size, self.seed, number, of, positions[slot])
            for batch, position, dropped, truncated in batches:
                yield batch, slot, position, dropped, truncated
        except UserError as error:
            # handed over as a value: raising it here would bury the message in a traceback
            while True:
                yield error, slot, positions[slot], [], []


def _faults(sources: Sequence) -> list[str]:
    """What is wrong with samples of a few small sources that cannot even be taken out of a file."""
    drawn = chain.from_iterable(
        islice(source.read(0, 0, 1, source.start(0, 0, 1)), len(source)) for source in sources
    )
    return [str(record) for _, record, _ in drawn if isinstance(record, BadSample)]


def _named(record: dict | BadSample, error: BadSample) -> str:
    """What is wrong with a record, by its name."""
    named = "" if isinstance(record, BadSample) else name_of(record)
    return str(error) if named in str(error) else f"{named}: {error}"


def too_many(listed: list[str], bad: int, drawn: int) -> str:
    """The message that ends a run with too many bad samples."""
    lines = "\n  ".join(listed[:LISTED])
    return (
        f"{bad} of {drawn} samples are unusable, more than the error budget allows; fix the data or raise the budget. "
        f"The first {min(len(listed), LISTED)}:\n  {lines}"
    )


def _as_is(item):
    return item
