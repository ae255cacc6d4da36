"""One measurement in a process of its own.

    python -m benchmarks.child MODULE:FUNCTION '{"batch": 4, ...}'      # started by benchmarks.runner

Calls the function with the options and prints the dictionary that it returns as one line of JSON;
nothing for None, as of processes beside the first. What the measured code prints goes to stderr.
"""

import contextlib
import importlib
import json
import sys
import types


def call(function: str, options: dict) -> dict | None:
    """Result of `MODULE:FUNCTION` for these options."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(types.SimpleNamespace(**options))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = call(sys.argv[1], json.loads(sys.argv[2]))
    if result is not None:
        print(json.dumps(result))
