"""Building blocks of the dual encoders: vision backbones, CLIP's text transformer, projectors.

Parameter names are those of clip-rocket, SLIP and OpenAI's CLIP. Vision towers map images [B,3,H,W]
to features [B,C] and name C `num_features`; the text transformer lives at the root of the model,
as it does in all three systems, so its parts are joined in `TwoTowers`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base.errors import UserError
from models.layers.attention import merge_heads, split_heads
from models.layers.vit import Mlp, ViT, ViTConfig

# ---- vision backbones


class LeanMlp(Mlp):
    """The block's MLP, which keeps the first layer's output alone: GELU is recomputed in the
    backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute(lambda hidden: self.fc2(F.gelu(hidden)), self.fc1(x))


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), keeping only x for the backward pass. What is cheap in `function` must come
    first and a linear layer last: recomputation ends as soon as that layer's input is known, so no
    matrix product is done twice.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class ClipViT(ViT):
    """ViT whose feature is the normalised class token, [B,3,S,S] -> [B,C]."""

    mlp_class = LeanMlp

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.num_features = config.width
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the statistics of a batch enter the output, so that views must not be joined into one
    batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


# ---- text transformer


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), written so that a single tensor is kept for the backward pass."""
    return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class TextShape:
    """Geometry of the text transformer; the defaults are those of every published ViT-B model."""

    context_length: int = 77  # longest text in tokens; shorter padding is welcome
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    activation: str = "quick_gelu"  # or gelu (open_clip's models without -quickgelu)


@dataclass(frozen=True)
class TextNoise:
    """Regularisation of the local text views: dropout on the residual stream and stochastic depth,
    while training."""

    dropout: float = 0.0  # probability per element, at the entry of every block
    drop_path: float = 0.0  # probability per text and branch
    # as the original: drop a token position for the whole batch instead of a text
    over_positions: bool = False

    @property
    def active(self) -> bool:
        return self.dropout > 0 or self.drop_path > 0

    def branch(self, x: Tensor) -> Tensor:
        """Stochastic depth of one residual branch [B,L,D]."""
        if self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        shape = (1, x.shape[1], 1) if self.over_positions else (len(x), 1, 1)
        mask = x.new_empty(shape).bernoulli_(kept)
        return x * (mask / kept if kept > 0 else mask)


class PackedAttention(nn.Module):
    """Multi-head self-attention with one packed input projection, named as torch's
    MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """[B,L,D] -> [B,L,D]; causal: a position sees itself and those before it."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(merge_heads(found))


class ClipMlp(nn.Module):
    """Two linear layers, four times the width between them."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return recompute(lambda hidden: self.c_proj(self.activation(hidden)), self.c_fc(x))


class ResidualBlock(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)); LayerNorm eps 1e-5."""

    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.attn = PackedAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = ClipMlp(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool, noise: TextNoise | None = None) -> Tensor:
        if noise is None:
            x = x + self.attn(self.ln_1(x), causal)
            return x + self.mlp(self.ln_2(x))
        x = F.dropout(x, noise.dropout)
        x = x + noise.branch(self.attn(self.ln_1(x), causal))
        return x + noise.branch(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Pre-norm blocks over [B,L,D]; initialised as CLIP's, with depth-scaled output layers."""

    def __init__(self, width: int, layers: int, heads: int, activation: str):
        super().__init__()
        if width % heads:
            raise UserError(
                f"a transformer of width {width} cannot have {heads} heads; give a divisor"
            )
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, activation) for _ in range(layers)
        )
        narrow = width**-0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=narrow)
            nn.init.normal_(block.attn.out_proj.weight, std=narrow * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=narrow * (2 * layers) ** -0.5)

    def forward(self, x: Tensor, causal: bool = False, noise: TextNoise | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal, noise)
        return x


class LockableTowers(nn.Module):
    """Towers that may be locked: these stay in evaluation mode, their batch norms included."""

    locked: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> "LockableTowers":
        """Training mode, but for locked towers."""
        super().train(mode)
        for tower in self.locked:
            tower.eval()
        return self


class TwoTowers(LockableTowers):
    """A vision tower, CLIP's text transformer at the root, and the scalars and matrices beside
    them.

    matrices: name -> (rows, columns), initialised with std rows^-0.5; scales: name -> initial
    logarithm. text_tower: text_ids int64 [B,L] -> [B,T], in place of the text transformer.
    Registration order is that of the originals, on which stored optimizer states rely.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: TextShape,
        scales: dict[str, float],
        matrices: dict | None = None,
        text_tower: nn.Module | None = None,
    ):
        super().__init__()
        self.text_shape = text
        if text_tower is None:
            self.positional_embedding = nn.Parameter(
                torch.empty(text.context_length, text.width).normal_(std=0.01)
            )
        for name, shape in (matrices or {}).items():
            matrix = torch.empty(shape).normal_(std=shape[0] ** -0.5)
            self.register_parameter(name, nn.Parameter(matrix))
        for name, value in scales.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
        self.visual = visual
        self.text_tower = text_tower
        if text_tower is not None:
            return
        self.transformer = Transformer(text.width, text.layers, text.heads, text.activation)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = nn.LayerNorm(text.width)

    def text_features(self, text_ids: Tensor, noise: TextNoise | None = None) -> Tensor:
        """Feature at the end-of-text token, the largest id: int64 [B,L] -> [B,T], L at most the
        context length.

        What stands behind that token has no influence, so texts may be padded to any length.
        """
        if self.text_tower is not None:
            return self.text_tower(text_ids)
        length = text_ids.shape[1]
        if length > self.text_shape.context_length:
            raise UserError(
                f"texts of {length} tokens, but the text transformer holds "
                f"{self.text_shape.context_length}: truncate in the tokenizer (context_length)"
            )
        x = self.token_embedding(text_ids) + self.positional_embedding[:length]
        if noise is not None and not (self.training and noise.active):
            noise = None
        x = self.transformer(x, causal=True, noise=noise)
        rows = torch.arange(x.shape[0], device=x.device)
        return self.ln_final(x[rows, text_ids.argmax(-1)])

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep every temperature's scale within [1, 100]; called after each optimizer step."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("logit_scale") and parameter.requires_grad:
                parameter.clamp_(0, math.log(100))


# ---- projectors


def linear_projector(width: int, out: int, std: float | None = None) -> nn.Linear:
    """Matrix without bias; `std` of its normal initial weights, or torch's default."""
    layer = nn.Linear(width, out, bias=False)
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    return layer


def mlp_projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers, batch norm and ReLU after the first two (SimCLR v2's head)."""
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Linear(width, hidden),
            bn1=nn.BatchNorm1d(hidden),
            relu1=nn.ReLU(),
            layer2=nn.Linear(hidden, hidden),
            bn2=nn.BatchNorm1d(hidden),
            relu2=nn.ReLU(),
            layer3=nn.Linear(hidden, out),
        )
    )


def barlip_projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Barlow Twins' expander; its last batch norm standardises what is correlated."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
        nn.BatchNorm1d(out),
    )


def narrow_projector(width: int, hidden: int, out: int, bias: tuple[bool, bool]) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear; `bias` of the first and of the second linear layer."""
    first = nn.Linear(width, hidden, bias=bias[0])
    second = nn.Linear(hidden, out, bias=bias[1])
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), second)


siamlip_projector = partial(narrow_projector, bias=(False, False))
siamlip_predictor = partial(narrow_projector, bias=(False, True))
swalip_projector = partial(narrow_projector, bias=(True, True))


class Prototypes(nn.Module):
    """Cosine scores against K learned directions (SwAV): unit features [B,D] -> [B,K]. Their
    lengths stay 1."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))
