"""The original's side of benchmarks.align: TensorFlow's COYO-ALIGN out of a checkout.

Its interpreter also needs tensorflow-addons and transformers 4.38. Network, loss and optimizer are
the original's own, in float32 and as one graph; the data is random.
"""

import importlib
import sys
import types
from functools import partial

from benchmarks.peers.tensorflow_steps import limit_threads, measure_graph

RENAMED = (
    "backend",
    "applications.imagenet_utils",
    "engine.training",
    "utils.data_utils",
    "utils.layer_utils",
)
SIDE = 289  # pixels, fixed in the original


def build_model(options: types.SimpleNamespace):
    """The original's model, compiled with its optimizer."""
    import tensorflow as tf

    for name in RENAMED:  # the private names of the TensorFlow that it was written for
        module = importlib.import_module(f"keras.{name}")
        legacy = f"tensorflow.python.keras.{name}"
        folder, _, leaf = legacy.rpartition(".")
        sys.modules[legacy] = module
        setattr(sys.modules.setdefault(folder, types.ModuleType(folder)), leaf, module)
    sys.path.insert(0, options.peer)
    import tensorflow_addons as tfa

    from models import efficientnet

    norm = partial(tf.keras.layers.BatchNormalization, virtual_batch_size=options.virtual_batch)
    efficientnet.get_norm = lambda: norm  # it has 16
    from align import ALIGN

    _, image, text = options.model.lower().split("_")
    model = ALIGN(f"efficientnet-{image}", f"bert-{text}", 640, options.length, 30522)
    optimizer = tfa.optimizers.LAMB(
        learning_rate=5e-3, weight_decay_rate=1e-5, exclude_from_weight_decay=["bn/"]
    )
    model.compile(optimizer=optimizer)
    return model


def step(options: types.SimpleNamespace) -> dict:
    """A training step."""
    import numpy as np
    import tensorflow as tf

    limit_threads(options)
    model = build_model(options)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (options.batch, SIDE, SIDE, 3)).astype(np.float32)
    image = tf.constant(pixels)
    ids = tf.constant(rng.integers(1000, 30522, (options.batch, options.length)), tf.int32)
    text = {
        "input_ids": ids,
        "attention_mask": tf.ones_like(ids),
        "token_type_ids": tf.zeros_like(ids),
    }
    train = tf.function(lambda: model.train_step((image, text))["loss"])
    return measure_graph(train, lambda: model.trainable_variables, options)
