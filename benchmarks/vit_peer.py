"""One measurement of benchmarks.vit: the pre-training step of the original, TensorFlow's COYO-ViT,
from a checkout.

Called by benchmarks.vit with its settings as JSON, by an interpreter that has TensorFlow (2.12.1
was tried); prints the result as JSON. Network, loss and optimizer are the original's own, in
float32 and as one graph; the data is random.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path


def build(tf, options: dict):
    """The network with head, the loss and the optimizer of the checkout."""
    sys.path.insert(0, options["peer"])
    from backbones import build_backbone
    from losses import BCELoss

    tf.keras.optimizers.Adam = tf.keras.optimizers.legacy.Adam  # the class that it was written for
    from optimizers import AdamWeightDecay

    width = {"b": 768, "l": 1024}[options["model"][4]]
    sizes = {"image_size": options["image_size"], "representation_size": width, "channels": 3}
    backbone = build_backbone(
        options["model"], sizes | {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    )
    head = tf.keras.layers.Dense(
        options["classes"], kernel_initializer="zeros", bias_initializer="zeros"
    )
    decay = {"weight_decay_rate": 0.1, "epsilon": 1e-7, "global_clipnorm": 1.0}
    return backbone, head, BCELoss(from_logits=True), AdamWeightDecay(learning_rate=1e-4, **decay)


def main(options: dict) -> dict:
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    backbone, head, loss_of, optimizer = build(tf, options)
    size, side, rng = options["batch"], options["image_size"], np.random.default_rng(0)
    image = tf.constant(rng.standard_normal((size, side, side, 3), dtype=np.float32))
    target = np.zeros((size, options["classes"]), np.float32)
    target[np.arange(size)[:, None], rng.integers(options["classes"], size=(size, 2))] = 1
    target = tf.constant(target)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = head(tf.reduce_mean(backbone(image, training=True), axis=[1, 2]))
            loss = loss_of(target, logits)
        weights = backbone.trainable_variables + head.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))  # noqa: B905
        return loss

    step()  # builds the graph
    seconds, cpu = [], []
    for turn in range(options["warmup"] + options["steps"]):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step().numpy()
        if turn >= options["warmup"]:
            seconds.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - cpu_begin)
    status = Path("/proc/self/status").read_text()
    peak = (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )
    weights = backbone.trainable_variables + head.trainable_variables
    count = sum(int(np.prod(v.shape)) for v in weights)
    medians = {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "peak_bytes": peak,
    }
    return medians | {
        "device": "cpu",
        "gpu": "",
        "torch": f"TensorFlow {tf.__version__}",
        "parameters": count,
    }


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(json.dumps(main(json.loads(sys.argv[1]))))
