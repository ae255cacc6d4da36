"""A method's step on a device, without what differs between devices, and differences of its figures."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from base.distributed import alone
from models.fusion import losses
from runtime.optim.build import Precision, build_optimizer
from runtime.parallel import ParallelOptions, parallelize
from scripts.planning import steps
from scripts.planning.simulate import load_script, read_config

TOKENS = (1000, 30000)  # words of every vocabulary in STEPS


@contextlib.contextmanager
def without_randomness() -> Iterator[None]:
    """No dropout, fixed images and the likeliest negatives: equal on every device."""
    attention = F.scaled_dot_product_attention

    def certain(query, key, value, attn_mask=None, dropout_p=0.0, **options):
        return attention(query, key, value, attn_mask, 0.0, **options)

    randint = torch.randint

    def seeded(low: int, high: int, kind: torch.dtype):
        def draw(*shape: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(1)
            return randint(low, high, shape, generator=generator, dtype=kind)

        return draw

    def in_turn(count: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
        return torch.arange(shape.numel(), device=device).view(shape) % count

    with (
        mock.patch.object(F, "dropout", lambda x, *args, **kwargs: x),
        mock.patch.object(F, "scaled_dot_product_attention", certain),
        mock.patch.object(torch.Tensor, "exponential_", lambda x, *args: x.fill_(1.0)),
        # the compiler knows methods of tensors itself: what it traces needs a function
        mock.patch.object(losses, "gumbel_noise", lambda like: torch.zeros_like(like).float()),
        mock.patch.object(torch, "rand", lambda *s, **o: torch.full(s, 0.5, **o)),
        mock.patch.object(torch, "randint", in_turn),
        mock.patch.object(torch, "_standard_gamma", torch.ones_like),
        mock.patch.object(steps, "pixels", seeded(0, 256, torch.uint8)),
        mock.patch.object(steps, "ids", seeded(*TOKENS, torch.int64)),
    ):
        yield


@contextlib.contextmanager
def random_batches() -> Iterator[None]:
    """Noise for images and tokens, made once and in pinned memory.

    Of zeros, products are faster and gradients of tables slower than of real batches, and batch
    norms divide by a std of 0.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(low: int, high: int, kind: torch.dtype):
        @functools.cache
        def draw(*shape: int) -> torch.Tensor:
            made = torch.randint(low, high, shape, generator=generator, dtype=kind)
            return made.pin_memory() if torch.cuda.is_available() else made

        return draw

    with (
        mock.patch.object(steps, "pixels", drawn(0, 256, torch.uint8)),
        mock.patch.object(steps, "ids", drawn(*TOKENS, torch.int64)),
    ):
        yield


class Run:
    """A method's model, optimizer and step on a device.

    move: False leaves the network where it was drawn, until `move()`.
    """

    def __init__(self, command: str, device, precision: str, move: bool = True, **features):
        name, *argv = command.split()
        script = load_script(name)
        self.device, self.features = device, features
        self.config = read_plain(script, argv)
        self.config.precision = precision
        if features.get("compile"):  # or the shapes of the method before make this one's dynamic
            torch._dynamo.reset()
        torch.manual_seed(0)
        self.setup = steps.setup_of(script, self.config)
        if move:
            self.move()

    def move(self) -> None:
        """Networks to the device, wrapped; the optimizer over them."""
        for tokenizer in self.setup.frozen:
            tokenizer.to(self.device)
            if self.features.get("compile"):
                tokenizer.compiled()
        config = self.config
        features = ParallelOptions(**self.features)
        self.model = parallelize(self.setup.model, alone(self.device), features).train()
        self.optimizer = build_optimizer(self.model, config.optimizer, self.setup.decayed)
        clip = config.optimizer.clip_grad_norm
        self.precision = Precision(config.precision, self.device, clip)

    def step(self) -> dict:
        return self.setup.step(self.model, self.optimizer, self.precision)

    def losses(self) -> dict[str, float]:
        """Losses and gradient norms of two steps."""
        found = {}
        for number in range(2):
            for name, value in self.step().items():
                if name.startswith("loss") or name.endswith(("_loss", "grad_norm")):
                    found[f"{name} {number}"] = float(value)
        return found


def read_plain(script, argv: list[str]):
    """The recipe with its features off: every check turns on its own."""
    config = read_config(script, argv)
    config.activation_checkpointing, config.parallel = False, "ddp"
    return config


def difference(a: dict[str, float], b: dict[str, float]) -> float:
    """Largest relative difference of figures of one name."""
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-2) for name in b)


def first_losses(figures: dict[str, float]) -> dict[str, float]:
    """The losses before any update."""
    return {n: v for n, v in figures.items() if n.endswith(" 0") and "grad_norm" not in n}
