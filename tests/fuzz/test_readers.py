"""Damaged and hostile files of every format: only the project's own errors, in bounded time and
memory, and no wrong count.

Files are made from valid ones by hypothesis: JSON with a value exchanged anywhere, other formats
with bytes changed, cut out, repeated or cut off. The examples are the same on every run.
"""

import json
import resource
import shutil
import signal
import time
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base.errors import BadSample, UserError
from tests.fuzz.seeds import BINARIES, SAMPLES, TEXTS, tar_shard, tfrecord_shard

pytestmark = pytest.mark.slow
EXAMPLES = 100  # of each format
NEVER_REFUSED = ("statistics of a shard",)  # a wrong one is ignored
SECONDS = 10  # of processor time that one file may take
MIB = 300  # by which the peak of memory may grow through all files of a format

bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# ---- what is done to a file
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**30, -(2**63), 1e308, 0.5])
    | st.sampled_from(["", "x", "0.png", "1", "\ud800", "a\0b", "é" * 40, "../..", "nan"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["", "image", "caption", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def exchanged(draw, document):
    """A JSON value in which one value, anywhere, is another or missing."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 5)) == 0:
        return draw(values)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    changed = document.copy()
    if draw(st.integers(0, 5)) == 0:
        del changed[key]
    else:
        changed[key] = draw(exchanged(document[key]))
    return changed


@st.composite
def damaged(draw, data: bytes):
    """Bytes with one to three damages."""
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        start = draw(st.integers(0, size))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 512, 2048]))
        kind = draw(st.sampled_from(["set", "zero", "ones", "cut", "repeat", "end", "insert"]))
        end = min(size, start + length)
        if kind == "set":
            data = data[:start] + draw(st.binary(min_size=1, max_size=8)) + data[start + 1 :]
        elif kind in ("zero", "ones"):
            data = (
                data[:start] + (b"\0" if kind == "zero" else b"\xff") * (end - start) + data[end:]
            )
        elif kind == "cut":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[start:]
        elif kind == "end":
            data = data[:start]
        else:
            data = data[:start] + draw(st.binary(max_size=16)) + data[start:]
    return data


# ---- what must hold
class Hang(Exception):
    pass


@contextmanager
def time_limit(seconds: float):
    def late(*_):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check(read, folder: Path, data: bytes, suffix: str):
    """What `read` returns for a file of these bytes; None where it refuses it in one sentence."""
    place = folder / uuid.uuid4().hex  # a folder of its own: readers keep caches by path and time
    place.mkdir()
    path = place / f"file{suffix}"
    path.write_bytes(data)
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path)
    except (UserError, BadSample) as error:
        message = str(error)
        assert message and len(message) < 5000, message[:2000]
        return None
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("name", TEXTS)
def test_exchanged_values(name, tmp_path):
    read, document, suffix = TEXTS[name]
    before, refused = peak_mib(), []

    def encoded(value) -> bytes:
        lines = value if suffix == ".jsonl" and isinstance(value, list) else [value]
        return "\n".join(json.dumps(line) for line in lines).encode()

    assert check(read, tmp_path, encoded(document), suffix) is not None, "the valid file is refused"

    @bounded
    @given(exchanged(document))
    def run(value):
        refused.append(check(read, tmp_path, encoded(value), suffix) is None)

    run()
    assert any(refused) or name in NEVER_REFUSED
    assert peak_mib() - before < MIB


@pytest.mark.parametrize("name", BINARIES)
def test_damaged_bytes(name, tmp_path):
    read, make, suffix = BINARIES[name]
    before, valid, refused = peak_mib(), make(), []
    assert check(read, tmp_path, valid, suffix) is not None, "the valid file is refused"

    @bounded
    @given(damaged(valid))
    def run(data):
        refused.append(check(read, tmp_path, data, suffix) is None)

    run()
    assert peak_mib() - before < MIB


@pytest.mark.parametrize("kind", ["tar", "TFRecord"])
def test_counts(kind, tmp_path):
    """Samples read and samples reported lost are those that were written."""
    read, _, suffix = BINARIES[kind]
    valid = {"tar": tar_shard, "TFRecord": tfrecord_shard}[kind]()

    @settings(bounded, max_examples=5 * EXAMPLES)
    @given(
        place=st.integers(0, len(valid) - 1),
        length=st.sampled_from([1, 8, 100, 512, 1024, 1536, 5000]),
        fill=st.sampled_from([b"\0", b"\xff", b"a", None]),
    )
    def run(place, length, fill):
        if fill is None:
            data = valid[:place]
        else:
            data = valid[:place] + fill * length + valid[place + length :]
            data = data[: len(valid)]
        records = check(read, tmp_path, data, suffix)
        lost = sum(each.lost for each in records if isinstance(each, BadSample))
        whole = sum(not isinstance(each, BadSample) for each in records)
        assert whole + lost == SAMPLES, (whole, lost)

    run()


def test_the_time_limit_works():
    with pytest.raises(Hang), time_limit(0.2):
        end = time.process_time() + 5
        while time.process_time() < end:
            pass
