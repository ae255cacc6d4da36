"""One measurement in a process of its own, started by benchmarks.runner:

    python -m benchmarks.child MODULE:FUNCTION '{"batch": 4, ...}'

Prints the dictionary that the function returns of these options as a line of JSON; nothing for
None, as of processes beside the first. What the measured code prints goes to stderr.
"""

import contextlib
import importlib
import json
import sys
import types


def call(function: str, options: dict) -> dict | None:
    """Result of `MODULE:FUNCTION`."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(types.SimpleNamespace(**options))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = call(sys.argv[1], json.loads(sys.argv[2]))
    if result is not None:
        print(json.dumps(result))
