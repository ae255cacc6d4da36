"""EfficientNet as ALIGN uses it: B0 to B7 without the head convolution, padded as for even sizes,
ghost batch norm.

Tan and Le 2019 for the architecture, COYO-ALIGN for what differs. Parameter names are those of the
vision model in transformers' `AlignModel` (kakaobrain/align-base).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from models.layers.batchnorm import GhostBatchNorm, collect, deal, virtual_batches

Stages = tuple[tuple[int, int, int, int, int], ...]  # kernel, blocks, channels, expansion, stride

STAGES: Stages = (  # of B0
    (3, 1, 16, 1, 1),
    (3, 2, 24, 6, 2),
    (5, 2, 40, 6, 2),
    (3, 3, 80, 6, 2),
    (5, 3, 112, 6, 1),
    (5, 4, 192, 6, 2),
    (3, 1, 320, 6, 1),
)
SMALL_STAGES: Stages = ((3, 1, 24, 1, 2), (5, 1, 32, 4, 1), (5, 1, 64, 4, 2), (5, 1, 96, 6, 2))
STEM = 32
SQUEEZE = 0.25  # width of squeeze-and-excitation as a fraction of the block's input
SMALLEST = 32  # pixels: five halvings leave one


@dataclass(frozen=True)
class EfficientNetShape:
    """Multiples of B0's channels and blocks (compound scaling), and the normalisation."""

    width: float = 1.0
    depth: float = 1.0
    divisor: int = 8  # channels are multiples of it
    # stochastic depth that the last block would have; grows linearly from 0
    drop_connect: float = 0.2
    # samples that batch norm takes its statistics over; 0 = all of the process
    virtual_batch: int = 16
    eps: float = 1e-3
    momentum: float = 0.01
    stages: Stages = STAGES

    def channels(self, base: int) -> int:
        """`base` scaled and rounded to the divisor, at most 10 % below."""
        scaled = base * self.width
        rounded = max(self.divisor, int(scaled + self.divisor / 2) // self.divisor * self.divisor)
        return rounded + self.divisor if rounded < 0.9 * scaled else rounded

    @property
    def features(self) -> int:
        """Channels of the last block."""
        return self.channels(self.stages[-1][2])

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """(kernel, channels in, channels out, expansion, stride) of every block."""
        widths = [self.channels(c) for c in (STEM, *(stage[2] for stage in self.stages))]
        rows = []
        for (kernel, repeats, _, expansion, stride), (before, width) in zip(
            self.stages, pairwise(widths), strict=True
        ):
            rows.append((kernel, before, width, expansion, stride))
            rows += [(kernel, width, width, expansion, 1)] * (math.ceil(repeats * self.depth) - 1)
        return rows


SHAPES = {
    # for small images and short trainings, such as on DigitScenes
    "NANO": EfficientNetShape(momentum=0.05, stages=SMALL_STAGES),
    "B0": EfficientNetShape(1.0, 1.0),
    "B1": EfficientNetShape(1.0, 1.1),
    "B2": EfficientNetShape(1.1, 1.2),
    "B3": EfficientNetShape(1.2, 1.4),
    "B4": EfficientNetShape(1.4, 1.8),
    "B5": EfficientNetShape(1.6, 2.2),
    "B6": EfficientNetShape(1.8, 2.6),
    "B7": EfficientNetShape(2.0, 3.1),
}


class Block(nn.Module):
    """Inverted residual with squeeze-and-excitation (MBConv)."""

    def __init__(self, row: tuple[int, int, int, int, int], shape: EfficientNetShape, drop: float):
        super().__init__()
        kernel, before, width, expansion, stride = row
        inner = before * expansion
        squeezed = max(1, int(before * SQUEEZE))
        self.expansion = None
        if expansion != 1:
            self.expansion = nn.ModuleDict(
                {"expand_conv": conv(before, inner, 1), "expand_bn": norm(inner, shape)}
            )
        depthwise = conv(inner, inner, kernel, stride, groups=inner)
        self.depthwise_conv = nn.ModuleDict(
            {"depthwise_conv": depthwise, "depthwise_norm": norm(inner, shape)}
        )
        gates = {
            "reduce": conv(inner, squeezed, 1, bias=True),
            "expand": conv(squeezed, inner, 1, bias=True),
        }
        self.squeeze_excite = nn.ModuleDict(gates)
        self.projection = nn.ModuleDict(
            {"project_conv": conv(inner, width, 1), "project_bn": norm(width, shape)}
        )
        self.skip = stride == 1 and before == width
        self.drop = drop
        # a tensor, so that blocks of one size share their compiled code
        self.register_buffer("keep", torch.tensor(1 - drop) if drop else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C',H',W'] with H' = H // stride."""
        y = x
        if self.expansion is not None:
            y = F.silu(self.expansion["expand_bn"](pointwise(self.expansion["expand_conv"], y)))
        y = padded(self.depthwise_conv["depthwise_conv"], y)
        y = F.silu(self.depthwise_conv["depthwise_norm"](y))
        y = self.projection["project_bn"](self.project(y))
        if not self.skip:
            return y
        if self.keep is None or not self.training:
            return x + y
        # the branch of a sample is dropped as a whole (stochastic depth, Huang 2016)
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) < self.keep
        return torch.addcmul(x, y, (kept / self.keep).to(y.dtype))

    def project(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C',H,W]: each channel times its gate, then the 1 x 1 convolution.

        The gates of a sample go into a copy of the weights of its own: [B,C',C] is small, and x is
        neither multiplied nor kept a second time.
        """
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view of channels last
        reduce = self.squeeze_excite["reduce"]
        expand = self.squeeze_excite["expand"]
        squeezed = F.silu(F.linear(rows.mean(1), reduce.weight.flatten(1), reduce.bias))
        gates = F.linear(squeezed, expand.weight.flatten(1), expand.bias).sigmoid()
        weight = self.projection["project_conv"].weight.flatten(1) * gates[:, None]
        return (rows @ weight.transpose(1, 2)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class EfficientNet(nn.Module):
    """Images float32 [B,3,H,W] with values -1..1 -> features [B,C], the mean over the last block's
    map.

    In training sample n belongs to virtual batch n modulo their number, as in COYO-ALIGN. Where
    rank r of R has every R-th sample, which is how the data stream deals them out, these are the
    virtual batches of one process with all.
    """

    def __init__(self, shape: EfficientNetShape):
        super().__init__()
        stem = shape.channels(STEM)
        self.embeddings = nn.ModuleDict(
            {"convolution": conv(3, stem, 3, stride=2), "batchnorm": norm(stem, shape)}
        )
        rows = shape.blocks()
        blocks = [
            Block(row, shape, shape.drop_connect * n / len(rows)) for n, row in enumerate(rows)
        ]
        self.encoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.num_features = shape.features
        self.shape = shape
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)

    def forward(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) < SMALLEST:
            raise UserError(
                f"image_size {min(image.shape[-2:])}: EfficientNet halves five times, give 32 or more"
            )
        groups = virtual_batches(len(image), self.shape.virtual_batch) if self.training else 1
        x = deal(image, groups).contiguous(memory_format=torch.channels_last)
        x = F.silu(self.embeddings["batchnorm"](padded(self.embeddings["convolution"], x)))
        for block in self.encoder["blocks"]:
            x = block(x)
        return collect(x.mean((2, 3)), groups)


def conv(
    before: int, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """Convolution that keeps the size; with stride 2 it is left to `padded`."""
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(before, width, kernel, stride, padding, groups=groups, bias=bias)


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x); before a stride of 2 zeros are added as if the size were even: one less at the top
    and left."""
    if conv.stride[0] == 1:
        return conv(x)
    half = conv.kernel_size[0] // 2
    if half == 1 and x.shape[-1] % 2 and x.shape[-2] % 2:
        return conv(x)  # nobody looks at the zeros
    # a row and column of zeros at the kernel's top and left, and equal padding: x need not be
    # copied
    weight = F.pad(conv.weight, (1, 0, 1, 0))
    return F.conv2d(x, weight, conv.bias, conv.stride, half, conv.dilation, conv.groups)


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) of a 1 x 1 convolution as the matrix product that it is over channels last; faster on
    CPUs."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)


def norm(channels: int, shape: EfficientNetShape) -> GhostBatchNorm:
    return GhostBatchNorm(channels, shape.virtual_batch, shape.eps, shape.momentum)


def init_conv(conv: nn.Conv2d) -> None:
    """Variance 2 / fan-out, normal cut at two standard deviations, as Keras' VarianceScaling;
    biases 0."""
    fan_out = conv.weight.shape[0] // conv.groups * conv.weight[0, 0].numel()
    # 0.88: std of a standard normal cut at 2; the variance after the cut is 2 / fan-out
    std = math.sqrt(2 / fan_out) / 0.87962566
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
