"""NXTP's network from whatever there is: a checkpoint, CLIP and LLaMA, one of them, or nothing but
sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from base.errors import UserError
from base.knobs import check_choices, knob
from base.limits import BLOCKS, SIDE, WIDTH
from base.memory import check_fits, parameter_count
from base.pixels import OPENAI
from base.torch_files import unwrap_names
from models.layers.clip_towers import ACTIVATIONS
from models.layers.llama import LlamaConfig, own_part
from models.layers.openai_towers import OpenAIConfig
from models.recognition.nxtp import Nxtp, NxtpConfig
from models.weights.any_dual_encoder import clip_activation
from models.weights.clip import stated_activation
from models.weights.llama import cut, read_llama
from models.weights.loading import load_checkpoint
from models.weights.nxtp import (
    check_vocabulary,
    decoder_state,
    geometry,
    has_tower,
    openai_layout,
    recognition_state,
    vision_config,
    vision_state,
)
from models.weights.start_dual import check_pixels
from models.weights.torchscript import weights_and_about

State = dict[str, Tensor]


@dataclass(kw_only=True)
class NetworkOptions:
    """Sizes and settings of both networks; `build` fills in those that weights decide."""

    decoder_layers: int | None = knob(
        None, "blocks of the decoder that are kept; none = all", low=1, high=BLOCKS
    )
    image_size: int | None = knob(
        None, "side of the images in pixels; none = CLIP's own", low=1, high=SIDE
    )
    vision: tuple[int, int, int] = knob(
        (1024, 24, 14),
        "random image tower: width, blocks, side of a patch",
        rare=True,
        low=1,
        high=WIDTH,
    )
    image_tower: str | None = knob(
        None, "instead of CLIP's tower: timm/NAME (weights fetched) or timm/NAME:FILE", rare=True
    )
    resnet: list[int] = knob(
        [],
        "random tower like CLIP's ResNets instead: width, blocks by stage",
        rare=True,
        low=1,
        high=WIDTH,
    )
    decoder: tuple[int, int] = knob(
        (4096, 32), "random decoder: width, blocks", rare=True, low=1, high=WIDTH
    )
    decoder_heads: int | None = knob(
        None,
        "attention heads of the decoder; none = LLaMA's, 128 wide each",
        rare=True,
        low=1,
        high=WIDTH,
    )
    norm_eps: float = knob(1e-5, "epsilon of the decoder's norms", rare=True, low=0)
    rope_theta: float = knob(10000.0, "base of the decoder's rotary positions", rare=True, low=1)
    rope_scaling: list[float] = knob(
        [],
        "LLaMA 3.1's rotary positions: factor, low and high frequency factor, original length",
        rare=True,
        low=0,
    )
    vision_activation: str | None = knob(
        None,
        "of CLIP's tower; none = as the files beside its weights say, else quick_gelu",
        choices=(*ACTIVATIONS,),
        rare=True,
    )
    prefix_image: bool = knob(
        True, "image tokens see one another, else only those before them", rare=True
    )
    train_embeddings: str = knob(
        "all",
        "rows of the token table to train: all, or special (<|image|> alone)",
        choices=("all", "special"),
    )
    train_outputs: str = knob("all", "the same of the decoder's head", choices=("all", "special"))

    def __post_init__(self):
        check_choices(self)
        if self.resnet and (
            not 2 <= len(self.resnet) <= 5 or min(self.resnet) < 1 or self.resnet[0] % 2
        ):
            raise UserError(
                f"resnet: {self.resnet}: name an even width, then the blocks of one to four stages"
            )
        for name, blocks in (("vision", self.vision[1]), ("decoder", self.decoder[1])):
            if blocks > BLOCKS:
                raise UserError(f"{name}: {blocks:,} blocks are more than {BLOCKS}")

    def read_clip(
        self,
        path: Path | None,
        checkpoint: State | None,
        read_weights: Callable[[Path], State],
        describe: Callable[[Path], Mapping[str, Any]],
    ) -> State | None:
        """The weights of CLIP in OpenAI's TorchScript archive or another file, whose activation is
        that of the tower; None where no file is named, and where the checkpoint has the image tower:
        then the file need not be there. read_weights, describe: see `start_dual`. UserError."""
        if path is None or (checkpoint and has_tower(unwrap_names(checkpoint))):
            return None
        weights, about = weights_and_about(path, read_weights, describe)
        stated = stated_activation(weights, about) or clip_activation(about.get("config.json", {}))
        if stated and self.vision_activation not in (None, stated):
            raise UserError(
                f"vision_activation {self.vision_activation}: {path} was trained with {stated}; leave "
                "it out"
            )
        self.vision_activation = self.vision_activation or stated
        check_pixels(about, OPENAI, evaluates=False)
        return weights

    def build(
        self,
        tokenizer,
        clip: State | None = None,
        llama: str | Path | None = None,
        checkpoint: State | None = None,
        part: tuple[int, int] | None = None,
        read_weights: Callable[[Path], State] | None = None,
    ) -> Nxtp:
        """The network on the CPU.

        tokenizer: has vocab_size and `image`, the id of <|image|>. clip: CLIP's weights in any
        layout; llama: a folder; checkpoint: NXTP's, ours or published; what none of them has stays
        random. part: (rank, size) of a process that shares the decoder's matrices with others.
        read_weights: reads the file of image_tower; None = the tower stays random. Raises UserError
        where the host's memory would not hold the weights.
        """
        clip = openai_layout(clip) if clip else None
        if checkpoint:
            state = recognition_state(checkpoint, clip, self.decoder_layers, self.image_size)
            check_vocabulary(state, tokenizer.vocab_size, tokenizer)
            vision, decoder = geometry(
                state,
                self.decoder_heads,
                self.norm_eps,
                self.rope_theta,
                self.image_size,
                tuple(self.rope_scaling),
            )
            missing: list[str] = []
        else:
            vision, decoder, state, missing = self._start(tokenizer, clip, llama)
        activation = self.vision_activation or "quick_gelu"
        vision = replace(vision, vision_activation=activation)
        if part is not None:
            decoder = replace(decoder, tensor_parallel=True)
            state = own_part(state, *part)
        self.decoder_heads = decoder.n_heads
        self.image_size = vision.image_size
        self.vision_activation = activation
        self.norm_eps = decoder.norm_eps
        self.rope_theta = decoder.rope_theta
        self.rope_scaling = [*decoder.rope_scaling]
        special = (tokenizer.image,)
        config = NxtpConfig(
            vision,
            decoder,
            prefix=self.prefix_image,
            trained_rows=special if self.train_embeddings == "special" else None,
            trained_outputs=special if self.train_outputs == "special" else None,
            image_tower=self.image_tower,
        )
        if part is None:
            check_fits(parameter_count(lambda: Nxtp(config)), "NXTP's network")
        model = Nxtp(config)
        load_checkpoint(model, state, allowed_missing=missing)
        if self.image_tower and not checkpoint and read_weights is not None:
            model.vision_encoder.load(read_weights)
        return model

    def _start(self, tokenizer, clip: State | None, llama: str | Path | None):
        """Both geometries, the weights there are, and patterns of those that stay random."""
        if clip and self.image_tower:
            raise UserError("clip and image_tower exclude each other; choose one image tower")
        missing = ["vision_encoder.proj.weight" if clip else "vision_encoder.*"]
        if clip and "visual.layer1.0.conv1.weight" in clip:
            missing += ["vision_encoder.ln_post.*", "vision_encoder.*num_batches_tracked"]
        if llama:
            decoder, weights = read_llama(llama, self.decoder_layers)
            state = decoder_state(weights, tokenizer.vocab_size, llama, tokenizer.image)
            decoder = replace(decoder, vocab_size=tokenizer.vocab_size)
        else:
            decoder = cut(
                self._random_decoder(tokenizer.vocab_size), self.decoder_layers, "decoder"
            )
            state = {}
            missing.append("language_decoder.*")
        if clip:
            vision = vision_config(clip, decoder.dim, self.image_size)
            return vision, decoder, state | vision_state(clip, self.image_size), missing
        width, blocks, patch = (
            (self.resnet[0], tuple(self.resnet[1:]), 0) if self.resnet else self.vision
        )
        side = self.image_size or 224
        if patch and side % patch and not self.image_tower:
            raise UserError(f"image_size {side}: no multiple of the patch size {patch} (vision)")
        sizes = {"vision_width": width, "vision_layers": blocks, "patch_size": patch}
        vision = OpenAIConfig(embed_dim=decoder.dim, image_size=side, **sizes)
        return vision, decoder, state, missing

    def _random_decoder(self, vocabulary: int) -> LlamaConfig:
        dim, blocks = self.decoder
        return LlamaConfig(
            dim=dim,
            n_layers=blocks,
            n_heads=self.decoder_heads or max(1, dim // 128),
            vocab_size=vocabulary,
            multiple_of=min(256, max(2, dim // 2)),
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=tuple(self.rope_scaling),
        )
