"""NXTP's label decoding against the original's."""

import functools

import pytest
import torch

from models.recognition.decoding import (
    Choice,
    beam_search,
    one_shot,
    rank_labels,
    split_labels,
    top_k,
    top_p,
    write_labels,
)
from tests.golden import nxtp_cases as cases
from tests.golden.report import compare


@functools.cache
def setting():
    """Network, tokenizer, image tokens and prompt of the recorded runs."""
    model, tokenizer = cases.network(), cases.tokenizer()
    with torch.no_grad():
        images = model.encode_image(cases.tensors("encoder")["images"])
    return (
        model,
        tokenizer,
        images,
        torch.tensor(cases.sequences(56).start("The objects in the image are")),
    )


def same_shares(name: str, ours: list[float], theirs: list[float]) -> None:
    compare("nxtp decoding", name, torch.tensor(ours), torch.tensor(theirs), 1e-5)


@pytest.mark.parametrize("count", [1, 4, 8, 11])
@pytest.mark.parametrize("together", [True, False], ids=["batch", "one by one"])
def test_one_shot(count, together):
    model, tokenizer, images, prompt = setting()
    case = cases.meta("decoding")["one_shot"][f"k{count}"]
    parts = [images] if together else list(images.split(1))
    drafts = [one_shot(model, part, prompt, tokenizer.delimiter, count) for part in parts]
    found = [one.rows(i) for one in drafts for i in range(len(one.tokens))]
    for rows, raw, labels, scores in zip(
        found, case["raw"], case["labels"], case["scores"], strict=True
    ):
        assert [token for row in rows for token in row[0]] == raw["tokens"]
        same_shares(
            "one-shot, token probabilities",
            [share for row in rows for share in row[1]],
            raw["probs"],
        )
        ranked = rank_labels(rows, tokenizer.decode)
        assert [text for text, _ in ranked] == labels
        assert [score for _, score in ranked] == pytest.approx(scores, abs=2e-5)


def test_one_shot_stopped_at_its_limit():
    """Rows as the original's; its labels lose track of the probabilities there and are not
    compared."""
    model, tokenizer, images, prompt = setting()
    case = cases.meta("decoding")["one_shot_update_limit"]
    drafts = one_shot(
        model, images[:2], prompt, tokenizer.delimiter, case["k"], limit=case["max_update_iter"] - 1
    )
    rows = drafts.rows(0) + drafts.rows(1)
    wanted = zip(case["rows_generated_tokens"], case["rows_token_probabilities"], strict=True)
    for (tokens, shares), (all_tokens, all_shares) in zip(rows, wanted, strict=True):
        assert tokens == all_tokens[: len(tokens)]
        assert len(tokens) == len(all_tokens) or tokens[-1] == tokenizer.delimiter
        same_shares("one-shot at the limit", shares, all_shares[: len(shares)])
    assert (~drafts.closed).sum() == 4


def test_greedy():
    model, tokenizer, images, prompt = setting()
    for case in cases.meta("decoding")["greedy"]:
        lagging = case["decouple"]  # the original's mask, one label late
        choice, length = Choice(penalty=case["penalty"]), case["max_gen_len"]
        drafts = write_labels(
            model,
            images,
            prompt,
            tokenizer.delimiter,
            length,
            choice,
            decouple=False,
            lagging=lagging,
        )
        for i, raw in enumerate(case["raw"]):
            ((tokens, shares),) = drafts.rows(i)
            assert tokens == raw["tokens"]
            same_shares("greedy, token probabilities", shares, raw["probs"])
            ranked = rank_labels(
                split_labels(tokens, shares, tokenizer.delimiter), tokenizer.decode
            )
            assert [text for text, _ in ranked] == case["labels"][i]
            assert [score for _, score in ranked] == pytest.approx(case["scores"][i], abs=2e-5)


def test_beam_search():
    """The recorded search whose histories move with the beams. With a penalty it still keeps the
    lists of used tokens in place, which changes the text of one image."""
    model, tokenizer, images, prompt = setting()
    found = cases.meta("decoding")
    for case in found["beam"]:
        i, want = case["image"], case["with_history_reordered"]
        ((tokens, total),) = beam_search(
            model,
            images[i : i + 1],
            prompt,
            tokenizer.eos,
            case["max_gen_len"],
            penalty=case["penalty"],
        )
        if case["penalty"] and tokens != want["tokens"][0]:
            assert i == 1 and total > want["sum_logprobs"][0]
            continue
        assert tokens == want["tokens"][0]
        same_shares("beam, log-probability", [total], want["sum_logprobs"])
    plain = [
        case["with_history_reordered"]["tokens"][0] for case in found["beam"] if not case["penalty"]
    ]
    together = beam_search(model, images, prompt, tokenizer.eos, found["beam"][0]["max_gen_len"])
    assert [tokens for tokens, _ in together] == plain


def test_sampling_filters():
    case = cases.meta("sampling_filters")
    logits = torch.tensor(case["logits"])
    for one in case["cases"]:
        want = one["distribution_given_to_multinomial"]
        if one["kind"] == "top_p":
            ours = top_p(logits, one["value"]).sort(descending=True).values
        else:
            ours = top_k(logits, one["value"])
        if want is None:  # k = 1 is the likeliest token with its probability among all
            share, token = Choice("greedy")(logits[:, None])
            assert token[:, 0].tolist() == one["argmax_token"]
            same_shares("greedy choice", share[:, 0].tolist(), one["argmax_probability"])
        else:
            compare(
                "nxtp decoding", f"{one['kind']} {one['value']}", ours, torch.tensor(want), 1e-5
            )


def test_grouping_and_ranking():
    tokenizer, case = cases.tokenizer(), cases.meta("decoding")["post_process"]
    for i, (tokens, shares) in enumerate(zip(case["tokens"], case["probabilities"], strict=True)):
        rows = split_labels(tokens, shares, tokenizer.delimiter)
        for result in case["results"]:
            labels, scores = result["labels"][i], result["scores"][i]
            if result["ranking_method"] in ("prob", "none"):
                ranked = rank_labels(rows, tokenizer.decode, result["ranking_method"])
            elif (
                result["ranking_method"] == "ppl"
            ):  # the original lists the least likely label first
                ranked = rank_labels(rows, tokenizer.decode, "mean")[::-1]
            else:
                continue
            assert [text for text, _ in ranked] == labels
            assert [score for _, score in ranked] == pytest.approx(scores, abs=1e-5)
