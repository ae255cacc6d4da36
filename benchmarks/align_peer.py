"""One measurement of benchmarks.align: the training step of the original, TensorFlow's COYO-ALIGN,
from a checkout.

Called by benchmarks.align with its settings as JSON, by an interpreter that has TensorFlow (2.12.1
was tried) and the other packages; prints the result as JSON. Network, loss and optimizer are the
original's own, in float32 and as one graph; the data is random.
"""

import importlib
import json
import os
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

RENAMED = (
    "backend",
    "applications.imagenet_utils",
    "engine.training",
    "utils.data_utils",
    "utils.layer_utils",
)


def build(tf, options: dict):
    """The original's model and optimizer."""
    for name in RENAMED:  # the private names of the TensorFlow that it was written for
        module, legacy = importlib.import_module(f"keras.{name}"), f"tensorflow.python.keras.{name}"
        folder, _, leaf = legacy.rpartition(".")
        sys.modules[legacy] = module
        setattr(sys.modules.setdefault(folder, types.ModuleType(folder)), leaf, module)
    sys.path.insert(0, options["peer"])
    import tensorflow_addons as tfa

    from models import efficientnet

    normalise = partial(
        tf.keras.layers.BatchNormalization, virtual_batch_size=options["virtual_batch"]
    )
    efficientnet.get_norm = lambda: normalise  # 16 is written there
    from align import ALIGN

    _, image, text = options["model"].lower().split("_")
    model = ALIGN(f"efficientnet-{image}", f"bert-{text}", 640, options["length"], 30522)
    decay = {"weight_decay_rate": 1e-5, "exclude_from_weight_decay": ["bn/"]}
    model.compile(optimizer=tfa.optimizers.LAMB(learning_rate=5e-3, **decay))
    return model


def main(options: dict) -> dict:
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    model = build(tf, options)
    size, length, rng = options["batch"], options["length"], np.random.default_rng(0)
    image = tf.constant(rng.uniform(0, 255, (size, 289, 289, 3)).astype(np.float32))
    ids = tf.constant(rng.integers(1000, 30522, (size, length)), tf.int32)
    text = {
        "input_ids": ids,
        "attention_mask": tf.ones_like(ids),
        "token_type_ids": tf.zeros_like(ids),
    }
    step = tf.function(lambda: model.train_step((image, text)))
    step()  # builds the graph
    seconds, cpu = [], []
    for turn in range(options["warmup"] + options["steps"]):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()["loss"].numpy()
        if turn >= options["warmup"]:
            seconds.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - cpu_begin)
    status = Path("/proc/self/status").read_text()
    peak = (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )
    medians = {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "peak_bytes": peak,
    }
    count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    return medians | {
        "device": "cpu",
        "gpu": "",
        "torch": f"TensorFlow {tf.__version__}",
        "parameters": count,
    }


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(json.dumps(main(json.loads(sys.argv[1]))))
