"""The original's side of benchmarks.vit: TensorFlow's COYO-ViT out of a checkout.

Network, loss and optimizer are the original's own, in float32 and as one graph; the data is random.
"""

import sys
from types import SimpleNamespace

from benchmarks.peers.tensorflow_steps import limit_threads, measure_graph


def step(options: SimpleNamespace) -> dict:
    """A pre-training step."""
    import numpy as np
    import tensorflow as tf

    limit_threads(options)
    sys.path.insert(0, options.peer)
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
    optimizer = AdamWeightDecay(
        learning_rate=1e-4, weight_decay_rate=0.1, epsilon=1e-7, global_clipnorm=1.0
    )
    rng = np.random.default_rng(0)
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
