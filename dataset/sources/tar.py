"""The one reader of WebDataset tar shards: members, their keys, and the samples they make.

Training, evaluation and counting walk a shard by the same rules, so that they see the same samples:

- The key of a member is its path up to the first dot of its file name, folders included; the rest,
  in lower case, is its ending. `./` in front is no part of it, accents are composed (NFC). Hidden
  files, and those in hidden folders, have no key.
- Adjacent members of one key are a sample. An ending that comes twice begins another sample.
- A damaged header does not end a shard: reading continues at the next whole header, and the loss is
  reported. TarFile would take the damage for the end of the archive.
- Sparse members, links and members beyond the limits below make their sample a bad one.
"""

import tarfile
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from base.limits import MEMBER_BYTES, NAME_BYTES, SAMPLE_BYTES, SAMPLE_MEMBERS, ZERO_BYTES
from base.names import is_hidden, is_hidden_folder
from base.text import looks_like, whole_number
from dataset.images.formats import IMAGE_TYPES
from dataset.sources.remote import describe

BLOCK = 512
RECORD = 20 * BLOCK  # archives are padded to a multiple of it
CHUNK = 1 << 20  # bytes skipped at a time where a file cannot seek
LOST = "what follows in this shard is lost"
# what to do about a part of a sample
SIDE_BY_SIDE = "the members of a sample must stand side by side (tar --sort=name)"
ZERO_BLOCK = bytes(BLOCK)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


@dataclass(frozen=True)
class Member:
    """A file in a tar: `size` bytes at `start`. fault: why it cannot be used."""

    name: str
    start: int
    size: int
    fault: str = ""


@dataclass(frozen=True)
class Damage:
    """A part of a tar that cannot be read. final: nothing behind it can be found."""

    reason: str
    final: bool = False


@dataclass
class Sample:
    """Members of one key by ending: their bytes, or (start, size) where they were not loaded.

    fault: what makes it a bad sample. rest: it stands for all that was left of the shard.
    """

    key: str = ""
    members: dict = field(default_factory=dict)
    fault: str = ""
    rest: bool = False


def no_image(members: Collection[str], kinds: Sequence[str]) -> str:
    """What is wrong with a sample that has these members, and none of the image's endings `kinds`."""
    dotted = next((name for name in members if name.rpartition(".")[2] in kinds), None)
    remedy = SIDE_BY_SIDE
    if dotted:
        remedy = f"keys end at the first dot, so that ?image={dotted} behind the shards names it"
    named = f" (.{', .'.join(kinds)})" if tuple(kinds) != IMAGE_TYPES else ""
    return f"no image{named}, only {', '.join(members)}; {remedy}"


def split_key(name: str) -> tuple[str, str] | None:
    """(key, ending) of a member's path; None for files that belong to no sample."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    folder, slash, file = name.lstrip("/").rpartition("/")
    stem, _, ending = file.partition(".")
    if not stem or not ending or is_hidden(file) or (folder and is_hidden_folder(folder)):
        return None
    # an accent is one letter or two (NFD), as the program that made the archive has it
    return unicodedata.normalize("NFC", folder + slash + stem), ending.lower()


class ReadFault(Exception):
    """The file ended early, or its storage or compression failed."""


class _Source:
    """Bytes of an open file by position. size: its length where it is known and the file can seek."""

    def __init__(self, file: BinaryIO, size: int | None):
        self.file = file
        self.size = size
        self.position = 0

    def read(self, count: int) -> bytes:
        """`count` bytes, or fewer at the end of the file. Raises ReadFault."""
        parts = []
        left = count
        while left:
            try:
                part = self.file.read(min(left, CHUNK))
            except Exception as error:  # decompressors and every storage service raise their own
                raise ReadFault(describe(error)) from None
            if not part:
                break
            parts.append(part)
            left -= len(part)
        self.position += count - left
        return b"".join(parts)

    def read_all(self, count: int) -> bytes:
        """`count` bytes. Raises ReadFault where the file ends before."""
        data = self.read(count)
        if len(data) < count:
            raise ReadFault("cut off")
        return data

    def skip_to(self, position: int) -> None:
        """Raises ReadFault where the file ends before."""
        if self.size is None:
            while self.position < position:
                self.read_all(min(CHUNK, position - self.position))
            return
        if position > self.size:
            raise ReadFault("cut off")
        if position != self.position:
            try:
                self.file.seek(position)
            except Exception as error:
                raise ReadFault(describe(error)) from None
            self.position = position


class TarWalk:
    """Members and damages of an open tar, in order: `for found in TarWalk(file, size)`.

    size: length of the file, where it is not compressed and can seek; otherwise it is read through.
    `read()` gives the content of the member found last.
    """

    def __init__(self, file: BinaryIO, size: int | None = None):
        self.source = _Source(file, size)
        self.beginning = 0  # of the archive: several may stand one behind the other
        self.last: Member | None = None
        self.header_block = b""

    def read(self) -> bytes:
        """Content of the last member. Raises ReadFault where the file ends before."""
        self.source.skip_to(self.last.start)
        return self.source.read_all(self.last.size)

    def __iter__(self) -> Iterator[Member | Damage]:
        try:
            yield from self._walk()
        except ReadFault as fault:
            yield Damage(f"{fault}; {LOST}", final=True)

    def _walk(self) -> Iterator[Member | Damage]:
        source = self.source
        while True:
            zeros, block = self._next_block()
            if not block:
                if not zeros:
                    raise ReadFault("cut off" if source.position else "empty file")
                return
            at = source.position - BLOCK
            header = self._parse(block)
            another_archive = zeros > 1 and (at - self.beginning) % RECORD == 0
            if header and another_archive:
                self.beginning = at
            elif zeros or not header:
                header = header or self._next_header()
                reason = "zeros in place of a header" if zeros else "a damaged header"
                place = f"{reason} at byte {at - zeros * BLOCK}"
                if header is None:
                    raise ReadFault(place + ("" if at else looks_like(block)))
                yield Damage(place)
            found = self._member(header)
            if found is not None:
                yield found
            if isinstance(found, Member):
                source.skip_to(found.start + _padded(found.size))

    def _next_block(self) -> tuple[int, bytes]:
        """Zero blocks passed over, and the block behind them: empty at the end of the file."""
        zeros = 0
        while zeros * BLOCK <= ZERO_BYTES:
            block = self.source.read(BLOCK)
            if block and len(block) < BLOCK and block.strip(b"\0"):
                is_all = self.source.position == len(block)
                raise ReadFault(f"no tar archive{looks_like(block)}" if is_all else "cut off")
            if block != ZERO_BLOCK:
                return zeros, block if len(block) == BLOCK else b""
            zeros += 1
        raise ReadFault(f"{ZERO_BYTES >> 20} MiB of zeros")

    def _next_header(self) -> tarfile.TarInfo | None:
        """The next whole header; None where there is none."""
        while len(block := self.source.read(BLOCK)) == BLOCK:
            if block[257:262] == b"ustar" and (header := self._parse(block)):
                return header
        return None

    def _parse(self, block: bytes) -> tarfile.TarInfo | None:
        """A header; None where the block is none, by its checksum."""
        self.header_block = block
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            return None
        return header if header.size >= 0 else None

    def _member(self, header: tarfile.TarInfo) -> Member | Damage | None:
        """What a header describes, with the extensions that stand before it; moves behind it."""
        source = self.source
        name = None
        size = None
        fault = ""
        while header.type in (b"L", b"K", b"x", b"g", b"X"):
            if header.size > NAME_BYTES:
                return self._refuse(header.size, f"a name of {header.size} bytes")
            data = source.read_all(_padded(header.size))[: header.size]
            if header.type == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in (b"x", b"X"):
                fields = _pax_fields(data)
                if fields is None:
                    return Damage(f"a damaged pax header at byte {source.position}")
                name = fields.get("GNU.sparse.name", fields.get("path", name))
                size = fields.get("size", size)
                if any(key.startswith("GNU.sparse") for key in fields):
                    fault = "a sparse file"
            block = source.read_all(BLOCK)
            header = self._parse(block)
            if header is None:
                return Damage(f"a damaged header at byte {source.position - BLOCK}")
        return self._file(header, name or header.name, header.size if size is None else size, fault)

    def _file(self, header, name: str, size: int | str, fault: str) -> Member | Damage | None:
        """The member itself; None for a folder."""
        source = self.source
        bytes_held = whole_number(size)
        if bytes_held is None or bytes_held < 0:
            return Damage(f"{name!r:.80}: a size of {size!r:.20}")
        size = bytes_held
        if header.type == tarfile.GNUTYPE_SPARSE:
            fault = "a sparse file"
            self._skip_sparse_map()
        elif header.type in LINKS:
            return self._remember(Member(name, source.position, 0, "a link to another file"))
        elif header.type in tarfile.SUPPORTED_TYPES and header.type not in REGULAR:
            return None  # a folder or a device: no content
        start = source.position
        if source.size is not None and start + size > source.size:
            return Damage(f"{name!r:.80}: {size} bytes, more than the file holds")
        if size > MEMBER_BYTES:
            fault = fault or f"{size} bytes, the limit is {MEMBER_BYTES}"
            if source.size is None:
                raise ReadFault(f"{name!r:.80}: {fault}")
        return self._remember(Member(name, start, size, fault))

    def _remember(self, member: Member) -> Member:
        self.last = member
        return member

    def _skip_sparse_map(self) -> None:
        """Behind an old GNU header stand blocks with more of the map of a sparse file."""
        more = self.header_block[482]
        while more:
            more = self.source.read_all(BLOCK)[504]

    def _refuse(self, size: int, reason: str) -> Damage:
        place = f"{reason} at byte {self.source.position}"
        if self.source.size is None or self.source.position + size > self.source.size:
            return Damage(place)  # looks for the next header from here
        self.source.skip_to(self.source.position + _padded(size))
        return Damage(place)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_fields(data: bytes) -> dict[str, str] | None:
    """Fields of a pax header, `LENGTH KEY=VALUE` a line; None where it is damaged."""
    fields = {}
    place = 0
    while place < len(data) and data[place]:
        number, _, _ = data[place : place + 20].partition(b" ")
        if not number.isdigit() or int(number) <= len(number) + 2:
            return None
        line = data[place + len(number) + 1 : place + int(number) - 1]
        key, equals, value = line.partition(b"=")
        if not equals or place + int(number) > len(data):
            return None
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += int(number)
    return fields


def read_samples(walk: TarWalk, load: bool = True) -> Iterator[Sample]:
    """The samples of a tar, the bad ones in their place.

    load: members as bytes; otherwise as (start, size), without reading them.
    What a damage took is found by comparison with the first sample of the shard: of the samples
    around it one that lacks a member is bad. Where neither does, a Sample without members stands
    for the loss.
    """
    usual: set[str] = set()  # endings of the first whole sample
    held = None  # until it is known whether a damage follows
    damage = None
    behind_first = None  # a damage behind the first sample: the next one shows whether it lacks any
    samples = 0
    for found in _groups(walk, load):
        if isinstance(found, Damage):
            if held and (_lacks(held, usual) or (samples == 1 and found.final)):
                _blame(held, found)
            elif samples == 1:
                behind_first = found
            else:
                damage = found
            continue
        if behind_first:
            usual |= found.members.keys()
            if _lacks(held, usual):
                _blame(held, behind_first)
            else:
                damage = behind_first
            behind_first = None
        if held:
            yield held
        if damage and _lacks(found, usual):
            _blame(found, damage)
        elif damage:
            yield Sample(fault=damage.reason)
        damage = None
        held = found
        samples += 1
        if not (usual or found.fault):
            usual = set(found.members)
    if held:
        yield held
    damage = damage or behind_first
    if damage:
        yield Sample(fault=damage.reason, rest=damage.final)
    elif held is None:
        yield Sample(fault="holds no samples", rest=True)


def _lacks(sample: Sample, usual: set[str]) -> bool:
    """Whether a sample beside a damage has lost a member to it."""
    if not usual:
        return not any(kind in sample.members for kind in IMAGE_TYPES)
    return not usual <= sample.members.keys()


def _blame(sample: Sample, damage: Damage) -> None:
    sample.fault = sample.fault or damage.reason
    sample.rest = damage.final


def _groups(walk: TarWalk, load: bool) -> Iterator[Sample | Damage]:
    """Samples, and between them the damages that are not inside one."""
    sample = None
    damage = None
    bytes_taken = 0
    for found in walk:
        if isinstance(found, Damage):
            damage = Damage(damage.reason if damage else found.reason, found.final)
            continue
        split = split_key(found.name)
        if split is None:
            continue
        key, ending = split
        if sample is None or key != sample.key or ending in sample.members:
            if sample:
                yield sample
            if damage:
                yield damage
            sample = Sample(key)
            bytes_taken = 0
        elif damage:
            sample.fault = sample.fault or damage.reason
        damage = None
        bytes_taken += found.size
        sample.fault = sample.fault or _fault(found, sample, bytes_taken)
        if sample.fault:
            continue
        try:
            sample.members[ending] = walk.read() if load else (found.start, found.size)
        except ReadFault as fault:
            damage = Damage(f"{fault}; {LOST}", final=True)
            break
    if sample:
        yield sample
    if damage:
        yield damage


def _fault(member: Member, sample: Sample, bytes_taken: int) -> str:
    """Why a member makes its sample a bad one; "" where it does not."""
    if member.fault:
        return f"{member.name!r:.80}: {member.fault}"
    if bytes_taken > SAMPLE_BYTES:
        return f"{bytes_taken} bytes, the limit is {SAMPLE_BYTES}"
    if len(sample.members) >= SAMPLE_MEMBERS:
        return f"more than {SAMPLE_MEMBERS} members"
    return ""
