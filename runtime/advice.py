"""What a user can do about an error, in one sentence that the script ends with."""

import errno
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

from base.errors import UserError, first_line, lost_worker
from base.processes import SENTENCE_FILE

P = ParamSpec("P")
# how gloo, NCCL and torch's store say that a process at the other end has gone
GONE = re.compile(
    r"gloo.*(closed by peer|reset by peer|broken pipe)|remote process (has )?exited"
    r"|did the remote server shutdown or crash",
    re.IGNORECASE | re.DOTALL,
)
# what a system says about a file that someone named, and that no code of ours can help
OF_THE_SYSTEM = {
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE),
}
OTHER_RANKS_WAIT = 3.0  # seconds, see `leave_with`


def launched_rank() -> str:
    """Rank of this process as the launcher says, before the processes have joined."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a GPU is used up."""
    said = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or said


def has_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the run has gone."""
    return isinstance(error, RuntimeError) and GONE.search(str(error)) is not None


def advice_on(error: BaseException) -> str | None:
    """One sentence about a mistake of the user or a limit of the machine; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if sentence := lost_worker(error):
        return sentence
    if is_exhausted(error):
        return f"out of memory ({first_line(error)}); make batch_size smaller and accumulate larger"
    if isinstance(error, OSError):
        if error.errno not in OF_THE_SYSTEM or error.filename is None:
            return None
        return (
            f"{error.filename!s:.300}: {error.strerror}; name another file, or make this one usable"
        )
    if has_lost_peer(error):
        return (
            "another process of this run has ended, this one cannot go further without it; what "
            "ended it is in its own output. Start the same command again to resume"
        )
    before, of_torch, _ = str(error).partition(" does not have a deterministic implementation")
    if of_torch:  # compilers put lines of their own around the sentence
        return (
            f"--deterministic: {before.split()[-1]} has no deterministic kernel in this torch on "
            "this device; leave --deterministic out"
        )
    return None


ROOT = Path(__file__).resolve().parents[1]
_in_full = warnings.formatwarning


def format_warning(message, category, filename, lineno, line=None) -> str:
    """`warning: MESSAGE` of this repository's own, without a line of its code; libraries' as ever.
    For `warnings.formatwarning`."""
    place = Path(filename)
    own = place.is_relative_to(ROOT) and "site-packages" not in place.parts
    if own and category is UserWarning:
        return f"warning: {message}\n"
    return _in_full(message, category, filename, lineno, line)


def ends_with_advice(main: Callable[P, int]) -> Callable[P, int]:
    """The `main` of a tool, whose status is 2 after one line on stderr where the user can help."""

    @wraps(main)
    def tool(*words: P.args, **named: P.kwargs) -> int:
        warnings.formatwarning = format_warning
        try:
            return main(*words, **named)
        except (UserError, OSError, MemoryError) as error:
            if (advice := advice_on(error)) is None:
                raise
            print(f"error: {advice}", file=sys.stderr)
            return 2

    return tool


def leave_with(advice: str, status: int = 2) -> NoReturn:
    """End the script with one line on stderr; status 2: the user can fix it.

    On other ranks than 0 the message waits: where all ranks fail alike, the launcher ends them
    meanwhile and it is printed once; where one rank alone fails, it is not lost.
    """
    rank = launched_rank()
    if rank != "0":
        time.sleep(OTHER_RANKS_WAIT)
    if file := os.environ.get(SENTENCE_FILE):  # the script that started this one ends with it
        Path(file).write_text(advice, encoding="utf-8", errors="backslashreplace")
    else:
        where = "error" if rank == "0" else f"error on rank {rank}"
        sentence = f"{where}: {advice}"
        print(sentence, file=sys.stderr, flush=True)
        tell_torchrun(sentence)
    if "base.distributed" in sys.modules:  # a script without torch does not load it for this
        sys.modules["base.distributed"].leave(status)
    sys.exit(status)


def tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it: its own report of a failed process, which nothing
    here can prevent, then ends with the sentence instead of a link."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    about = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))
