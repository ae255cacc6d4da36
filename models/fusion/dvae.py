"""Discrete VAE that turns images into grids of visual tokens and back (DALL-E: Ramesh et al. 2021,
section 2.1).

The networks and parameter names are those of OpenAI's `dall_e` package, in any width, so that one
`ImageTokenizer` is OpenAI's published tokenizer or a small one of one's own
(`scripts/train_dvae.py`). SIMLA predicts its codes for masked patches. Images are float [B,3,H,W]
in [0,1]; codes int64 [B,H/r,W/r] with r = 2^(groups - 1).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.addresses import where_from
from base.errors import UserError

EPSILON = 0.1  # images are mapped from [0,1] to [0.1,0.9], where the logit is finite
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TokenizerConfig:
    """Geometry; the defaults are OpenAI's."""

    vocab_size: int = 8192  # codes
    width: int = 256  # channels at full resolution; doubled by every group
    groups: int = 4  # resolutions; the image is reduced by 2^(groups - 1), 8 for 4
    blocks_per_group: int = 2
    decoder_width: int = 128  # channels of a code's embedding in the decoder
    # 6: location and log-scale of a logit-Laplace distribution per channel; 3: location alone (MSE)
    outputs: int = 6

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "TokenizerConfig":
        """The geometry that weights `encoder.*` (and `decoder.*`) have; `UserError` where they are
        no tokenizer's."""
        try:
            blocks = {
                tuple(key.split(".")[2:4])
                for key in state
                if key.startswith("encoder.blocks.group_")
            }
            groups = len({group for group, _ in blocks})
            config = cls(
                vocab_size=state["encoder.blocks.output.conv.w"].shape[0],
                width=state["encoder.blocks.input.w"].shape[0],
                groups=groups,
                blocks_per_group=len(blocks) // groups,
            )
            if "decoder.blocks.input.w" in state:
                config.decoder_width = state["decoder.blocks.input.w"].shape[0]
                config.outputs = state["decoder.blocks.output.conv.w"].shape[0]
        except (KeyError, ZeroDivisionError):
            keys = ", ".join(list(state)[:5])
            raise UserError(
                f"not the weights of an image tokenizer: no encoder.blocks.* among {keys} ..."
            ) from None
        return config


class Conv(nn.Module):
    """Size-keeping convolution; weight `w` [out,in,k,k], bias `b` [out]; the input is cast to their
    dtype."""

    def __init__(self, n_in: int, n_out: int, kernel: int, fan_in: int | None = None):
        super().__init__()
        std = (fan_in or n_in * kernel**2) ** -0.5
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) * std)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """id(x) + gain * res(x) with four ReLU-convolution pairs through a quarter of the channels."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        hidden = max(1, n_out // 4)
        self.gain = gain
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels, start=1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", Conv(widths[i - 1], widths[i], kernel))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def make_groups(
    config: TokenizerConfig,
    widths: list[int],
    kernels: tuple[int, ...],
    resize: Callable[[], nn.Module],
) -> OrderedDict[str, nn.Module]:
    """`group_1` ... of blocks; every group but the last ends by changing the resolution."""
    gain = (config.groups * config.blocks_per_group) ** -2
    groups = OrderedDict()
    for g in range(1, config.groups + 1):
        group = nn.Sequential()
        for b in range(1, config.blocks_per_group + 1):
            n_in = widths[g - 1] if b == 1 else widths[g]
            group.add_module(f"block_{b}", Block(n_in, widths[g], kernels, gain))
        if g < config.groups:
            group.add_module("resize", resize())
        groups[f"group_{g}"] = group
    return groups


class Encoder(nn.Module):
    """[B,3,H,W] -> logits [B,V,H/r,W/r]; or at the positions int64 [B,K], flat in the grid of codes,
    alone: [B,V,K,1]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width, *(config.width * 2**g for g in range(config.groups))]
        groups = make_groups(config, widths, (3, 3, 3, 1), partial(nn.MaxPool2d, kernel_size=2))
        output = OrderedDict(relu=nn.ReLU(), conv=Conv(widths[-1], config.vocab_size, 1))
        first = Conv(3, config.width, 7)
        self.blocks = nn.Sequential(
            OrderedDict(input=first, **groups, output=nn.Sequential(output))
        )

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        *groups, output = self.blocks
        for group in groups:
            x = group(x)
        if positions is not None:
            index = positions.unsqueeze(1).expand(-1, x.shape[1], -1)
            x = x.flatten(2).gather(2, index).unsqueeze(-1)
        return output(x)


class Decoder(nn.Module):
    """One-hot or relaxed codes [B,V,h,w] -> [B,outputs,h*r,w*r]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * 2**g for g in reversed(range(config.groups))]
        widths = [config.decoder_width, *widths]
        double = partial(nn.Upsample, scale_factor=2, mode="nearest")
        groups = make_groups(config, widths, (1, 3, 3, 3), double)
        output = OrderedDict(relu=nn.ReLU(), conv=Conv(widths[-1], config.outputs, 1))
        # fan_in: one code at a time is not zero
        first = Conv(config.vocab_size, config.decoder_width, 1, fan_in=1)
        self.blocks = nn.Sequential(
            OrderedDict(input=first, **groups, output=nn.Sequential(output))
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)


RANDOM = "random"  # instead of a path
SMALL = TokenizerConfig(vocab_size=32, width=8, groups=3, blocks_per_group=1, decoder_width=8)


class ImageTokenizer(nn.Module):
    """Encoder and decoder of visual tokens; `decoder` is None where only OpenAI's encoder.pkl is at
    hand."""

    def __init__(self, config: TokenizerConfig, with_decoder: bool = True):
        super().__init__()
        sizes = [config.vocab_size, config.width, config.groups]
        sizes += [config.blocks_per_group, config.decoder_width]
        if min(sizes) < 1:
            raise UserError(f"every size of an image tokenizer must be at least 1: {config}")
        if config.outputs not in (3, 6):
            raise UserError(
                f"outputs of an image tokenizer: 6 (logit-Laplace) or 3 (MSE), not {config.outputs}"
            )
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if with_decoder else None

    @classmethod
    def load(
        cls, path: str | Path, read: Callable[[Path], dict[str, Tensor]], precision: str = "fp32"
    ):
        """A frozen tokenizer from a file or folder.

        path: OpenAI's encoder.pkl or a folder with it (decoder.pkl beside it is optional); the
        safetensors file, checkpoint or folder of `scripts/train_dvae.py`; or the word `random`, a
        small untrained tokenizer for smoke tests. read: file or folder -> state dict,
        `runtime.checkpoint.read_weights`. precision: see `freeze`.
        """
        path = Path(path)
        if str(path) == RANDOM:
            return cls(SMALL, with_decoder=False).freeze(precision)
        if (path / "encoder.pkl").is_file():
            path = path / "encoder.pkl"
        state = read(path)
        if "blocks.input.w" in state:
            state = {f"encoder.{key}": value for key, value in state.items()}
            other = path.with_name("decoder.pkl")
            if other.is_file():
                state |= {f"decoder.{key}": value for key, value in read(other).items()}
        config = TokenizerConfig.from_state(state)
        tokenizer = cls(config, with_decoder="decoder.blocks.input.w" in state)
        try:
            tokenizer.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{path}: not the weights of one image tokenizer: {error}") from None
        return tokenizer.freeze(precision)

    def freeze(self, precision: str = "fp32") -> "ImageTokenizer":
        """Evaluation without gradients, channels last, convolutions in fp32, bf16 or fp16.

        The encoder's last and the decoder's first convolution stay in float32, as OpenAI has it:
        they decide the codes.
        """
        if precision not in PRECISIONS:
            raise UserError(
                f"precision {precision!r} of the image tokenizer: one of {', '.join(PRECISIONS)}"
            )
        self.requires_grad_(False).eval()
        self.to(PRECISIONS[precision], memory_format=torch.channels_last)
        self.encoder.blocks.output.float()
        if self.decoder is not None:
            self.decoder.blocks.input.float()
        return self

    @property
    def reduction(self) -> int:
        """Pixels per code and side."""
        return 2 ** (self.config.groups - 1)

    def logits(self, image: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B,3,H,W] in [0,1], or uint8, -> logits over the codes [B,V,H/r,W/r], or of some
        `positions` (see Encoder)."""
        if image.dtype == torch.uint8:
            image = image.float() / 255
        height, width = image.shape[-2:]
        if height % self.reduction or width % self.reduction:
            raise UserError(
                f"an image of {height} x {width} is no multiple of {self.reduction}, the pixels of a "
                "code"
            )
        squeezed = squeeze_range(image).contiguous(memory_format=torch.channels_last)
        return self.encoder(squeezed, positions)

    def compiled(self) -> "ImageTokenizer":
        """Compile the encoder, in place; returns the tokenizer."""
        self.encoder.compile()
        return self

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1], or uint8, -> likeliest code of each position, int64 [B,H/r,W/r]."""
        return self.logits(image).argmax(dim=1)

    @torch.no_grad()
    def codes_at(self, image: Tensor, positions: Tensor) -> Tensor:
        """`codes` at the positions int64 [B,K], flat in the grid: int64 [B,h*w], 0 elsewhere."""
        found = self.logits(image, positions).argmax(dim=1).flatten(1)
        grid = image.shape[-2] * image.shape[-1] // self.reduction**2
        return found.new_zeros(len(found), grid).scatter(1, positions, found)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B,h,w] -> images float32 [B,3,h*r,w*r] in [0,1]."""
        if self.decoder is None:
            raise UserError(
                "this image tokenizer has no decoder: put decoder.pkl beside encoder.pkl"
            )
        one_hot = F.one_hot(codes, self.config.vocab_size).permute(0, 3, 1, 2)
        return image_of(self.decoder(one_hot))

    def forward(
        self, image: Tensor, temperature: Tensor | float = 1.0, straight_through: bool = False
    ) -> dict[str, Tensor]:
        """Losses of one training step, 0-d each, for images [B,3,H,W] in [0,1].

        The decoder's image is made of Gumbel-softmax codes (Jang et al. 2017) at `temperature`:
        relaxed ones, or with `straight_through` hard ones with the gradient of the relaxed ones.

        loss_reconstruction: its negative log-likelihood under the logit-Laplace distribution, or its
        mean squared error. loss_kl: KL(q(code | position) || uniform), mean over positions, in nats:
        how certain the encoder is. loss_usage: KL(mean q over the batch || uniform): 0 when all
        codes are used equally; keeps the code book alive.
        """
        logits = self.logits(image).float()
        log_q = F.log_softmax(logits, dim=1)
        uniform = math.log(self.config.vocab_size)
        mean_q = log_q.exp().mean(dim=(0, 2, 3))
        sample = F.gumbel_softmax(logits, tau=temperature, hard=straight_through, dim=1)
        output = self.decoder(sample).float()
        return {
            "loss_reconstruction": reconstruction_loss(output, image),
            "loss_kl": uniform + (log_q.exp() * log_q).sum(dim=1).mean(),
            "loss_usage": uniform + torch.special.xlogy(mean_q, mean_q).sum(),
        }


def squeeze_range(image: Tensor) -> Tensor:
    """[0,1] -> [0.1,0.9]."""
    return (1 - 2 * EPSILON) * image + EPSILON


def image_of(output: Tensor) -> Tensor:
    """The decoder's output [B,3 or 6,H,W] -> image [B,3,H,W] in [0,1]: the location, out of the
    squeezed range."""
    return ((torch.sigmoid(output[:, :3].float()) - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """Mean over channels and pixels; `output` [B,6,H,W] logit-Laplace (location, log-scale),
    [B,3,H,W] squared error.

    Logit-Laplace density of x in (0,1), Ramesh et al. 2021, appendix A.3: exp(-|logit(x) - m| / b)
    / (2 b x (1 - x)).
    """
    x = squeeze_range(image)
    if output.shape[1] == 3:
        return F.mse_loss(torch.sigmoid(output), x)
    location, log_scale = output.chunk(2, dim=1)
    distance = (torch.logit(x) - location).abs()
    return (distance * torch.exp(-log_scale) + log_scale + torch.log(2 * x * (1 - x))).mean()


def code_usage(counts: Tensor) -> tuple[float, float]:
    """`(used, perplexity)` of code counts [V]: fraction of codes that occur, exp of the entropy of
    their distribution."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(p, p).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def existing_tokenizer(path: Path | None) -> Path:
    """`path` itself, or the word `random`; UserError where it is None or does not exist."""
    if path is None or not (path.exists() or str(path) == RANDOM):
        hint = where_from(path or "encoder.pkl")
        raise UserError(
            f"image_tokenizer_path: {path} does not exist{hint}; or "
            "train one on your own images: python scripts/train_dvae.py --help"
        )
    return path
