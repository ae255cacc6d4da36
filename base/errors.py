"""The exceptions of the project: mistakes a user can fix, data that is missing, and samples that
cannot be used."""

import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A configuration, file, checkpoint or command line that cannot be used.

    The message names the file or key and says what to do. Scripts print it without a traceback and
    exit with status 2.
    """


class UnfitWeights(UserError):
    """Weights of another network than the one that they are loaded into; who knows their file names
    it."""


class MissingData(UserError):
    """A data set that is not on this machine; the message says where it was looked for and how to
    get it."""


class BadSample(ValueError):
    """One unusable sample (unreadable image, empty caption). It is counted and dropped, within a
    budget.

    lost: samples that are lost with it; more than one where it stands for the rest of a shard.
    """

    def __init__(self, message: str = "", lost: int = 1):
        super().__init__(message)
        self.lost = lost


@contextmanager
def naming(option: str, source: object) -> Iterator[None]:
    """A UserError inside begins with the option and its file, where it does not name the file."""
    try:
        yield
    except UserError as error:
        if str(source) in str(error):
            raise
        raise UserError(f"{option} {source}: {error}") from None


def unknown(name: str, value: object, known: Iterable[str]) -> UserError:
    """The error for an option `name` whose value is none of the `known` ones."""
    *others, last = known
    choices = f"{', '.join(others)} or {last}" if others else last
    return UserError(f"{name} {value!r} is unknown; use {choices}")


def no_such_class(place: object, label: int, classes: int) -> UserError:
    """The error for a label of `place` that is none of so many classes."""
    return UserError(
        f"{place}: label {brief(label)} is outside the list of {classes} classes; give the right "
        "--classes or --num-classes, or fix the label"
    )


def lost_worker(error: BaseException) -> str | None:
    """One sentence where torch says that a loader's process died: it raises that wherever the main
    thread is; None for any other error."""
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")):
        return None
    return (
        f"a data loading worker died ({error}); often the machine was out of memory or of shared memory: "
        "use fewer workers, a smaller shuffle_buffer or a larger /dev/shm"
    )


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 120


def brief(value: object) -> str:
    """`repr` of a value for messages, cut to about a line however long, deep or circular it is."""
    return SHORT.repr(value)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: libraries' errors run over many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
