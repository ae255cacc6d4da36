"""Retrieval evaluation against its definition: every pair scored alone, ranks by brute force."""

import itertools
import warnings

import pytest
import torch

from base.distributed import World
from base.errors import UserError
from evaluation.retrieval import (
    Captions,
    Ranking,
    chance,
    in_order,
    nearest,
    note_recalls_beyond,
    rank,
    recalls,
    tiles,
    units,
)

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
IMAGES, WIDTH = 7, 5


class ToyModel:
    """Scores a pair by a fixed function of its tokens; a padded position that leaked in would
    change it."""

    def __init__(self, seed=0, keep_states=False):
        g = torch.Generator().manual_seed(seed)
        self.words = torch.randn(50, WIDTH, generator=g)
        self.pairs_seen = []

    def encode_image(self, image):
        tokens = image.flatten(2).transpose(1, 2)
        return tokens, torch.nn.functional.normalize(tokens.mean(1), dim=-1)

    def encode_text(self, ids, mask):
        states = self.words[ids]
        feature = (states * mask[..., None]).sum(1)
        return states, torch.nn.functional.normalize(feature, dim=-1)

    def match_scores(self, text, mask, tokens, rows):
        states = text if text.is_floating_point() else self.words[text]
        image = torch.arange(len(text)) % len(tokens) if rows is None else rows
        self.pairs_seen.append(len(text))
        affinity = torch.tanh(states @ tokens[image].transpose(1, 2)).sum(2)
        return (affinity * mask).sum(1)


def toy_data(images=IMAGES, most_captions=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most_captions + 1, (images,), generator=g)
    owner = torch.arange(images).repeat_interleave(counts)
    lengths = torch.randint(1, 9, (len(owner),), generator=g)
    mask = torch.arange(8)[None] < lengths[:, None]
    ids = torch.randint(1, 50, mask.shape, generator=g) * mask
    return torch.randn(images, WIDTH, 2, 2, generator=g), Captions(ids, mask, owner)


def loader(images, batch):
    return lambda indices: (images[indices[i : i + batch]] for i in range(0, len(indices), batch))


def by_definition(model, images, captions, k):
    """Both score matrices, pair by pair."""
    tokens, image = model.encode_image(images)
    _, text = model.encode_text(captions.ids, captions.mask)
    similarity = image @ text.T
    matrices = []
    for scores, of_image in ((similarity, True), (similarity.T, False)):
        matrix = torch.full(scores.shape, -100.0)
        for q, c in itertools.product(*map(range, scores.shape)):
            if c in scores[q].topk(min(k, scores.shape[1])).indices:
                i, t = (q, c) if of_image else (c, q)
                row = slice(t, t + 1)
                matrix[q, c] = model.match_scores(
                    captions.ids[row], captions.mask[row], tokens[i : i + 1], None
                )
        matrices.append(matrix)
    return matrices


def ranks_by_sorting(scores, relevant):
    """Recall@k as the originals compute it: argsort of each row, reversed, place of the best
    relevant column."""
    places = []
    for row, right in zip(scores, relevant, strict=True):
        order = row.argsort(stable=True).flip(0).tolist()
        places.append(min(order.index(r) for r in right))
    return torch.tensor(places)


def test_the_similarity_counts_by_its_weight_in_both_directions():
    images, captions = toy_data()

    def found(**options):
        given = (loader(images, IMAGES), IMAGES, captions, ALONE)
        rankings = rank(ToyModel(), *given, k=IMAGES, image_batch=IMAGES, **options)
        return [ranking.dense() for ranking in rankings]

    similar, matched = found(rerank=False), found()
    for ours, itc, itm in zip(found(similarity_weight=2.0), similar, matched, strict=True):
        both = itm > -100  # the candidates
        torch.testing.assert_close(ours[both], (itm + 2 * itc)[both])


@pytest.mark.filterwarnings("ignore:k 100")
@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize(("image_batch", "pairs"), [(2, 4), (3, 512), (7, 1)])
def test_scores_equal_those_of_each_pair_alone(k, keep_states, image_batch, pairs):
    images, captions = toy_data()
    model = ToyModel()
    expected = by_definition(model, images, captions, k)
    rankings = rank(
        model,
        loader(images, image_batch),
        IMAGES,
        captions,
        ALONE,
        k=k,
        keep_text_states=keep_states,
        image_batch=image_batch,
        pairs=pairs,
    )
    for ranking, matrix in zip(rankings, expected, strict=True):
        torch.testing.assert_close(ranking.dense(), matrix)
        assert (ranking.scores.diff(dim=1) <= 0).all()


def test_recalls_equal_sorting_of_the_matrix():
    images, captions = toy_data(images=30)
    for k in (1, 2, 4, 6, 30):
        model = ToyModel()
        by_image, by_text = rank(
            model,
            loader(images, 8),
            30,
            captions,
            ALONE,
            k=k,
            image_batch=8,
            pairs=16,
        )
        right_texts = [(captions.image == i).nonzero().flatten().tolist() for i in range(30)]
        txt = ranks_by_sorting(by_image.dense(), right_texts)
        img = ranks_by_sorting(by_text.dense(), captions.image[:, None].tolist())
        found = recalls(by_image, by_text, captions.image)
        for at in (1, 5, 10):
            assert found[f"txt_r{at}"] == pytest.approx(100 * (txt < at).float().mean().item())
            assert found[f"img_r{at}"] == pytest.approx(100 * (img < at).float().mean().item())
        means = [sum(found[f"{d}_r{at}"] for at in (1, 5, 10)) / 3 for d in ("txt", "img")]
        assert found["txt_r_mean"] == pytest.approx(means[0]) and found[
            "img_r_mean"
        ] == pytest.approx(means[1])
        assert found["r_mean"] == pytest.approx(sum(means) / 2)


@pytest.mark.filterwarnings("ignore:k 1000")
def test_each_pair_is_computed_once():
    images, captions = toy_data()
    model = ToyModel()
    rank(
        model,
        loader(images, 2),
        IMAGES,
        captions,
        ALONE,
        k=1000,
        image_batch=2,
        pairs=1,
    )
    # every column has one text per image and pass here, so nothing is filled up
    assert sum(model.pairs_seen) == IMAGES * len(captions)


def test_similarity_only_asks_for_no_matching():
    images, captions = toy_data()
    model = ToyModel()
    by_image, by_text = rank(
        model,
        loader(images, 4),
        IMAGES,
        captions,
        ALONE,
        k=5,
        rerank=False,
        image_batch=4,
    )
    assert not model.pairs_seen
    image, text = model.encode_image(images)[1], model.encode_text(captions.ids, captions.mask)[1]
    torch.testing.assert_close(by_image.scores, (image @ text.T).topk(5).values)
    torch.testing.assert_close(by_text.scores, (text @ image.T).topk(5).values)
    with warnings.catch_warnings():  # nothing is re-ranked, so nothing is said of it
        warnings.simplefilter("error")
        given = (loader(images, 4), IMAGES, captions, ALONE)
        rank(model, *given, k=1000, rerank=False, image_batch=4)


def test_equal_scores_are_ordered_by_later_index():
    same = torch.ones(3, 2)
    found = nearest(same, torch.ones(6, 2), 4, ALONE)
    assert found.candidates.tolist() == [[5, 4, 3, 2]] * 3
    shuffled = Ranking(torch.tensor([[2, 0, 1, 3]]), torch.tensor([[1.0, 2.0, 1.0, 2.0]]), 4)
    assert in_order(shuffled).candidates.tolist() == [[3, 0, 2, 1]]


def test_image_without_captions_is_not_asked_for():
    by_image = Ranking(torch.tensor([[0], [1], [0]]), torch.zeros(3, 1), 2)
    by_text = Ranking(torch.tensor([[0], [1]]), torch.zeros(2, 1), 3)
    assert recalls(by_image, by_text, torch.tensor([0, 1]))["txt_r1"] == 100


def test_tiles_hold_each_pair_once_in_columns_of_one_image():
    g = torch.Generator().manual_seed(0)
    image, length = (
        torch.randint(0, 5, (400,), generator=g),
        torch.randint(1, 30, (400,), generator=g),
    )
    found = list(tiles(image, length, 128))
    for tile in found:
        assert tile.shape[0] <= 64 and tile.numel() <= 128
        for column in tile.T:
            real = column[column >= 0]
            assert len(real) and len(image[real].unique()) == 1
    together = torch.cat([tile[tile >= 0] for tile in found])
    assert together.sort().values.tolist() == list(range(400))


def test_units_cover_everything_once():
    for size in (1, 2, 3, 9):
        worlds = [World(r, size, 0, torch.device("cpu")) for r in range(size)]
        together = sorted(i for world in worlds for unit in units(23, 5, world) for i in unit)
        assert together == list(range(23))


def test_more_candidates_than_there_are_is_noted():
    images, captions = toy_data()
    with pytest.warns(UserWarning, match="k 99: there are 7 images"):
        rank(
            ToyModel(),
            loader(images, 4),
            IMAGES,
            captions,
            ALONE,
            k=99,
            image_batch=4,
        )


@pytest.mark.parametrize(("k", "said"), [(3, "R@5 and R@10"), (7, "R@10"), (10, None)])
def test_recalls_beyond_the_candidates_are_said_once(k, said, capsys):
    """Of 12 images and their captions the rest is ranked by its place in the list alone."""
    images, captions = toy_data(12, most_captions=1)
    note_recalls_beyond.cache_clear()
    for _ in range(2):
        rank(ToyModel(), loader(images, 12), 12, captions, ALONE, k=k, image_batch=12)
    expected = [f"note: k {k}: {said} count what follows the {k} candidates"] if said else []
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" in the")[0] for line in lines] == expected


def test_chance_is_what_random_order_scores():
    owner = torch.arange(6).repeat_interleave(3)
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        by_image = Ranking(
            torch.rand(6, 18, generator=g).argsort(1), torch.arange(18.0).flip(0).expand(6, -1), 18
        )
        by_text = Ranking(
            torch.rand(18, 6, generator=g).argsort(1), torch.arange(6.0).flip(0).expand(18, -1), 6
        )
        found.append(recalls(by_image, by_text, owner))
    for name, value in chance(owner, 6).items():
        assert sum(f[name] for f in found) / len(found) == pytest.approx(value, abs=2)
    some = torch.tensor([0, 0, 2])  # two of four images have captions: 2 and 1 of 3
    assert chance(some, 4)["txt_r1"] == pytest.approx(50)


def test_nan_is_refused():
    images, captions = toy_data()
    images[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        rank(
            ToyModel(),
            loader(images, 4),
            IMAGES,
            captions,
            ALONE,
            k=2,
            image_batch=4,
        )
