"""What the checks found, line by line."""

import traceback
from collections.abc import Callable
from pathlib import Path


class Report:
    """Lines of the checks so far, and the tracebacks of those that raised; both are in files as soon
    as they are there, if a path is given."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.failed = 0

    def check(self, title: str, work: Callable[[], float], limit: float) -> None:
        """work() gives a difference, which must not exceed the limit."""
        value = self.attempt(title, work)
        if value is not None:
            self._judge(title, value <= limit, f"{value:.2g} (limit {limit:g})")

    def attempt(self, title: str, work: Callable[[], float]) -> float | None:
        """What work() gives; where it raises, the check of that title has failed."""
        try:
            return work()
        except Exception as error:
            self._judge(
                title, False, f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            )
            self._keep_error(f"{title}\n{traceback.format_exc()}")
            return None

    def _judge(self, title: str, passed: bool, text: str) -> None:
        self.failed += not passed
        self.note(f"{'pass' if passed else 'FAIL'}  {title:<44} {text[:160]}")

    def note(self, line: str) -> None:
        self.lines.append(line)
        if self.path:
            print(line, flush=True)
            self.path.write_text("# GPU check\n\n```\n" + "\n".join(self.lines) + "\n```\n")

    def _keep_error(self, text: str) -> None:
        self.errors.append(text)
        if self.path:
            self.path.with_suffix(".errors.txt").write_text("\n\n".join(self.errors))

    def take(self, other: "Report") -> None:
        """What another process found."""
        for line in other.lines:
            self.note(line)
        for text in other.errors:
            self._keep_error(text)
        self.failed += other.failed
