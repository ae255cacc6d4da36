"""LLaMA's decoder (Touvron et al., 2023) behind an image: one forward for training, prefill and
every way of decoding.

A sequence is a prefix of N image positions and text behind it. Image positions see one another,
text positions what a boolean mask says; image positions never see text, so their keys and values
are computed once and serve any number of continuations. Parameter names are Meta's;
`models.weights.llama` reads the layouts they come in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from models.layers.attention import attend, attention_map, merge_heads, split_heads
from models.layers.float32_gradient import Float32GradientLinear

Rope = tuple[Tensor, Tensor]  # cosines and sines of the positions, see `rotation`
Cache = list[tuple[Tensor, Tensor]]  # keys and values of every block, [B,H,S,d] each


@dataclass(frozen=True)
class LlamaConfig:
    """Geometry of the decoder; the defaults are LLaMA-2-7B's, as `params.json` names them."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # fewer than n_heads: groups of heads share keys and values
    vocab_size: int = 32000
    multiple_of: int = 256  # the feed-forward width is rounded up to it
    ffn_dim_multiplier: float | None = None
    ffn_dim: int | None = None  # the feed-forward width itself, where the layout tells it
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # LLaMA 3.1's longer context: factor, low and high frequency factor, original length; () = plain
    rope_scaling: tuple[float, ...] = ()
    head_width: int | None = None  # of Qwen3's heads; none = dim / n_heads
    qkv_bias: bool = False  # Qwen2 has biases of query, key and value
    qk_norm: bool = False  # Qwen3 norms every head's query and key
    tensor_parallel: bool = False  # fairscale's layers over its model-parallel group

    def __post_init__(self):
        if (self.head_width is None and self.dim % self.n_heads) or self.head_dim % 2:
            raise UserError(
                f"decoder of width {self.dim} with {self.n_heads} heads: heads must be whole and even"
            )
        if self.n_heads % self.kv_heads:
            raise UserError(
                f"{self.n_heads} heads cannot share {self.kv_heads} key-value heads evenly"
            )

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer: two thirds of 4 dim, times the multiplier, rounded
        up."""
        if self.ffn_dim:
            return self.ffn_dim
        width = int(2 * (4 * self.dim) / 3)
        width = int(self.ffn_dim_multiplier * width) if self.ffn_dim_multiplier else width
        return self.multiple_of * math.ceil(width / self.multiple_of)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned weight, computed in float32 (Zhang and Sennrich, 2019): one kernel,
    which keeps x and a number a position."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> the same shape, in the wider dtype of x and the weight."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


def rotation(
    positions: Tensor, head_dim: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [...,1,L,head_dim/2] for positions int64 [...,L] (RoPE, Su et al.
    2021). scaling: see `LlamaConfig.rope_scaling`."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-pairs / head_dim)
    if scaling:
        factor, low, high, length = scaling
        frequencies = scaled_frequencies(frequencies, factor, low, high, length)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-3)
    return angles.cos(), angles.sin()


def scaled_frequencies(
    frequencies: Tensor, factor: float, low: float, high: float, length: float
) -> Tensor:
    """LLaMA 3.1's frequencies for contexts longer than the original `length` (Grattafiori et al.
    2024, section 3.4.2; the rule is in Meta's published model.py).

    Waves that turn more than `high` times within that length stay, those that turn less than `low`
    times are `factor` times as long, and between the two both are mixed.
    """
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [B,H,L,d] by the angles of `rope`, in float32; back in the
    dtype of x."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = [even * cos - odd * sin, even * sin + odd * cos]  # float32, as cos is
    return torch.stack(rotated, -1).flatten(-2).to(x.dtype)


@dataclass
class PrefixMask:
    """Rotary positions and attention mask of L positions, of which the first may be an image's.

    positions: int64 [L] or [B,L]. prefix: how many leading ones are image positions. text: bool
    [B or 1,1,T,S+L] of the T = L - prefix others over the S cached keys and these; True = attend.
    bidirectional: image positions see one another, else only those before them.
    """

    positions: Tensor
    text: Tensor | None
    prefix: int = 0
    bidirectional: bool = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B,H,Q,d], the last Q positions; key and value [B,H,S+L,d]; -> [B,H,Q,d]."""
        texts = self.text.shape[-2] if self.text is not None else 0
        rows = min(texts, query.shape[2])  # of text among the queries
        images = query.shape[2] - rows
        found = []
        if images:
            prefix_key = key[:, :, : self.prefix]
            prefix_value = value[:, :, : self.prefix]
            of_images = F.scaled_dot_product_attention(
                query[:, :, :images], prefix_key, prefix_value, is_causal=not self.bidirectional
            )
            found.append(of_images)
        if rows:
            mask = self.text[..., texts - rows :, :]
            found.append(attend(query[:, :, images:], key, value, mask))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def dense(self) -> Tensor:
        """The whole mask bool [B or 1,1,L,L] of a call without cache."""
        device = self.positions.device
        inside = torch.ones(self.prefix, self.prefix, dtype=torch.bool, device=device)
        if not self.bidirectional:
            inside = inside.tril()
        outside = inside.new_zeros(self.prefix, self.positions.shape[-1] - self.prefix)
        images = torch.cat([inside, outside], 1)[None, None]
        if self.text is None:
            return images
        return torch.cat([images.expand(len(self.text), -1, -1, -1), self.text], 2)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; wq, wk, wv by output, wo by input where
    parallel."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width = config.head_dim
        by_output, by_input = _linear_layers(config)
        ranks = model_parallel_size() if config.tensor_parallel else 1
        if config.n_heads % ranks or config.kv_heads % ranks:
            raise UserError(
                f"{config.kv_heads} key-value heads cannot be dealt to {ranks} processes"
            )
        self.heads = config.n_heads // ranks
        self.kv_heads = config.kv_heads // ranks
        self.wq = by_output(config.dim, config.n_heads * width, bias=config.qkv_bias)
        self.wk = by_output(config.dim, config.kv_heads * width, bias=config.qkv_bias)
        self.wv = by_output(config.dim, config.kv_heads * width, bias=config.qkv_bias)
        self.wo = by_input(config.n_heads * width, config.dim)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(width, config.norm_eps)
            self.k_norm = RMSNorm(width, config.norm_eps)

    def query(self, x: Tensor, rope: Rope) -> Tensor:
        """[B,L,D] -> rotated queries [B,H,L,d]."""
        return rotate(self.q_norm(split_heads(self.wq(x), self.heads)), rope)

    def key(self, x: Tensor, rope: Rope) -> Tensor:
        """[B,L,D] -> rotated keys [B,G,L,d] of the G groups of heads."""
        return rotate(self.k_norm(split_heads(self.wk(x), self.kv_heads)), rope)

    def forward(
        self, x: Tensor, rope: Rope, mask: PrefixMask, past=None, keep: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [B,L,D] -> [B,keep,D] (all of L by default), and the keys and values [B,G,S+L,d] to go
        on from; None in training, which would only hold them longer."""
        first = 0 if keep is None else x.shape[1] - keep
        cos, sin = rope
        query = self.query(x[:, first:], (cos[..., first:, :], sin[..., first:, :]))
        key = self.key(x, rope)
        value = split_heads(self.wv(x), self.kv_heads)
        if past is not None:
            key = torch.cat([past[0], key], 2)
            value = torch.cat([past[1], value], 2)
        cache = None if self.training else (key, value)
        group = self.heads // self.kv_heads  # query heads that share a key head
        if group > 1:
            key = key.repeat_interleave(group, 1)
            value = value.repeat_interleave(group, 1)
        return self.wo(merge_heads(mask.attend(query, key, value))), cache

    def probabilities(self, x: Tensor, rope: Rope, mask: PrefixMask) -> Tensor:
        """Attention probabilities float32 [B,H,L,L] of a call without cache."""
        key = self.key(x, rope).repeat_interleave(self.heads // self.kv_heads, 1)
        return attention_map(self.query(x, rope), key, mask.dense())


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        by_output, by_input = _linear_layers(config)
        self.w1 = by_output(config.dim, config.hidden)
        self.w2 = by_input(config.hidden, config.dim)
        self.w3 = by_output(config.dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm x), then that + feed-forward(norm of it)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Rope, mask: PrefixMask, past=None, keep: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """As `Attention.forward`."""
        found, cache = self.attention(self.attention_norm(x), rope, mask, past, keep)
        if keep is not None:
            x = x[:, -keep:]
        x = x + found
        return x + self.feed_forward(self.ffn_norm(x)), cache


class Llama(nn.Module):
    """Decoder over embeddings. A checkpoint may be cut: the first blocks with the final norm and
    head of the whole."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        by_output, _ = _linear_layers(config)
        self.tok_embeddings = _embedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = by_output(config.dim, config.vocab_size, whole=True)
        if not config.tensor_parallel:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal: embeddings with std 1, matrices with width^-0.5, less at the end of a branch."""
        for name, weight in self.named_parameters():
            if weight.ndim != 2:
                continue
            std = 1.0 if name.startswith("tok_") else self.config.dim**-0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std *= (2 * self.config.n_layers) ** -0.5
            nn.init.normal_(weight, std=std)

    def rope(self, positions: Tensor) -> Rope:
        """Rotary cosines and sines of the positions int64 [L] or [B,L]."""
        shape = self.config
        return rotation(positions, shape.head_dim, shape.rope_theta, shape.rope_scaling)

    def forward(
        self, x: Tensor, mask: PrefixMask, cache: Cache | None = None, keep: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Embeddings [B,L,D] -> normed states [B,keep,D] of the last `keep` positions (all by
        default) and the cache, which has nothing in training.

        Above the last block nobody looks at earlier positions: only the kept ones go through it.
        Raises RuntimeError for a cache in training.
        """
        if self.training and cache is not None:
            raise RuntimeError("keys and values are kept in eval mode alone: call .eval() first")
        rope = self.rope(mask.positions)
        grown: Cache = []
        for number, block in enumerate(self.layers):
            last = number == len(self.layers) - 1
            past = cache[number] if cache is not None else None
            x, pair = block(x, rope, mask, past, keep if last else None)
            grown.append(pair)
        return self.norm(x), grown

    def attention_maps(self, x: Tensor, mask: PrefixMask) -> list[Tensor]:
        """Probabilities float32 [B,H,L,L] of every block, without cache."""
        rope = self.rope(mask.positions)
        maps = []
        for block in self.layers:
            maps.append(block.attention.probabilities(block.attention_norm(x), rope, mask))
            x, _ = block(x, rope, mask)
        return maps


# ---- tensor parallel


def model_parallel_size() -> int:
    """Processes that share the decoder's matrices: fairscale's group must have been made."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized():
        raise UserError("tensor_parallel: call fairscale's initialize_model_parallel first")
    return initialize.get_model_parallel_world_size()


def _linear_layers(config: LlamaConfig):
    """Makers of the two kinds of linear layers: split by output (`whole`: then joined), and by
    input, without bias."""
    if not config.tensor_parallel:

        def linear(width: int, out: int, whole: bool = True, bias: bool = False) -> nn.Module:
            return Float32GradientLinear(width, out, bias=bias)

        return linear, linear
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

    def by_output(width: int, out: int, whole: bool = False, bias: bool = False) -> nn.Module:
        return ColumnParallelLinear(width, out, bias=bias, gather_output=whole)

    def by_input(width: int, out: int) -> nn.Module:
        return RowParallelLinear(width, out, bias=False, input_is_parallel=True)

    return by_output, by_input


def _embedding(config: LlamaConfig) -> nn.Module:
    if not config.tensor_parallel:
        return nn.Embedding(config.vocab_size, config.dim)
    from fairscale.nn.model_parallel.layers import ParallelEmbedding

    return ParallelEmbedding(config.vocab_size, config.dim)


BY_OUTPUT = ("wq", "wk", "wv", "w1", "w3", "output")
BY_INPUT = ("wo", "w2", "tok_embeddings")


def split_dimension(name: str) -> int | None:
    """Dimension along which a matrix or bias lies on several processes, in fairscale's layers and
    in Meta's shards; or None."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if layer in BY_OUTPUT:
        return 0
    return 1 if layer in BY_INPUT else None


def own_part(state: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """What process `rank` of `size` holds of a whole decoder's state dict."""
    result = {}
    for name, value in state.items():
        dim = split_dimension(name)
        if dim is not None and value.shape[dim] % size:
            raise UserError(
                f"{name} {tuple(value.shape)}: dimension {dim} cannot be dealt to {size} processes"
            )
        result[name] = value if dim is None else value.chunk(size, dim)[rank].contiguous()
    return result
