"""The recognition network: what labels see, what is trained, how weights come together, and what is
refused."""

import math
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from models.dual_encoder.openai import OpenAICLIP
from models.layers.openai_towers import OpenAIConfig, TextShape
from models.recognition.nxtp import IGNORED, NxtpConfig, among, grid_positions, with_counts
from models.weights.build_nxtp import NetworkOptions
from models.weights.clip import to_hugging_face
from models.weights.loading import load_checkpoint
from models.weights.nxtp import (
    decayed_names,
    decoder_state,
    geometry,
    recognition_state,
    trained_names,
)
from runtime.optim.build import Optimizer, build_optimizer, parameter_groups
from tests.helpers.tiny_nxtp import meta_folder, network

PROMPT = [30, 1, 5, 6]


CLIP_SIZES = {
    "embed_dim": 16,
    "image_size": 32,
    "vision_width": 64,
    "vision_layers": 2,
    "patch_size": 8,
    "text": TextShape(8, 30, 64, 1, 1),
}


class Tokens:
    vocab_size, image = 40, 38


def text(labels: list[list[int]], vocabulary: int = 40) -> dict[str, torch.Tensor]:
    """One image's labels behind the prompt as a batch, each closed by token 9."""
    ids, segments = list(PROMPT), [0] * len(PROMPT)
    for number, label in enumerate(labels, 1):
        ids += [*label, 9]
        segments += [number] * (len(label) + 1)
    targets = torch.tensor([*ids[1:], IGNORED])
    positions = (targets != IGNORED).nonzero().flatten()
    return {
        "text_ids": torch.tensor([ids]), "segments": torch.tensor([segments]),
        "positions": positions, "labels": targets[positions],
    }  # fmt: skip


@torch.no_grad()
def test_labels_do_not_see_one_another():
    """Exchanging the first label leaves the second's states as they are, at equal length; and the
    other way round."""
    model, image = network(), torch.randn(1, 3, 32, 32)
    tokens = model.encode_image(image)

    def states(*labels):
        batch = text(list(labels))
        return model.states(tokens, batch["text_ids"], batch["segments"])[0]

    one, other = states([20, 21], [22, 23]), states([24, 25], [22, 23])
    assert torch.allclose(one[7:], other[7:], atol=1e-6) and not torch.allclose(
        one[4:7], other[4:7], atol=1e-3
    )
    assert torch.allclose(one[:7], states([20, 21], [24, 25])[:7], atol=1e-6)


@torch.no_grad()
def test_the_last_label_sees_itself_unless_it_is_left_open():
    model, tokens = network(), torch.randn(1, 16, 32)
    batch = text([[20, 21]])

    def last(first: int, segment: int) -> torch.Tensor:
        ids = batch["text_ids"].clone()
        ids[0, 4] = first
        segments = batch["segments"].where(batch["segments"] == 0, segment)
        return model.states(tokens, ids, segments)[0, 5]

    assert not torch.allclose(last(20, 1), last(24, 1), atol=1e-3)
    assert torch.equal(last(20, -1), last(24, -1))  # the published code's last label


def test_loss_is_the_mean_over_targets_and_padding_changes_nothing():
    model, image = network(), torch.randn(1, 3, 32, 32)
    batch = text([[20, 21], [22]])
    loss = model(image, **batch)["loss_objs"]
    states = model.states(model.encode_image(image), batch["text_ids"], batch["segments"])[0]
    expected = torch.nn.functional.cross_entropy(
        model.logits(states[batch["positions"]]), batch["labels"]
    )
    assert torch.allclose(loss, expected)
    padded = {
        "text_ids": torch.nn.functional.pad(batch["text_ids"], (0, 5), value=39),
        "segments": torch.nn.functional.pad(batch["segments"], (0, 5), value=-1),
        "positions": torch.nn.functional.pad(batch["positions"], (0, 3)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=IGNORED),
    }
    assert torch.allclose(model(image, **padded)["loss_objs"], loss, atol=1e-6)


def test_fewer_targets_than_processes_are_a_mean_too():
    """One target on the first of two processes, whose mean count is a half: their mean loss is its
    cross entropy."""
    model, image = network(), torch.randn(1, 3, 32, 32)
    batch = text([[20]])
    batch["labels"][1:] = IGNORED
    alone = model(image, **batch)["loss_objs"]
    half = torch.tensor(0.5)
    torch.testing.assert_close(model(image, **batch, count=half)["loss_objs"] / 2, alone)
    batch["labels"][:] = IGNORED
    assert model(image, **batch)["loss_objs"] == 0


def test_every_target_of_micro_batches_counts_the_same():
    model = network()
    parts = []
    for labels, captions in ([[20, 21, 22]], [[24]]), ([[23]], [[25, 26], [27]]):
        caption = {f"caption_{name}": value for name, value in text(captions).items()}
        parts.append({"image": torch.randn(1, 3, 32, 32), **text(labels), **caption})
    alone = [model(**part) for part in parts]
    counted = [model(**part) for part in with_counts(parts)]
    for loss, labels in {"loss_objs": "labels", "loss_caps": "caption_labels"}.items():
        first, second = (len(part[labels]) for part in parts)
        mean = (first * alone[0][loss] + second * alone[1][loss]) / (first + second)
        assert first != second
        torch.testing.assert_close((counted[0][loss] + counted[1][loss]) / 2, mean)


def test_captions_are_computed_only_where_they_are_given():
    model, image, batch = network(), torch.randn(1, 3, 32, 32), text([[20]])
    assert model(image, **batch).keys() == {"loss_objs"}
    caption = {f"caption_{name}": value for name, value in text([[21, 22]]).items()}
    caption["caption_segments"] = caption["caption_segments"] * 0
    both = model(image, **batch, **caption)
    assert both.keys() == {"loss_objs", "loss_caps"} and both["loss_caps"] != both["loss_objs"]


@pytest.mark.parametrize("where", ["trained_rows", "trained_outputs"])
def test_only_the_chosen_rows_are_trained(where):
    model, image = network(**{where: (30,)}), torch.randn(1, 3, 32, 32)
    name = "tok_embeddings" if where == "trained_rows" else "output"
    weight = getattr(model.language_decoder, name).weight
    before, batch = weight.detach().clone(), text([[20, 21]])
    plain = network()(image, **batch)["loss_objs"]
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        loss = model(image, **batch)["loss_objs"]
        loss.backward()
        optimizer.step()
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [30]
    assert torch.allclose(plain, network(**{where: (30,)})(image, **batch)["loss_objs"])


def test_the_optimizer_updates_the_trained_rows_alone_and_as_adamw():
    """Equal to AdamW over whole tables, states included; of other rows it reads not even a gradient."""
    both = {"trained_rows": (30, 32), "trained_outputs": (31,)}
    model, plain, image = network(**both), network(**both), torch.randn(1, 3, 32, 32)
    plain.load_state_dict(model.state_dict())
    config = Optimizer(lr=0.1, weight_decay=0.1)
    own = build_optimizer(model, config)
    tables = {name: p for name, p in model.named_parameters() if p in own.rows}
    decoder = "language_decoder."
    assert list(tables) == [f"{decoder}tok_embeddings.weight", f"{decoder}output.weight"]
    reference = torch.optim.AdamW(parameter_groups(plain, config), lr=0.1, fused=True)
    for _ in range(3):
        for network_, optimizer in ((model, own), (plain, reference)):
            network_(image, **text([[20, 21]]))["loss_objs"].backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other), name
        if mine in own.state:
            assert torch.equal(own.state[mine]["exp_avg"], reference.state[other]["exp_avg"])
            assert torch.equal(own.state[mine]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])
    for table, rows in zip(tables.values(), ([30, 31, 32], [31]), strict=True):
        before = table.detach().clone()
        table.grad = torch.full_like(table, 1.0)
        own.step()
        assert (table != before).any(1).nonzero().flatten().tolist() == rows


def test_trained_and_decayed_names():
    model = network()
    names = dict(model.named_parameters())
    assert trained_names(list(names), None) == set(names)
    last = trained_names(list(names), 1)
    assert "vision_encoder.transformer.resblocks.1.ln_1.weight" in last
    assert not any(
        name.startswith(("vision_encoder.transformer.resblocks.0.", "vision_encoder.conv1"))
        for name in last
    )
    assert "vision_encoder.transformer.resblocks.1.ln_1.weight" not in trained_names(list(names), 0)
    decayed = decayed_names({name: names[name] for name in last})
    assert "language_decoder.norm.weight" in decayed  # as the original
    assert (
        "language_decoder.tok_embeddings.weight" not in decayed
        and "vision_encoder.ln_post.weight" not in decayed
    )


def clip_state(width: int = 64) -> dict[str, torch.Tensor]:
    """A tiny CLIP in OpenAI's layout."""
    torch.manual_seed(3)
    return OpenAICLIP(OpenAIConfig(**CLIP_SIZES | {"vision_width": width})).state_dict()


def test_a_random_tower_starts_with_waves_from_one_patch_to_four_grids():
    side, frequencies = 5, 3  # of width 12: sines, then cosines, of the row, then of the column
    table = grid_positions(1 + side * side, 4 * frequencies)
    assert table.shape == (26, 12) and not table[0].any()
    for row, column in ((0, 0), (1, 4), (3, 2)):
        expected = []
        for place in (row, column):
            angles = [place / 20 ** (number / 3) for number in range(3)]
            expected += [math.sin(angle) for angle in angles]
            expected += [math.cos(angle) for angle in angles]
        assert table[1 + side * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_table_of_which_the_image_token_alone_is_trained():
    for embeddings, outputs in (("special", "all"), ("all", "special")):
        options = {"train_embeddings": embeddings, "train_outputs": outputs}
        config = (
            NetworkOptions(decoder=(32, 1), vision=(64, 1, 14), **options).build(Tokens()).config
        )
        of_rows, of_outputs = ((38,) if each == "special" else None for each in options.values())
        assert (config.trained_rows, config.trained_outputs) == (of_rows, of_outputs)


class TestWeights:
    def test_clip_and_llama_together(self, tmp_path):
        llama = meta_folder(tmp_path, vocabulary=38)
        clip = clip_state()
        model = NetworkOptions(decoder_layers=2).build(Tokens(), clip, tmp_path)
        assert torch.equal(model.vision_encoder.conv1.weight, clip["visual.conv1.weight"])
        assert torch.equal(model.language_decoder.norm.weight, llama.norm.weight)
        table = model.language_decoder.tok_embeddings.weight
        assert table.shape == (40, 32) and torch.equal(table[:38], llama.tok_embeddings.weight)
        assert not model.language_decoder.output.weight[-1].any()
        assert len(model.language_decoder.layers) == 2

    def test_clip_of_hugging_face(self, tmp_path):
        torch.manual_seed(3)
        theirs = OpenAICLIP(OpenAIConfig(**CLIP_SIZES))
        model = NetworkOptions(decoder=(32, 1)).build(Tokens(), to_hugging_face(theirs))
        ours, image = model.vision_encoder, torch.randn(1, 3, 32, 32)
        assert torch.equal(ours.tokens(image), theirs.visual.tokens(image))

    def test_clip_is_read_where_the_checkpoint_lacks_the_tower_alone(self):
        """--evaluate of a run does without the file of CLIP that its recipe names."""
        whole = NetworkOptions(decoder=(64, 1), vision=(64, 1, 14)).build(Tokens()).state_dict()
        published = {k: v for k, v in whole.items() if not k.startswith("vision_encoder.conv1")}
        read = []

        def read_clip(path: Path | None, checkpoint: dict | None) -> dict | None:
            return NetworkOptions().read_clip(
                path, checkpoint, lambda p: read.append(p) or {}, lambda _: {}
            )

        file = Path()
        for checkpoint in (whole, {f"module.{name}": value for name, value in whole.items()}):
            assert read_clip(file, checkpoint) is None and not read
        for checkpoint in (published, None):
            read_clip(file, checkpoint)
        assert read == [file] * 2 and read_clip(None, None) is None

    def test_the_activation_of_clip_is_the_one_beside_its_weights(self, tmp_path, capsys):
        """Of open_clip's gelu models and of transformers' folders; a run remembers it."""
        theirs = OpenAICLIP(OpenAIConfig(**CLIP_SIZES, vision_activation="gelu"))
        image = torch.randn(1, 3, 32, 32)
        half = {"mean": [0.5] * 3, "std": [0.5] * 3}
        of_open_clip = {"model_cfg": {}, "preprocess_cfg": half}
        for layout in ("open_clip", "hf"):
            about = {"open_clip_config.json": of_open_clip}
            state = theirs.state_dict()
            if layout == "hf":
                about = {"config.json": {"text_config": {"hidden_act": "gelu"}}}
                state = to_hugging_face(theirs)
            networks = NetworkOptions(decoder=(32, 1))
            clip = networks.read_clip(tmp_path, None, lambda _, s=state: s, lambda _, a=about: a)
            tower = networks.build(Tokens(), clip).vision_encoder
            assert torch.equal(tower.tokens(image), theirs.visual.tokens(image))
            assert networks.vision_activation == "gelu"
        assert capsys.readouterr().out.count("mean (0.5, 0.5, 0.5)") == 1
        saved = networks.build(Tokens(), checkpoint=networks.build(Tokens(), clip).state_dict())
        assert saved.config.vision.vision_activation == "gelu"
        other = NetworkOptions(vision_activation="quick_gelu")
        with pytest.raises(UserError, match="was trained with gelu"):
            other.read_clip(tmp_path, None, lambda _: state, lambda _: about)

    def test_a_published_checkpoint_holds_trained_tensors_only(self):
        model = network()
        trained = trained_names([name for name, _ in model.named_parameters()], 0)
        published = {
            f"module.{name}": value for name, value in model.state_dict().items() if name in trained
        }
        with pytest.raises(UserError, match=r"trained tensors only.*--clip ViT-L-14.pt"):
            recognition_state(published, None)
        state = recognition_state(published, clip_state())
        assert state.keys() == model.state_dict().keys()
        assert torch.equal(state["vision_encoder.proj.weight"], model.vision_encoder.proj.weight)
        assert torch.equal(
            state["vision_encoder.conv1.weight"], clip_state()["visual.conv1.weight"]
        )
        again = network(seed=1)
        assert not load_checkpoint(again, state)
        assert geometry(state, 4)[1].kv_heads == 2

    def test_our_own_complete_one(self):
        model = network()
        built = NetworkOptions(decoder_heads=4).build(Tokens(), checkpoint=model.state_dict())
        assert all(
            torch.equal(value, model.state_dict()[name])
            for name, value in built.state_dict().items()
        )

    def test_images_of_another_size(self):
        model = network()
        built = NetworkOptions(decoder_heads=4, image_size=48).build(
            Tokens(), checkpoint=model.state_dict()
        )
        assert built.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 36, 32)
        wide = NetworkOptions(decoder=(32, 1), image_size=48).build(Tokens(), clip_state())
        assert wide.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 36, 32)

    def test_clips_resnet(self):
        sizes = {
            "embed_dim": 16,
            "image_size": 64,
            "vision_width": 8,
            "vision_layers": (1, 1, 1, 1),
            "patch_size": 0,
        }
        state = OpenAICLIP(OpenAIConfig(**sizes, text=TextShape(8, 30, 64, 1, 1))).state_dict()
        model = NetworkOptions(decoder=(32, 1), decoder_heads=2).build(Tokens(), state)
        assert torch.equal(
            model.vision_encoder.layer4[0].conv3.weight, state["visual.layer4.0.conv3.weight"]
        )
        assert model.encode_image(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 32)
        again = NetworkOptions(decoder_heads=2, image_size=64).build(
            Tokens(), checkpoint=model.state_dict()
        )
        image = torch.randn(2, 3, 64, 64)
        assert torch.equal(again.eval().encode_image(image), model.eval().encode_image(image))
        model.vision_encoder.conv1.weight.requires_grad_(False)
        assert not model.train().vision_encoder.bn1.training  # statistics of a frozen tower stay
        small = NetworkOptions(decoder=(32, 1), resnet=[8, 1, 1], image_size=48).build(Tokens())
        assert small.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 36, 32)

    @torch.no_grad()
    def test_the_places_of_a_resnet(self):
        """A map of 12 x 12 places, halved once; every place is where it is in the image."""
        model = (
            NetworkOptions(decoder=(32, 1), resnet=[8, 1, 1], image_size=48).build(Tokens()).eval()
        )
        image = torch.zeros(2, 3, 48, 48)
        image[1, :, :8, :8] = 3.0
        blank, marked = model.encode_image(image)
        apart = (blank - marked).norm(dim=-1).unflatten(0, (6, 6))
        assert apart[0, 0] > 0.1 and apart[4:, 4:].max() < 1e-5
        encoder = model.vision_encoder
        assert torch.allclose(encoder(image)[:, 0], encoder(image)[:, 1:].mean(1), atol=1e-6)

    def test_a_missing_tensor_is_named(self):
        state = dict(network().state_dict())
        del state["language_decoder.layers.1.feed_forward.w2.weight"]
        with pytest.raises(UserError, match=r"layers.1.feed_forward.w2.weight"):
            NetworkOptions(decoder_heads=4).build(Tokens(), checkpoint=state)


def test_images_of_a_part_of_a_patch_are_refused_with_weights_too():
    clip = clip_state()
    patch = clip["visual.conv1.weight"].shape[-1]
    built = NetworkOptions(decoder=(32, 1)).build(Tokens(), clip)
    for given in ({"clip": clip}, {"checkpoint": built.state_dict()}):
        odd = NetworkOptions(decoder=(32, 1), image_size=4 * patch + 1)
        with pytest.raises(UserError, match=f"no multiple of the patch size {patch}"):
            odd.build(Tokens(), **given)


class TestRefused:
    def test_another_tokenizer(self):
        with pytest.raises(UserError, match=r"33 entries.*but the checkpoint embeds 40"):
            NetworkOptions(decoder_heads=4).build(
                type("T", (), {"vocab_size": 33, "image": 31}), checkpoint=network().state_dict()
            )

    def test_another_tokenizer_than_llamas(self, tmp_path):
        meta_folder(tmp_path, vocabulary=60)
        with pytest.raises(UserError, match="60 embeddings, but the tokenizer has 38 entries"):
            NetworkOptions().build(Tokens(), None, tmp_path)
        with pytest.raises(UserError, match=r"use the tokenizer.model that belongs"):
            decoder_state({"tok_embeddings.weight": torch.zeros(3, 4)}, 40, "here")
        with pytest.raises(UserError, match="40 embeddings, but the tokenizer has 38 entries;"):
            decoder_state({"tok_embeddings.weight": torch.zeros(40, 4)}, 40, "here", known=38)

    def test_deeper_than_it_is(self):
        with pytest.raises(UserError, match="has 2 blocks, it cannot be cut to 3"):
            NetworkOptions(decoder_layers=3).build(Tokens(), checkpoint=network().state_dict())

    def test_some_blocks_of_a_resnet(self):
        names = list(
            NetworkOptions(decoder=(32, 1), resnet=[8, 1], image_size=32)
            .build(Tokens())
            .state_dict()
        )
        with pytest.raises(
            UserError, match="train_vision_blocks: a ResNet's blocks are trained all together"
        ):
            trained_names(names, 2)
        assert not any(name.startswith("vision_encoder.layer") for name in trained_names(names, 0))

    def test_more_blocks_than_there_are(self):
        names = list(network().state_dict())
        assert "vision_encoder.transformer.resblocks.0.ln_1.weight" in trained_names(names, 2)
        with pytest.raises(UserError, match="train_vision_blocks 3: the image tower has 2 blocks"):
            trained_names(names, 3)

    @pytest.mark.parametrize("sizes", [[8], [8, 0], [7, 1], [8, 1, 1, 1, 1, 1]])
    def test_sizes_of_no_resnet(self, sizes):
        with pytest.raises(UserError, match="name an even width, then the blocks"):
            NetworkOptions(resnet=sizes)

    def test_no_recognition_network(self):
        with pytest.raises(UserError, match="no NXTP checkpoint"):
            recognition_state(clip_state(), None)

    def test_widths_that_do_not_meet(self):
        config = network().config
        with pytest.raises(UserError, match="image tokens of width 16, decoder of width 32"):
            NxtpConfig(OpenAIConfig(embed_dim=16), config.decoder)


def test_among():
    assert among(torch.tensor([[1, 2], [3, 1]]), (1, 3)).tolist() == [[True, False], [True, True]]
