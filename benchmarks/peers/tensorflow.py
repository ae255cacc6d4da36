"""The originals' sides of benchmarks.vit and benchmarks.align: COYO-ViT and COYO-ALIGN out of their
checkouts, in float32 and as one graph. The interpreter has TensorFlow (2.12.1 was tried), for
COYO-ALIGN also tensorflow-addons and transformers 4.38, and need not have torch."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import tensorflow as tf

from benchmarks.child import measure

SIDE = 289  # pixels, fixed in COYO-ALIGN
RENAMED = (  # private names of the TensorFlow that it was written for
    "backend",
    "applications.imagenet_utils",
    "engine.training",
    "utils.data_utils",
    "utils.layer_utils",
)


def start(options: types.SimpleNamespace) -> np.random.Generator:
    """Limit the threads, which must come first, and make the checkout importable."""
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    sys.path.insert(0, options.peer)
    return np.random.default_rng(0)


def measure_graph(step: Callable, weights: Callable[[], list], options: types.SimpleNamespace):
    """`measure` of a step that returns the loss as a tensor; its first call builds the graph and
    the `weights`."""
    step()
    result = measure(lambda: step().numpy(), options)
    result["parameters"] = sum(int(np.prod(weight.shape)) for weight in weights())
    result["library"] = f"TensorFlow {tf.__version__}"
    return result


def vit(options: types.SimpleNamespace) -> dict:
    """A pre-training step of COYO-ViT."""
    rng = start(options)
    from backbones import build_backbone
    from losses import BCELoss

    tf.keras.optimizers.Adam = tf.keras.optimizers.legacy.Adam  # the class that it was written for
    from optimizers import AdamWeightDecay

    size, side, classes = options.batch, options.image_size, options.classes
    sizes = {
        "image_size": side,
        "representation_size": {"b": 768, "l": 1024}[options.model[4]],
        "channels": 3,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    backbone = build_backbone(options.model, sizes)
    head = tf.keras.layers.Dense(classes, kernel_initializer="zeros", bias_initializer="zeros")
    loss_of = BCELoss(from_logits=True)
    rates = {"learning_rate": 1e-4, "weight_decay_rate": 0.1}
    optimizer = AdamWeightDecay(**rates, epsilon=1e-7, global_clipnorm=1.0)
    image = tf.constant(rng.standard_normal((size, side, side, 3), dtype=np.float32))
    target = np.zeros((size, classes), np.float32)
    target[np.arange(size)[:, None], rng.integers(classes, size=(size, 2))] = 1
    target = tf.constant(target)

    def weights() -> list:
        return backbone.trainable_variables + head.trainable_variables

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            logits = head(tf.reduce_mean(backbone(image, training=True), axis=[1, 2]))
            loss = loss_of(target, logits)
        gradients = tape.gradient(loss, weights())
        optimizer.apply_gradients(zip(gradients, weights()))  # noqa: B905
        return loss

    return measure_graph(train, weights, options)


def align(options: types.SimpleNamespace) -> dict:
    """A training step of COYO-ALIGN."""
    rng = start(options)
    for name in RENAMED:
        module = importlib.import_module(f"keras.{name}")
        legacy = f"tensorflow.python.keras.{name}"
        folder, _, leaf = legacy.rpartition(".")
        sys.modules[legacy] = module
        setattr(sys.modules.setdefault(folder, types.ModuleType(folder)), leaf, module)
    import tensorflow_addons as tfa

    # the checkout's folder has no __init__.py: python would find the package of ours first
    package = types.ModuleType("models")
    package.__path__ = [f"{options.peer}/models"]
    sys.modules["models"] = package
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
    pixels = rng.uniform(0, 255, (options.batch, SIDE, SIDE, 3)).astype(np.float32)
    ids = tf.constant(rng.integers(1000, 30522, (options.batch, options.length)), tf.int32)
    texts = {"attention_mask": tf.ones_like(ids), "token_type_ids": tf.zeros_like(ids)}
    batch = (tf.constant(pixels), {"input_ids": ids, **texts})
    train = tf.function(lambda: model.train_step(batch)["loss"])
    return measure_graph(train, lambda: model.trainable_variables, options)
