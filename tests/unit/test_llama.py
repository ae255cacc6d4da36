"""The LLaMA decoder: equal to transformers', every layout it loads, masks, cache, and what is
refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.errors import UserError
from models.layers.llama import Llama, LlamaConfig, PrefixMask, RMSNorm, own_part
from models.weights.llama import (
    from_hugging_face,
    hugging_face_config,
    interleave,
    merge_shards,
    read_llama,
)
from tests.helpers.tiny_nxtp import meta_folder


def causal(length: int) -> PrefixMask:
    return PrefixMask(
        torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    )


def logits(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    return model.output(model(model.tok_embeddings(ids), causal(ids.shape[1]))[0])


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A random LlamaForCausalLM with shared key-value heads, and its folder."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_logits_are_those_of_transformers(hugging_face):
    theirs, folder = hugging_face
    config, state = read_llama(folder)
    ours = Llama(config).eval()
    ours.load_state_dict(state)
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    assert (logits(ours, ids) - theirs(ids).logits).abs().max() < 1e-5


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}


def decoder_of(kind: str):
    """A random decoder of transformers: LLaMA 3.1's positions with tied heads, SmolLM2, Qwen2, Qwen3."""
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    if kind == "llama3":
        new = "rope_parameters" in transformers.LlamaConfig().to_dict()
        rope = {"rope_parameters": LLAMA_3} if new else {"rope_scaling": LLAMA_3}
        rope |= {} if new else {"rope_theta": LLAMA_3["rope_theta"]}
        config = transformers.LlamaConfig(**sizes, **rope, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    if kind == "smollm2":
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    config = transformers.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama3", "smollm2", "qwen2", "qwen3"])
def test_decoders_of_the_layout(kind, tmp_path):
    """Logits equal transformers', and what is written back loads there again."""
    from models.weights.llama import hugging_face_values, to_hugging_face

    if kind == "qwen3":
        pytest.importorskip("transformers", minversion="4.51")
    torch.manual_seed(0)
    theirs = decoder_of(kind).eval()
    for value in theirs.parameters():
        if value.ndim == 1:
            value.add_(0.3 * torch.randn_like(value))  # biases and norms that count
    theirs.save_pretrained(tmp_path)
    config, state = read_llama(tmp_path)
    ours = Llama(config).eval()
    ours.load_state_dict(state)
    ids = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert (logits(ours, ids) - expected).abs().max() < 1e-5
    assert bool(config.rope_scaling) == (kind == "llama3")
    back = type(theirs)(type(theirs.config)(**hugging_face_values(config))).eval()
    back.load_state_dict(to_hugging_face(state, config))
    assert (back(ids).logits - expected).abs().max() < 1e-5


def test_the_head_is_tied_where_the_configuration_says_so(hugging_face, tmp_path):
    """As transformers reads a file with both; without a head it is one shard short."""
    theirs, folder = hugging_face
    folder = shutil.copytree(folder, tmp_path / "llama")
    about = json.loads((folder / "config.json").read_text())
    head = theirs.lm_head.weight
    for tied, table in ((True, theirs.model.embed_tokens.weight), (False, head)):
        (folder / "config.json").write_text(json.dumps(about | {"tie_word_embeddings": tied}))
        assert torch.equal(read_llama(folder)[1]["output.weight"], table)
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "lm_head" not in k}, folder / "model.safetensors")
    with pytest.raises(UserError, match="no lm_head"):
        read_llama(folder)


def test_params_of_llama_3_1(tmp_path):
    """Meta's own file names the scaling by a flag."""
    model = meta_folder(tmp_path)
    about = json.loads((tmp_path / "params.json").read_text())
    assert not model.config.rope_scaling
    for dim, factor in ((4096, 8), (2048, 32)):  # of 3.1 and of 3.2
        sizes = about | {"dim": dim, "use_scaled_rope": True}
        (tmp_path / "params.json").write_text(json.dumps(sizes))
        assert read_llama(tmp_path)[0].rope_scaling == (factor, 1, 4, 8192)


def test_geometry_of_a_checkpoint_is_read_off_its_weights(tmp_path):
    """Heads of another width, biases and norms of Qwen's."""
    from models.weights.nxtp import geometry
    from tests.helpers.tiny_nxtp import network

    shape = {
        "head_width": 16,
        "qkv_bias": True,
        "qk_norm": True,
        "rope_scaling": (8.0, 1.0, 4.0, 64.0),
    }
    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, ffn_dim=64, **shape
    )
    state = {f"language_decoder.{k}": v for k, v in Llama(config).state_dict().items()}
    vision = {k: v for k, v in network().state_dict().items() if k.startswith("vision")}
    found = geometry(vision | state, 4, rope_scaling=config.rope_scaling)[1]
    assert found == config


def test_rows_that_fill_a_table_up_are_cut_off():
    from models.weights.nxtp import decoder_state

    table = {"tok_embeddings.weight": torch.randn(128, 4), "output.weight": torch.randn(128, 4)}
    state = decoder_state(table, 102, "qwen", known=100)
    rows = state["language_decoder.tok_embeddings.weight"]
    assert rows.shape == (102, 4)
    assert torch.equal(rows[:100], table["tok_embeddings.weight"][:100])
    with pytest.raises(UserError, match="128 embeddings, but the tokenizer has 102"):
        decoder_state(table, 102, "qwen")


def test_rms_norm_is_its_formula():
    """x / sqrt(mean(x^2) + eps) * weight, its gradients included (Zhang and Sennrich, 2019)."""
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24, requires_grad=True)
    formula = x * (x.square().mean(-1, keepdim=True) + 1e-3) ** -0.5 * norm.weight
    upstream = torch.randn(3, 5, 24)
    torch.testing.assert_close(norm(x), formula)
    expected = torch.autograd.grad(formula, (x, norm.weight), upstream)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    torch.testing.assert_close(found, expected)


def test_rms_norm_keeps_the_dtype_and_computes_in_float32():
    torch.manual_seed(0)
    norm = RMSNorm(4096, eps=1e-5)
    x = torch.randn(2, 4096) * 300
    half = norm.half()(x.half())
    assert half.dtype == torch.float16 and half.isfinite().all()  # squares exceed float16
    norm.float()
    torch.testing.assert_close(half.float(), norm(x), rtol=2e-3, atol=2e-3)
    exact = norm(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):  # as of a norm behind a linear layer
        assert torch.equal(norm(x.bfloat16()), exact) and exact.dtype == torch.float32


@torch.no_grad()
def test_a_decoder_that_is_cut_keeps_first_blocks_norm_and_head(hugging_face):
    theirs, folder = hugging_face
    config, state = read_llama(folder, layers=2)
    assert config.n_layers == 2 and not any(name.startswith("layers.2.") for name in state)
    ours = Llama(config)
    ours.load_state_dict(state)
    del theirs.model.layers[2:]
    ids = torch.arange(12)[None]
    assert (logits(ours, ids) - theirs(ids, use_cache=False).logits).abs().max() < 1e-5


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_of_meta_are_merged(shards, tmp_path):
    model = meta_folder(tmp_path, shards)
    config, state = read_llama(tmp_path)
    assert config.hidden == model.config.hidden and config.vocab_size == 40
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_shards_that_split_the_vocabulary_are_merged_along_it():
    """LLaMA 3's do."""
    table = torch.randn(40, 32)
    parts = [
        {"tok_embeddings.weight": part, "norm.weight": torch.ones(32)} for part in table.chunk(2)
    ]
    assert torch.equal(merge_shards(parts, 32)["tok_embeddings.weight"], table)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts", "model.layers.0.mlp.gate.weight"])
def test_a_weight_of_another_decoder_is_named(name):
    config = LlamaConfig(dim=8, n_layers=1, n_heads=2, vocab_size=4)
    with pytest.raises(UserError, match=f"{name}: no weight of a LLaMA"):
        from_hugging_face({name: torch.zeros(8, 8)}, config)


def test_rotary_rows_of_both_layouts():
    """transformers turns (i, i + d/2), Meta (2i, 2i + 1)."""
    rows = torch.arange(8.0)[:, None]  # one head of 8: halves 0..3 and 4..7
    assert interleave(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@torch.no_grad()
def test_cache_and_kept_positions_change_nothing():
    torch.manual_seed(0)
    config = LlamaConfig(dim=32, n_layers=2, n_heads=4, vocab_size=20, multiple_of=16)
    model = Llama(config).eval()
    x = torch.randn(2, 10, 32)
    mask = torch.ones(4, 10, dtype=torch.bool).tril(6)[None, None]
    whole, _ = model(x, PrefixMask(torch.arange(10), mask, prefix=6))
    last, cache = model(x[:, :8], PrefixMask(torch.arange(8), mask[:, :, :2, :8], prefix=6), keep=1)
    assert (last - whole[:, 7:8]).abs().max() < 1e-5
    for place in (8, 9):
        step = PrefixMask(torch.tensor([place]), mask[:, :, place - 6 : place - 5, : place + 1])
        state, cache = model(x[:, place : place + 1], step, cache)
        assert (state[:, 0] - whole[:, place]).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="eval mode alone"):
        model.train()(x[:, :1], PrefixMask(torch.arange(1), mask[:, :, :1, :1]), cache)


@torch.no_grad()
def test_image_positions_see_one_another_only_where_asked():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=20, multiple_of=16))
    x = torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, 3] += 1  # the last image position
    mask = torch.ones(2, 6, dtype=torch.bool).tril(4)[None, None]
    for whole, moved in ((True, True), (False, False)):
        prefix_mask = PrefixMask(torch.arange(6), mask, prefix=4, bidirectional=whole)
        first = [model(one, prefix_mask)[0][:, 0] for one in (x, changed)]
        assert torch.equal(*first) is not moved
        assert prefix_mask.dense()[0, 0, 0].tolist() == [True, *[whole] * 3, False, False]


def test_own_part_and_merge_are_inverse():
    state = Llama(
        LlamaConfig(dim=32, n_layers=1, n_heads=4, vocab_size=20, multiple_of=16)
    ).state_dict()
    parts = [own_part(state, rank, 2) for rank in range(2)]
    assert parts[0]["layers.0.attention.wq.weight"].shape == (16, 32)
    assert parts[0]["layers.0.attention.wo.weight"].shape == (32, 16)
    merged = merge_shards(parts, 32)
    assert all(torch.equal(merged[name], value) for name, value in state.items())


class TestRefused:
    def test_deeper_than_it_is(self, tmp_path):
        meta_folder(tmp_path)
        with pytest.raises(UserError, match="has 3 blocks, it cannot be cut to 6"):
            read_llama(tmp_path, 6)

    def test_no_llama(self, tmp_path):
        with pytest.raises(UserError, match=r"neither params.json"):
            read_llama(tmp_path)

    def test_a_damaged_shard(self, tmp_path):
        meta_folder(tmp_path)
        (tmp_path / "consolidated.00.pth").write_bytes(b"not weights")
        with pytest.raises(UserError, match=r"consolidated.00.pth: not a readable file"):
            read_llama(tmp_path)

    def test_shards_of_different_models(self, tmp_path):
        meta_folder(tmp_path, 2)
        torch.save({"norm.weight": torch.ones(32)}, tmp_path / "consolidated.01.pth")
        with pytest.raises(UserError, match="do not belong together"):
            read_llama(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"model_type": "mistral"},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"hidden_act": "gelu"},
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ],
    )
    def test_another_kind_of_decoder(self, change, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "llama", "hidden_size": 32} | change)
        )
        with pytest.raises(UserError, match="not a plain LLaMA"):
            read_llama(tmp_path)

    def test_positions_by_kind_of_layer(self):
        rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
        with pytest.raises(UserError, match="not an object of numbers"):
            hugging_face_config({"rope_parameters": rope})

    def test_heads_that_do_not_fit(self):
        with pytest.raises(UserError, match="heads must be whole"):
            LlamaConfig(dim=30, n_heads=4)
        with pytest.raises(UserError, match="key-value heads"):
            LlamaConfig(dim=32, n_heads=4, n_kv_heads=3)
