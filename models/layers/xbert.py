"""BERT with cross-attention to an image: SIMLA's single stream and ALBEF's two stages from one
implementation.

Post-norm blocks in the order self-attention, cross-attention, feed-forward. Layers from
`fusion_layer` on own a cross-attention; a layer uses it when it is given image tokens. The two
systems differ in geometry only:

* two-stage (ALBEF, BERT proper): layers below `fusion_layer` encode the text, the others fuse it
  with the image.
* single-stream (SIMLA): `fusion_layer` is 0, text mode runs all layers without their
  cross-attention, and there is no token-type embedding.

So `text_stage` -> `fuse` is the fusion encoder of both, and only the text-only encoder
(`encode_text`) differs. Parameter names follow transformers' BERT with `crossattention` beside `attention`.
"""

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError, brief
from base.limits import BLOCKS, CLASSES, WIDTH
from models.layers.attention import (
    attend,
    attend_shared,
    attention_map,
    key_set_of_rows,
    merge_heads,
    split_heads,
)
from models.layers.heads import exact
from models.layers.initialisation import linear_std

LIMITS = {  # of the sizes in a BERT JSON
    "vocab_size": CLASSES,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": CLASSES,
    "type_vocab_size": WIDTH,
}


@dataclass
class BertConfig:
    """Geometry under transformers' names; the defaults are BERT-base as SIMLA uses it."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    encoder_width: int = 768  # width of the image tokens cross-attention reads
    single_stream: bool = True  # SIMLA; False = two-stage (ALBEF), which has token types
    fusion_layer: int = 0  # first layer with cross-attention
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float | None = None  # std of the initial weights; none = by hidden_size
    pad_token_id: int = 0
    type_vocab_size: int = 2

    def __post_init__(self):
        if self.initializer_range is None:
            self.initializer_range = linear_std(self.hidden_size)

    @classmethod
    def from_json(cls, bert_json: dict) -> "BertConfig":
        """From an original BERT JSON: `add_cross_attention: true` = single-stream, `fusion_layer:
        k` = two-stage."""
        for name, limit in LIMITS.items():
            value = bert_json.get(name, 1)
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise UserError(f"{name} {brief(value)} in the BERT JSON: expected 1 to {limit:,}")
        ours = {f.name for f in fields(cls)}
        config = cls(**{name: value for name, value in bert_json.items() if name in ours})
        if "single_stream" not in bert_json:
            if not bert_json.get("add_cross_attention") and "fusion_layer" not in bert_json:
                raise UserError(
                    "the BERT JSON names neither add_cross_attention: true (SIMLA) nor fusion_layer "
                    "(ALBEF)"
                )
            config.single_stream = "fusion_layer" not in bert_json
        for name, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if (value := bert_json.get(name, known)) != known:
                raise UserError(
                    f"{name} {brief(value)} in the BERT JSON: only {known} is implemented"
                )
        return config


@dataclass
class LayerCache:
    """Keys and values that a layer has computed: own [R,H,T,d] of the past tokens, cross [B,H,N,d] of
    what cross-attention reads."""

    own: tuple[Tensor, Tensor] | None = None
    cross: tuple[Tensor, Tensor] | None = None


@dataclass
class DecoderCache:
    """Keys and values of a causal decoding under way; pass the same object with each further piece
    of text."""

    layers: dict[int, LayerCache] = field(default_factory=dict)
    mask: Tensor | None = None  # [R,T] bool, which past tokens are real

    @property
    def length(self) -> int:
        """Past tokens T."""
        return 0 if self.mask is None else self.mask.shape[1]

    def select(self, rows: Tensor) -> "DecoderCache":
        """The cache of these rows (int64, repeats allowed); cross keys stay shared, the next call
        names its `rows`."""
        layers = {}
        for number, layer in self.layers.items():
            keys, values = layer.own
            own = (keys.index_select(0, rows), values.index_select(0, rows))
            layers[number] = LayerCache(own, layer.cross)
        return DecoderCache(layers, self.mask.index_select(0, rows))


class Embeddings(nn.Module):
    """Word (or given) embeddings + position (+ token type 0) -> LayerNorm -> dropout."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if not config.single_stream:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer(
            "position_ids", torch.arange(config.max_position_embeddings).unsqueeze(0)
        )

    def forward(
        self, ids: Tensor | None = None, embeds: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """ids [R,L] or embeds [R,L,D] -> [R,L,D]; `start` is the position of the first token."""
        words = self.word_embeddings(ids) if embeds is None else embeds
        end = start + words.shape[1]
        limit = self.position_embeddings.num_embeddings
        if end > limit:
            raise UserError(
                f"{end} tokens, but max_position_embeddings in the BERT JSON is {limit}: shorten the "
                "text or the image"
            )
        states = words + self.position_embeddings.weight[start:end]
        if hasattr(self, "token_type_embeddings"):
            states = states + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(states))


class AttentionOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(update)))."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, update: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(update)))


class Attention(nn.Module):
    """Multi-head attention with residual and LayerNorm; `kv_width` is the width of what it attends
    to."""

    def __init__(self, config: BertConfig, kv_width: int):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(kv_width, width),
                "value": nn.Linear(kv_width, width),
            }
        )
        self.output = AttentionOutput(width, config)

    def query(self, hidden: Tensor) -> Tensor:
        """[R,L,D] -> [R,H,L,d]."""
        return split_heads(self.self["query"](hidden), self.heads)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[B,N,kv_width] -> keys and values [B,H,N,d]."""
        keys = split_heads(self.self["key"](states), self.heads)
        values = split_heads(self.self["value"](states), self.heads)
        return keys, values

    def forward(
        self,
        hidden: Tensor,
        keys_values: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: Tensor | None = None,
        shared: bool = False,
        with_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[R,L,D] -> ([R,L,D], probabilities before dropout or None); shared key sets as in
        `attend_shared`."""
        query = self.query(hidden)
        key, value = keys_values
        dropout = self.dropout if self.training else 0.0
        if with_map:
            if shared:
                which = key_set_of_rows(len(query), len(key), rows, query.device)
                key = key.index_select(0, which)
                value = value.index_select(0, which)
                mask = None if mask is None else mask.index_select(0, which)
            probabilities = attention_map(query, key, mask)
            context = F.dropout(probabilities, dropout).to(value.dtype) @ value
        else:
            probabilities = None
            if shared:
                context = attend_shared(query, key, value, mask, rows, dropout)
            else:
                context = attend(query, key, value, mask, dropout)
        return self.output(merge_heads(context), hidden), probabilities


class Layer(nn.Module):
    """Self-attention, cross-attention where it has one and is given image tokens, feed-forward."""

    def __init__(self, config: BertConfig, index: int):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if index >= config.fusion_layer:
            self.crossattention = Attention(config, config.encoder_width)
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = AttentionOutput(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        cache: LayerCache | None = None,
        map_of: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[R,L,D] -> [R,L,D]; see `XBert.run`. The masks are [R,1,L or 1,L] and [B,1,1,N].

        keep: int64 [R,K], compute only these positions' outputs -> [R,K,D].
        map_of: "self" or "cross" also returns those probabilities; "cls" returns nothing but the
        self-attention probabilities [R,H,L] of the first token.
        """
        if map_of == "cls":
            key = split_heads(self.attention.self["key"](hidden), self.attention.heads)
            return attention_map(self.attention.query(hidden[:, :1]), key, mask).squeeze(2)
        keys, values = self.attention.keys_values(hidden)
        if cache is not None:
            if cache.own is not None:
                past_keys, past_values = cache.own
                keys = torch.cat([past_keys, keys], dim=2)
                values = torch.cat([past_values, values], dim=2)
            cache.own = (keys, values)
        if keep is not None:
            hidden = at_positions(hidden, keep)
        hidden, self_map = self.attention(hidden, (keys, values), mask, with_map=map_of == "self")
        cross_map = None
        if image is not None:
            keys_values = self.cross_keys_values(image, cache)
            hidden, cross_map = self.crossattention(
                hidden, keys_values, image_mask, rows, shared=True, with_map=map_of == "cross"
            )
        hidden = self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)
        if map_of is None:
            return hidden
        return hidden, self_map if map_of == "self" else cross_map

    def cross_keys_values(self, image: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the image tokens, projected once per decoding where there is a
        cache."""
        if cache is None:
            return self.crossattention.keys_values(image)
        if cache.cross is None:
            cache.cross = self.crossattention.keys_values(image)
        return cache.cross


class XBert(nn.Module):
    """The text and fusion transformer without a head."""

    def __init__(self, config: BertConfig):
        super().__init__()
        check_geometry(config)
        self.config = config
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        init_bert(self, config)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        return self.encoder["layer"]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    def run(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        image: Tensor | list[Tensor] | None = None,
        *,
        image_mask: Tensor | list[Tensor | None] | None = None,
        rows: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        keep: Tensor | None = None,
        causal: bool = False,
        cache: DecoderCache | None = None,
        map_of: tuple[str, int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Layers first..last-1 over states [R,L,D]; returns [R,L,D].

        mask: bool [R,L], True = real token; None = all. Every row needs a real token.
        image: tokens [B,N,W] for cross-attention, None = skip it; a list of images (NLVR) is
            attended to in turn, layer i taking element (i - fusion_layer) mod len.
        image_mask: bool [B,N] (or a list alike), None = all.
        rows: which image the text rows attend to. The last len(rows) text rows attend to the images
            `rows` (int64) names; those before come in whole groups of B, row r attending to image
            r mod B. Keys and values are projected once per image, however many rows share it.
        keep: int64 [R,K]; the last of these layers computes these positions alone -> [R,K,D].
        causal: a token sees itself and the tokens before it; with `cache` also the tokens of the
            earlier calls.
        map_of: ("self" | "cross", layer): also return that layer's probabilities [R,H,L,L] or
            [R,H,L,N], in the graph.
        """
        last = self.depth if last is None else last
        self_mask = attention_mask(hidden, mask, causal, cache)
        images = image if isinstance(image, list) else [image]
        image_masks = image_mask if isinstance(image_mask, list) else [image_mask] * len(images)
        image_masks = [None if m is None else m[:, None, None, :] for m in image_masks]
        probabilities = None
        for i in range(first, last):
            turn = (i - self.config.fusion_layer) % len(images)
            fused = i >= self.config.fusion_layer
            output = self.layers[i](
                hidden,
                self_mask,
                image=images[turn] if fused else None,
                image_mask=image_masks[turn] if fused else None,
                rows=rows,
                keep=keep if i == last - 1 else None,
                # not all of them: a layer's number would give every layer a graph of its own
                cache=None if cache is None else cache.layers.setdefault(i, LayerCache()),
                map_of=map_of[0] if map_of is not None and map_of[1] == i else None,
            )
            if isinstance(output, tuple):
                hidden, probabilities = output
            else:
                hidden = output
        return hidden if map_of is None else (hidden, probabilities)

    def text_stage(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """What fusion starts from, [R,L,D]: the embeddings, then the layers below `fusion_layer`
        (none for SIMLA)."""
        return self.run(self.embeddings(ids), mask, last=self.config.fusion_layer)

    def encode_text(self, ids: Tensor, mask: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """The text-only encoding [R,L,D] of token ids [R,L]."""
        return self.text_from_stage(self.text_stage(ids, mask), mask, keep)

    def text_from_stage(
        self, stage: Tensor, mask: Tensor | None, keep: Tensor | None = None
    ) -> Tensor:
        """The text-only encoding given `text_stage`'s states: those themselves (two-stage), or all
        layers over them."""
        if self.config.single_stream:
            return self.run(stage, mask, keep=keep)
        return stage if keep is None else at_positions(stage, keep)

    def fuse(
        self, stage: Tensor, mask: Tensor | None, image: Tensor | list[Tensor], **options
    ) -> Tensor:
        """The fusion layers over `text_stage`'s states and image tokens; options as in `run`."""
        return self.run(stage, mask, image, first=self.config.fusion_layer, **options)

    def cls_attention(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention probabilities [R,H,L] of the first token in the last layer, whose input is
        `hidden`."""
        return self.layers[-1](hidden, attention_mask(hidden, mask), map_of="cls")

    def forward(
        self,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        image: Tensor | list[Tensor] | None = None,
        *,
        embeds: Tensor | None = None,
        cache: DecoderCache | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All layers from token ids [R,L] (or input embeddings [R,L,D]); further options as in
        `run`."""
        start = 0 if cache is None else cache.length
        return self.run(self.embeddings(ids, embeds, start), mask, image, cache=cache, **options)


class PredictionHead(nn.Module):
    """dense, GELU, LayerNorm, then the vocabulary; the last matrix is the word embeddings."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        init_bert(self.transform, config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[...,D] -> [...,V]."""
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden))))


class XBertLM(nn.Module):
    """XBert with the language-model head: masked (pre-training) and causal (answer decoder) models
    alike."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = XBert(config)
        head = PredictionHead(config, self.bert.embeddings.word_embeddings)
        self.cls = nn.ModuleDict({"predictions": head})

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [...,V] of states [...,D]."""
        return self.cls["predictions"](hidden)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, not rounded under autocast."""
        return exact(self.cls["predictions"], hidden)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, image: Tensor | None = None, **options
    ) -> Tensor:
        """Logits [R,L,V]; options as in `XBert.forward`."""
        return self.logits(self.bert(ids, mask, image, **options))


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """States [R,K,D] at the positions int64 [R,K] of [R,L,D]."""
    return states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def attention_mask(
    hidden: Tensor, mask: Tensor | None, causal: bool = False, cache: DecoderCache | None = None
) -> Tensor | None:
    """Boolean mask [R,1,1,T+L], causal [R,1,L,T+L], of L new tokens after T cached ones; extends
    the cache's mask."""
    n_rows, length = hidden.shape[:2]
    if cache is not None:
        if mask is None:
            mask = torch.ones(n_rows, length, dtype=torch.bool, device=hidden.device)
        if cache.mask is not None:
            mask = torch.cat([cache.mask, mask], dim=1)
        cache.mask = mask
    if not causal:
        return None if mask is None else mask[:, None, None, :]
    total = length if mask is None else mask.shape[1]
    visible = torch.ones(length, total, dtype=torch.bool, device=hidden.device).tril(total - length)
    return visible[None, None] if mask is None else mask[:, None, None, :] & visible


def init_bert(module: nn.Module, config: BertConfig) -> None:
    """Normal (initializer_range) weights, zero biases; LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=config.initializer_range)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


def check_geometry(config: BertConfig) -> None:
    """Raise UserError where the sizes do not fit."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}: fix the BERT JSON (bert_config)"
        )
    if not 0 <= config.fusion_layer <= config.num_hidden_layers:
        raise UserError(
            f"fusion_layer {config.fusion_layer}: the text transformer has {config.num_hidden_layers} "
            "layers; fix the BERT JSON (bert_config)"
        )
    if config.single_stream and config.fusion_layer:
        raise UserError(
            "a single-stream BERT has cross-attention in every layer: set fusion_layer to 0 in the "
            "BERT JSON (bert_config)"
        )
