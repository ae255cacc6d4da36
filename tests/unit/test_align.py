"""ALIGN's parts: geometries, padding, stochastic depth, LAMB, names, mistakes, transformers' layout
both ways."""

import json

import pytest
import torch
from torch.nn import functional as F

from base.errors import UserError
from dataset.images.align import AlignView, AlignViews
from dataset.text.align import AlignTokenizer
from models.dual_encoder.align import TEXTS, Align
from models.dual_encoder.base import NOT_LOADED, names_by_decay
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual, model_names, parts_of
from models.layers.batchnorm import GhostBatchNorm, collect, deal, synchronise_batch_norm
from models.layers.efficientnet import SHAPES, EfficientNet, EfficientNetShape, padded
from models.layers.xbert import BertConfig
from models.weights.align import (
    align_config,
    from_tensorflow_names,
    hugging_face_config,
    is_align,
    to_hugging_face,
)
from models.weights.loading import load_checkpoint
from runtime.optim.build import Optimizer, Precision, build_optimizer
from runtime.optim.lamb import Lamb

# parameters and batch-norm statistics of the published towers
SIZES = {
    "B0": (3_595_388, 39_456),
    "B1": (6_101_024, 59_488),
    "B2": (7_202_562, 64_752),
    "B3": (10_103_336, 84_224),
    "B4": (16_742_216, 121_616),
    "B5": (27_288_112, 168_640),
    "B6": (39_403_992, 219_824),
    "B7": (62_143_440, 305_600),
}
TEXT = BertConfig(30, 32, 2, 2, 64, 16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def count(tensors) -> int:
    return sum(t.numel() for t in tensors)


def tiny(model="ALIGN_B7_MINI", **values) -> Align:
    """A B7 in name, so that it fits transformers; its first stage keeps its width, which no
    published one does."""
    torch.manual_seed(0)
    image = EfficientNetShape(0.25, 0.34, drop_connect=0.0, virtual_batch=0)
    return Align(
        DualConfig(model=model, embed_dim=80, vocab_size=30, image_size=64, **values), image, TEXT
    )


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    with torch.device("meta"):
        tower = EfficientNet(SHAPES[name])
    statistics = [b for key, b in tower.named_buffers() if "running" in key]
    assert (count(tower.parameters()), count(statistics)) == SIZES[name]


@pytest.mark.parametrize("name, parameters", [("MINI", 11_335_040), ("BASE", 109_974_400)])
def test_text_sizes(name, parameters):
    with torch.device("meta"):
        model = build_dual(DualConfig(model=f"ALIGN_B3_{name}", embed_dim=640, vocab_size=30522))
    width = model.text_model.config.hidden_size
    pooler = width * width + width  # counted there, left out here
    assert (
        count([*model.text_model.parameters(), *model.text_projection.parameters()])
        == parameters - pooler
    )


def test_every_pair_is_a_model():
    names = [name for name in model_names() if name.startswith("ALIGN_")]
    assert len(names) == len(SHAPES) * len(TEXTS)
    for name in names:
        assert parts_of(name) == (Align, name.split("_")[1], 0)


EACH_ONCE = [
    *(f"ALIGN_{image}_TINY" for image in SHAPES),
    *(f"ALIGN_NANO_{text}" for text in TEXTS),
]


@pytest.mark.parametrize("name", dict.fromkeys(EACH_ONCE))
def test_every_tower_makes_a_model(name):
    with torch.device("meta"):
        model = build_dual(DualConfig(model=name, embed_dim=640))
    assert (model.image_projection is None) == ("_B7_" in name)


def test_maps_at_289_pixels():
    sizes = []
    with torch.device("meta"):
        tower = EfficientNet(SHAPES["B0"])
        hooks = [
            block.register_forward_hook(lambda m, i, o: sizes.append(o.shape[-1]))
            for block in tower.encoder["blocks"]
        ]
        assert tower.eval()(torch.empty(1, 3, 289, 289)).shape == (1, 320)
    assert len(hooks) == 16 and list(dict.fromkeys(sizes)) == [144, 72, 36, 18, 9]


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_is_that_of_even_sizes(kernel, size):
    conv = torch.nn.Conv2d(1, 1, kernel, stride=2, bias=False)
    x = torch.randn(1, 1, size, size)
    before, after = kernel // 2 - 1, kernel // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, stride=2)
    torch.testing.assert_close(padded(conv, x), expected)
    assert expected.shape[-1] == size // 2


def test_dealing():
    x = torch.arange(12)
    assert deal(x, 3).tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(collect(deal(x, 3), 3), x) and deal(x, 1) is x


def test_virtual_batches_are_apart():
    """A sample changes the outputs of its own virtual batch and of no other."""
    tower = EfficientNet(EfficientNetShape(0.25, 0.34, drop_connect=0.0, virtual_batch=4))
    image = torch.randn(8, 3, 32, 32)
    other = image.clone()
    other[0] += 1
    with torch.no_grad():
        changed = (tower(image) - tower(other)).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, False] * 4


def test_ghost_batch_norm_stays_itself():
    model = torch.nn.Sequential(GhostBatchNorm(4), torch.nn.BatchNorm2d(4))
    assert isinstance(synchronise_batch_norm(model)[0], GhostBatchNorm)
    with torch.no_grad():
        model[0].train()(torch.randn(32, 4, 2, 2))
    assert (
        model[0].num_batches_tracked == 0
    )  # a pass without gradient is half of a checkpointed one


def test_stochastic_depth_drops_samples():
    tower = EfficientNet(EfficientNetShape(0.25, 1.0, drop_connect=0.9, virtual_batch=0))
    rates = [block.drop for block in tower.encoder["blocks"]]
    assert rates == [0.9 * n / 16 for n in range(16)]
    block = next(b for b in reversed(tower.encoder["blocks"]) if b.skip)
    for name in ("running_mean", "running_var"):
        assert hasattr(block.projection["project_bn"], name)
    x = torch.randn(64, block.projection["project_conv"].out_channels, 4, 4)
    y = block(x)
    dropped = (y == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    block.eval()
    assert not (block(x) == x).flatten(1).all(1).any()


def test_lamb_agrees_with_timm():
    from timm.optim import Lamb as TimmLamb

    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (), (2, 3, 3, 3)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s) * 0.1) for s in shapes] for _ in range(2))
    groups = [
        [{"params": p[:3], "weight_decay": 0.01}, {"params": p[3:], "weight_decay": 0.0}]
        for p in (ours, theirs)
    ]
    optimizers = Lamb(groups[0], 1e-2), TimmLamb(groups[1], lr=1e-2, eps=1e-6, max_grad_norm=None)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_lamb_leaves_out_what_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(
        torch.nn.ParameterDict({"w": weight}), Optimizer(opt="lamb", weight_decay=0.1), ["w"]
    )
    precision = Precision("fp32", torch.device("cpu"))
    for grad, moves in ((1.0, True), (float("nan"), False), (1.0, False)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), grad)
        precision.step(optimizer, [weight])
        assert torch.equal(weight, before) != moves
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())


def test_lamb_skips_what_has_no_gradient_and_its_state_comes_back():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Lamb([{"params": [a, b], "weight_decay": 0.1}], 0.1)
    a.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(b, torch.ones(2)) and not torch.equal(a, b) and not optimizer.state[b]
    copy = Lamb([{"params": [a, b], "weight_decay": 0.1}], 0.1)
    copy.load_state_dict(optimizer.state_dict())
    assert (
        torch.equal(copy.state[a]["exp_avg"], optimizer.state[a]["exp_avg"])
        and copy.state[a]["step"] == 1
    )


def test_lamb_decays_everything_but_batch_norms():
    decayed, free = names_by_decay(tiny("ALIGN_B3_MINI"))
    assert {"temperature", "text_projection.bias", "text_model.embeddings.LayerNorm.weight"} <= {
        *decayed
    }
    assert all("bn." in name or "norm." in name for name in free)
    assert all(name.startswith("vision_model.") for name in free) and len(free) == 2 * sum(
        isinstance(m, GhostBatchNorm) for m in tiny().modules()
    )


@pytest.mark.parametrize("ours_first", [True, False])
def test_transformers_layout_both_ways(ours_first):
    from transformers import AlignConfig, AlignModel

    ours = tiny().eval()
    values = {
        k: v
        for k, v in hugging_face_config(ours).items()
        if k not in ("architectures", "model_type")
    }
    theirs = AlignModel(AlignConfig(**values)).eval()
    with torch.no_grad():
        for norm in (m for m in [*ours.modules(), *theirs.modules()] if hasattr(m, "running_var")):
            norm.running_var.uniform_(0.5, 2)
            norm.running_mean.normal_()
    if ours_first:
        theirs.load_state_dict(to_hugging_face(ours.state_dict()))
    else:
        assert is_align(theirs.state_dict())
        load_checkpoint(ours, theirs.state_dict(), (), NOT_LOADED)
    for block, twin in zip(
        ours.vision_model.encoder["blocks"], theirs.vision_model.encoder.blocks, strict=True
    ):
        assert block.skip == twin.projection.apply_dropout or block.drop == 0
        block.skip = twin.projection.apply_dropout  # the toy's first stage has a skip by its width
    image, ids = torch.randn(2, 3, 64, 64), torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]])
    with torch.no_grad():
        pooled = theirs.get_image_features(image)
        texts = theirs.get_text_features(ids, attention_mask=ids != 0)
        pooled, texts = (getattr(x, "pooler_output", x) for x in (pooled, texts))
        torch.testing.assert_close(ours.embed_image(image)["z"], pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.embed_text(ids)["z"], texts, rtol=1e-5, atol=1e-5)


def test_configuration_from_weights():
    with torch.device("meta"):
        model = build_dual(DualConfig(model="ALIGN_B2_TINY", embed_dim=24, vocab_size=77))
    state = model.state_dict() | {"temperature": torch.tensor(0.25)}
    found = align_config(state, 96)
    assert (found.model, found.embed_dim, found.vocab_size, found.image_size) == (
        "ALIGN_B2_TINY",
        24,
        77,
        96,
    )
    assert found.temperature == 0.25
    with pytest.raises(UserError, match="known are NANO, B0"):
        align_config(tiny().state_dict())
    with pytest.raises(UserError, match="only B7 fits"):
        to_hugging_face(state)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": "ALIGN_B3_MINT"}, "did you mean ALIGN_B3_MINI"),
        ({"model": "ALIGN_B8_BASE"}, r"ALIGN_<NANO\|B0\|.*\|B7>_<TINY\|MINI\|BASE\|LARGE>"),
        ({"model": "ALIGN_B7_MINI", "embed_dim": 512}, "set embed_dim to 640"),
        ({"label_smoothing": 1.0}, "from 0 to below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
    ],
)
def test_mistakes_in_the_configuration(values, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_dual(DualConfig(**{"model": "ALIGN_B0_TINY", **values}))


def test_mistakes_in_the_batch():
    tower = EfficientNet(SHAPES["NANO"])
    with pytest.raises(
        UserError, match=r"a batch of 24 .* virtual batches of 16: make batch_size a multiple of 16"
    ):
        tower(torch.zeros(24, 3, 32, 32))
    with pytest.raises(UserError, match=r"image_size 31.*give 32 or more"):
        tower(torch.zeros(16, 3, 31, 40))
    assert tower.eval()(torch.zeros(3, 3, 33, 40)).shape == (3, 96)
    with pytest.raises(UserError, match="no variable of COYO-ALIGN"):
        from_tensorflow_names({"image_encoder/top_conv/kernel:0": torch.zeros(1)})


def test_views():
    image = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8)
    assert AlignView(289).large == 346
    view = AlignViews(32, train=True, flip=0.0)(image)
    assert view[1] is None and view[0].shape == (3, 32, 32) and view[0].dtype == torch.uint8
    squashed = F.interpolate(image[None].float(), (38, 38), mode="bilinear")[0]
    torch.testing.assert_close(AlignView(32, exact=True)(image), squashed[:, 3:35, 3:35])
    flipped = {
        torch.equal(AlignViews(38 * 289 // 346, True, 1.0)(image)[0], view[0]) for _ in range(3)
    }
    assert flipped == {False}


def test_tokenizer(tmp_path):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "b",
        "##b",
        "strasse",
        "[",
        "]",
        "sep",
        "tm",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = AlignTokenizer(tmp_path, 6)
    assert tokenizer.row("A ab") == [2, 5, 5, 7, 3]
    assert tokenizer.row("a a a a a a a") == [2, 5, 5, 5, 5, 3]
    assert tokenizer.row("Straße ™") == [2, 8, 12, 3] and tokenizer.row("[SEP]") == [
        2,
        9,
        11,
        10,
        3,
    ]
    assert tokenizer(["a", ""]).tolist() == [[2, 5, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0]]
    assert tokenizer(["a"], (4,)).shape == (1, 4) and tokenizer.vocab_size == len(words)
    rebuild, arguments = tokenizer.__reduce__()
    assert rebuild(*arguments).row("[SEP] ß") == tokenizer.row("[SEP] ß")
    (tmp_path / "vocab.txt").write_text("\n".join([*words[1:], "[PAD]"]) + "\n")
    with pytest.raises(UserError, match=r"\[PAD\] must be its first entry"):
        AlignTokenizer(tmp_path)


def test_configuration_file_is_transformers_own():
    """What config.json leaves out is at AlignConfig's default, which is align-base."""
    from transformers import AlignConfig

    with torch.device("meta"):
        model = build_dual(
            DualConfig(model="ALIGN_B7_BASE", image_size=289, embed_dim=640, vocab_size=30522)
        )
    values = json.loads(json.dumps(hugging_face_config(model)))
    base, made = (
        AlignConfig(),
        AlignConfig(
            **{k: v for k, v in values.items() if k not in ("architectures", "model_type")}
        ),
    )
    for part in ("text_config", "vision_config"):
        own, default = getattr(made, part).to_dict(), getattr(base, part).to_dict()
        different = {k for k in default if k != "image_size" and own.get(k) != default[k]}
        assert not different - {"hidden_dim", "drop_connect_rate"}, different
