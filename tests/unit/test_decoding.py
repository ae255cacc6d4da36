"""Decoding over branches: the same as without a cache, independent of what stands beside, and its
options."""

import math

import pytest
import torch

from base.errors import UserError
from models.recognition.decoding import (
    Choice,
    Decoding,
    Drafts,
    beam_search,
    label_map,
    one_shot,
    rank_labels,
    split_labels,
    top_k,
    top_p,
    write_labels,
)
from tests.helpers.tiny_nxtp import network

COMMA, EOS = 9, 2
PROMPT = torch.tensor([30, 1, 5, 6])


@pytest.fixture(scope="module")
def setting():
    """A network whose labels end after some tokens, and image tokens of three images."""
    model = network(vocabulary=14)
    with torch.no_grad():
        model.language_decoder.output.weight.mul_(4)
        model.language_decoder.output.weight[COMMA].add_(0.2)
    images = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    return model, images, PROMPT.clamp(max=13)


def recomputed(model, images, ids: list[int]) -> torch.Tensor:
    """Logits behind a text without any cache, everything before it seen."""
    text = torch.tensor([ids])
    return model.logits(model.states(images, text, torch.zeros_like(text)))[0, -1]


@torch.no_grad()
def test_one_shot_is_greedy_growth_of_each_first_token(setting):
    model, images, prompt = setting
    drafts = one_shot(model, images, prompt, COMMA, 5, limit=7)
    assert len(set(drafts.lengths.flatten().tolist())) > 1  # branches end at different lengths
    for i in range(3):
        first = recomputed(model, images[i : i + 1], prompt.tolist()).softmax(-1).topk(5)
        for (tokens, shares), token, share in zip(
            drafts.rows(i), first.indices, first.values, strict=True
        ):
            assert tokens[0] == token and shares[0] == pytest.approx(float(share), rel=1e-4)
            for place in range(1, len(tokens)):
                after = recomputed(
                    model, images[i : i + 1], [*prompt.tolist(), *tokens[:place]]
                ).softmax(-1)
                assert tokens[place] == int(after.argmax())
                assert shares[place] == pytest.approx(float(after.max()), rel=1e-4)
            assert len(tokens) == 7 or tokens[-1] == COMMA
            assert COMMA not in tokens[:-1]


@torch.no_grad()
def test_images_do_not_influence_one_another(setting):
    model, images, prompt = setting
    together = one_shot(model, images, prompt, COMMA, 4)
    for i in range(3):
        alone = one_shot(model, images[i : i + 1], prompt, COMMA, 4)
        for (tokens, shares), (mine, own) in zip(together.rows(i), alone.rows(0), strict=True):
            assert tokens == mine and shares == pytest.approx(own, rel=1e-5)


@torch.no_grad()
def test_the_image_is_encoded_once(setting):
    model, images, prompt = setting
    calls = []

    class Counting:
        def prefill(self, *inputs):
            calls.append("prefill")
            return model.prefill(*inputs)

        def step(self, tokens, *inputs):
            calls.append(tokens.shape)
            return model.step(tokens, *inputs)

    drafts = one_shot(Counting(), images, prompt, COMMA, 5, limit=7)
    assert calls.count("prefill") == 1
    computed = sum(shape[1] for shape in calls[1:])
    assert computed == sum(int((drafts.lengths > length).sum(1).max()) for length in range(1, 7))
    assert len(calls) - 1 == int(drafts.lengths.max()) - 1


@torch.no_grad()
def test_written_labels_forget_those_before(setting):
    """With the training mask, what follows a delimiter depends on its own label alone."""
    model, images, prompt = setting
    drafts = write_labels(model, images, prompt, COMMA, 12, Choice("greedy"))
    for i in range(3):
        tokens, start = drafts.tokens[i, 0].tolist(), 0
        for place in range(1, 12):
            own = tokens[start:place]
            ids = torch.tensor([[*prompt.tolist(), *tokens[:place]]])
            segments, label = [0] * len(prompt), 1
            for token in tokens[:place]:
                segments.append(label)
                label += token == COMMA
            state = model.states(images[i : i + 1], ids, torch.tensor([segments]))[0, -1]
            assert tokens[place] == int(model.logits(state).argmax()), own
            start = place if tokens[place - 1] == COMMA else start


@torch.no_grad()
def test_many_streams_and_their_randomness(setting):
    model, images, prompt = setting

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        choice = Choice("top_k", k=3)
        return write_labels(
            model, images, prompt, COMMA, 6, choice, count=4, generator=generator
        ).tokens

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (3, 4, 6) and len({tuple(row) for row in draw(0)[0].tolist()}) > 1


@torch.no_grad()
def test_the_mask_of_the_original_needs_one_stream(setting):
    model, images, prompt = setting
    with pytest.raises(UserError, match="one stream"):
        write_labels(model, images, prompt, COMMA, 4, Choice(), count=2, lagging=True)


@torch.no_grad()
def test_a_wide_beam_finds_the_likeliest_text(setting):
    model, images, prompt = setting
    length = 2
    (tokens, total), *_ = beam_search(model, images[:1], prompt, EOS, length, beams=13)
    first = recomputed(model, images[:1], prompt.tolist()).log_softmax(-1)
    texts = {(EOS,): float(first[EOS])}
    for a in range(14):
        if a == EOS:
            continue
        second = recomputed(model, images[:1], [*prompt.tolist(), a]).log_softmax(-1)
        texts |= {(a, b): float(first[a] + second[b]) for b in range(14)}
    best = max(
        texts, key=lambda text: texts[text] / (len(prompt) + len(text) + (text[-1] != EOS))
    )  # an unfinished text gets its EOS for free
    assert tokens[:-1] == [token for token in best if token != EOS]
    assert total == pytest.approx(texts[best], rel=1e-4)


def test_no_patience_finishes_one_text(setting):
    """The first that ends, not the first token."""
    model, images, prompt = setting
    late = 6  # a token that ends no text early here
    one = beam_search(model, images, prompt, late, 50, patience=1 / 3)
    assert beam_search(model, images, prompt, late, 50, patience=0) == one
    assert min(len(tokens) for tokens, _ in one) > 3


def test_filters():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert top_k(logits, 2)[0].nonzero().flatten().tolist() == [1, 2]
    assert torch.equal(top_k(logits, 0), logits.softmax(-1))
    assert top_p(logits, 0.5)[0].nonzero().flatten().tolist() == [1]
    assert top_p(logits, 0.7)[0].nonzero().flatten().tolist() == [
        1,
        2,
    ]  # the one that passes it is in
    assert float(top_p(logits, 0.99).sum()) == pytest.approx(1)


def test_labels_that_read_alike_are_added():
    rows = [([1, 9], [0.5, 0.8]), ([2, 9], [0.25, 1.0]), ([1, 1, 9], [0.1, 1.0, 1.0])]
    decode = {(1, 9): "dog,", (2, 9): "cat,", (1, 1, 9): "dog,"}
    ranked = rank_labels(rows, lambda tokens: decode[tuple(tokens)])
    assert ranked == [("dog", pytest.approx(0.5)), ("cat", 0.25)]
    by_mean = dict(rank_labels(rows, lambda tokens: decode[tuple(tokens)], "mean"))
    assert by_mean["dog"] == pytest.approx(min(math.sqrt(0.4), 0.1 ** (1 / 3)))
    assert [
        text for text, _ in rank_labels(rows[::-1], lambda tokens: decode[tuple(tokens)], "none")
    ] == ["dog", "cat"]


def test_an_unfinished_label_of_a_stream_is_left_out():
    assert split_labels([1, 9, 2, 3, 9, 4], [0.1] * 6, 9) == [
        ([1, 9], [0.1] * 2),
        ([2, 3, 9], [0.1] * 3),
    ]


@pytest.mark.parametrize("strategy", ["one_shot", "greedy", "top_k", "top_p", "beam"])
def test_every_strategy_gives_labels(strategy, setting):
    model, images, prompt = setting
    options = Decoding(strategy=strategy, num_labels=4, max_gen_len=50, max_label_len=5)
    torch.manual_seed(0)
    drafts = options.find(model, images, prompt, COMMA, EOS)
    again = Drafts(*drafts.padded(options.longest))
    assert again.tokens.shape[2] == options.longest
    for i in range(3):
        found = options.labels(
            again, i, COMMA, lambda tokens: "".join(chr(97 + t) for t in tokens if t != COMMA)
        )
        assert found == options.labels(
            drafts, i, COMMA, lambda tokens: "".join(chr(97 + t) for t in tokens if t != COMMA)
        )
        assert len(found) <= 4 and all(text for text, _ in found)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        assert found or strategy != "one_shot"


def test_more_labels_than_tokens(setting):
    model, images, prompt = setting
    with pytest.raises(UserError, match="20 labels asked for, but the vocabulary has 14"):
        one_shot(model, images, prompt, COMMA, 20)


@pytest.mark.parametrize(
    "change", [{"strategy": "shot"}, {"ranking": "ppl"}, {"num_labels": 0}, {"temperature": 0.0}]
)
def test_options_that_cannot_be(change):
    with pytest.raises(UserError, match=r"^decoding: |^(strategy 'shot'|ranking 'ppl') is unknown"):
        Decoding(**change)


def test_attention_of_a_label(setting):
    model, images, prompt = setting
    one = label_map(model, images[:1], prompt, [3, 4])
    assert one.shape == (4, 4) and one.min() == 0 and one.max() == 1
    assert not torch.equal(one, label_map(model, images[:1], prompt, [7]))
