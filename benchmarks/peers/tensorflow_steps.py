"""A training step of the originals in TensorFlow: threads, clock and number of parameters.

Runs in an interpreter that has TensorFlow (2.12.1 was tried) and need not have torch.
"""

from collections.abc import Callable
from types import SimpleNamespace

from benchmarks.gauge import measure


def limit_threads(options: SimpleNamespace) -> None:
    """Call before anything of TensorFlow runs."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def measure_graph(step: Callable, weights: Callable[[], list], options: SimpleNamespace) -> dict:
    """`measure` of a step that returns the loss as a tensor; its first call builds the graph and
    the `weights`."""
    import numpy as np
    import tensorflow as tf

    step()
    result = measure(lambda: step().numpy(), options)
    result["parameters"] = sum(int(np.prod(weight.shape)) for weight in weights())
    result["library"] = f"TensorFlow {tf.__version__}"
    return result
