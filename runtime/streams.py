"""Standard output and error of a run that may take days."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class Lasting:
    """A standard stream that outlives its reader: where nobody takes what is said, as behind
    `| head` or on a full disk, it is lost, and said once on the other stream; the run is not."""

    def __init__(self, stream: TextIO, name: str):
        self.stream = stream
        self.name = name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _give_up(self, error: OSError) -> None:
        """What waits in the stream's buffer, and all that comes, goes nowhere."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        other = sys.stderr if self.name == "stdout" else sys.stdout
        said = f"{NAMES[self.name]} cannot be written ({error.strerror})"
        print(f"warning: {said}; the run continues, its results are in its folder", file=other)


def outlive_readers() -> None:
    """Make standard output and error lasting; one that is closed goes nowhere."""
    for name in NAMES:
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream, name))
