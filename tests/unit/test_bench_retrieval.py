"""The retrieval benchmark's arithmetic and its words; no model of full size is made here."""

import pytest
import torch

from base.errors import UserError
from benchmarks import inputs as synthetic
from benchmarks import retrieval as bench_retrieval
from benchmarks.table import table

FILL = -100.0


def run(encoding: float, matching: float, cpu: float) -> dict:
    middle = 5 + encoding
    return {
        "marks": [
            [5.0, 1.0],
            [middle, 1 + 2 * encoding],
            [middle + matching, cpu + 1 + 2 * encoding],
        ]
    }


def test_rates_and_the_time_that_coco_would_take():
    config = bench_retrieval.Config(images=10, k_test=4)
    assert config.pairs == 10 * 4 + 50 * 4
    found = bench_retrieval.rates(run(3.6, 12.0, 24.0), config)
    assert found == pytest.approx(
        {"pairs": 20, "cpu_pairs": 10, "encoding": 3.6, "coco": found["coco"]}
    )
    # 5,000 images and their captions at 0.36 s, 7.68 million pairs at 20 a second
    assert found["coco"] == pytest.approx((5000 * 0.36 + 7.68e6 / 20) / 3600)
    slower = bench_retrieval.rates(run(7.2, 24.0, 60.0), config)
    lines = table({"ours": [found], "original": [slower]}, bench_retrieval.COLUMNS).splitlines()
    assert "7.7 million pairs" in lines[0]
    assert lines[2].startswith("| ours | 20.00 | 10.00 | 3.6 | 107 h |")
    assert lines[3].endswith("| 2.00 x | 2.50 x | 2.00 x |")


def test_agreement_of_equal_and_of_reversed_orders():
    theirs = torch.tensor([[3.0, 1.0, FILL, 2.0], [FILL, 1.0, 5.0, 4.0]])
    ours = theirs + 1e-4 * (theirs > FILL)
    difference = 1e-4 / float(theirs[theirs > FILL].std())
    assert bench_retrieval.agreement([(ours, theirs), (theirs, theirs)]) == (
        "With equal weights 100.0% of the candidates are the same, scores differ by at most "
        f"{difference:.1e} of their standard deviation, 100.0% of the queries have the same order."
    )
    ours = theirs.clone()
    ours[0, 0], ours[0, 1] = 1.0, 3.0  # 3 1 2 -> 1 3 2: opposite order
    ours[1, 1] = FILL
    said = bench_retrieval.agreement([(ours, theirs)])
    assert "83.3% of the candidates" in said and "50.0% of the queries" in said
    assert f"at most {2 / 1.5811:.1e} of" in said


def test_the_split_is_what_both_sides_take():
    images, ids, mask = synthetic.synthetic_split(2, 10)
    assert images.shape == (2, 3, 384, 384) and ids.shape == mask.shape == (10, 30)
    assert (ids[:, 0] == synthetic.CLS).all() and (ids[~mask] == 0).all() and (ids[mask] > 0).all()
    assert int(mask.sum(1).min()) >= 9 and int(mask.sum(1).max()) <= 16
    again = synthetic.synthetic_split(2, 10)
    assert all(torch.equal(a, b) for a, b in zip((images, ids, mask), again, strict=True))


def test_what_cannot_be_measured_is_said_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="more --images"):
        bench_retrieval.main(bench_retrieval.Config(images=4, k_test=5))
    with pytest.raises(UserError, match=r"models/model_retrieval.py"):
        bench_retrieval.main(bench_retrieval.Config(system="albef", peer=str(tmp_path)))
