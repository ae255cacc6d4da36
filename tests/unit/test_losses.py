"""The pre-training losses against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.fusion.losses import (
    IGNORE,
    distilled_binary_cross_entropy,
    distilled_cross_entropy,
    gumbel_noise,
    hard_negatives,
    keyword_targets,
    masked_mean,
    sequence_axis_soft_loss,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_distilled_cross_entropy_is_the_mixture_of_two():
    logits, teacher = torch.randn(6, 9) * 5, torch.randn(6, 9) * 5
    labels = torch.tensor([0, 8, 3, IGNORE, 1, 1])
    valid = labels != IGNORE
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = F.cross_entropy(logits, teacher.softmax(-1), reduction="none").masked_fill(~valid, 0)
    torch.testing.assert_close(distilled_cross_entropy(logits, labels), hard)
    torch.testing.assert_close(
        distilled_cross_entropy(logits, labels, teacher, 0.4), 0.6 * hard + 0.4 * soft
    )
    spread = torch.rand(6, 9).softmax(-1)
    expected = 0.6 * F.cross_entropy(logits, spread, reduction="none")
    expected = expected + 0.4 * F.cross_entropy(logits, teacher.softmax(-1), reduction="none")
    torch.testing.assert_close(distilled_cross_entropy(logits, spread, teacher, 0.4), expected)


def test_distilled_cross_entropy_gradient_and_precision():
    logits = torch.randn(6, 9, requires_grad=True)
    teacher, labels = torch.randn(6, 9, requires_grad=True), torch.randint(0, 9, (6,))
    (gradient,) = torch.autograd.grad(
        distilled_cross_entropy(logits, labels, teacher, 0.4).sum(), logits
    )
    expected = logits.softmax(-1) - 0.6 * F.one_hot(labels, 9) - 0.4 * teacher.softmax(-1)
    torch.testing.assert_close(gradient, expected)
    assert distilled_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
    extreme = torch.tensor([[2e4, -2e4], [-2e4, 2e4]])
    assert torch.isfinite(
        distilled_cross_entropy(extreme, torch.tensor([1, 1]), -extreme, 0.4)
    ).all()


def test_sequence_axis_loss_normalises_over_the_text():
    logits, teacher = torch.randn(2, 5, 7), torch.randn(3, 7)
    rows = torch.tensor([0, 6, 9])
    log_probabilities = logits.log_softmax(1)
    expected = [
        -(teacher[i].softmax(-1) * log_probabilities[r // 5, r % 5]).sum()
        for i, r in enumerate(rows)
    ]
    torch.testing.assert_close(
        sequence_axis_soft_loss(logits, rows, teacher), torch.stack(expected)
    )


def test_gumbel_noise_is_float32_under_mixed_precision():
    """Mean 0.5772, variance pi^2 / 6, and tails that 16 bits cut off."""
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(400, 500, dtype=torch.bfloat16))
    assert noise.dtype == torch.float32 and len(noise.unique()) > 150_000
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_masked_mean_of_nothing_is_zero():
    loss = torch.tensor([1.0, 2.0, torch.inf], requires_grad=True)
    assert masked_mean(loss, torch.tensor([True, True, False])) == 1.5
    nothing = masked_mean(loss, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and torch.equal(loss.grad, torch.zeros(3))


def test_distilled_binary_cross_entropy_is_the_mixture_of_two():
    logits, teacher, target = (
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.randint(0, 2, (3, 8)).float(),
    )
    hard = F.binary_cross_entropy_with_logits(logits, target)
    soft = F.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    torch.testing.assert_close(
        distilled_binary_cross_entropy(logits, target, teacher, 0.4), 0.6 * hard + 0.4 * soft
    )


def test_hard_negatives_have_the_masked_softmax_distribution():
    logits = torch.tensor([[9.0, 0.0, 1.0, -1.0]]).expand(20000, 4)
    forbidden = torch.tensor([True, False, False, False]).expand(20000, 4)
    drawn = hard_negatives(logits, forbidden).bincount(minlength=4) / 20000
    expected = torch.tensor([0.0, *torch.tensor([0.0, 1.0, -1.0]).softmax(0)])
    assert drawn[0] == 0 and (drawn - expected).abs().max() < 0.02


def test_hard_negatives_at_the_smallest_temperature():
    """softmax - diagonal underflows to zero rows here, which made multinomial fail in the
    originals."""
    logits = (torch.eye(16) * 2 - 1) / 0.001
    forbidden = torch.eye(16, dtype=torch.bool)
    assert (logits.softmax(-1).masked_fill(forbidden, 0).sum(1) == 0).all()
    assert (hard_negatives(logits, forbidden) != torch.arange(16)).all()


class TestKeywords:
    ids = torch.tensor([[2, 10, 11, 12, 13, 14, 15, 16]])

    def attention(self, *heads):
        """One row of [CLS] attention per head, strongest positions first in the list."""
        rows = torch.zeros(1, len(heads), 8)
        for h, order in enumerate(heads):
            for place, position in enumerate(order):
                rows[0, h, position] = 1.0 - 0.1 * place
        return rows

    def keywords(self, attention, allowed, **options):
        targets, votes = keyword_targets(attention, self.ids, allowed, 20, **options)
        return sorted(torch.nonzero(targets[0]).squeeze(1).tolist()), votes[0].tolist()

    def test_most_voted_positions(self):
        attention = self.attention([0, 1, 2], [0, 2, 3], [0, 2, 4])
        found, votes = self.keywords(attention, None, per_head=3, keywords=2)
        assert votes == [3, 1, 3, 1, 1, 0, 0, 0] and found == [2, 11]
        allowed = self.ids != 2
        found, votes = self.keywords(attention, allowed, per_head=2, keywords=1)
        assert votes[0] == 0 and votes[2] == 3 and found == [11]

    def test_ties_go_to_the_earlier_position(self):
        found, _ = self.keywords(
            self.attention([4, 1], [3, 6]), self.ids != 2, per_head=2, keywords=3
        )
        assert found == [10, 12, 13]

    def test_no_vote_no_keyword(self):
        allowed = torch.tensor([[False, True, True, False, False, False, False, False]])
        found, votes = self.keywords(self.attention([5, 2]), allowed, per_head=4, keywords=5)
        assert found == [10, 11] and sum(votes) == 2
        nothing, _ = self.keywords(
            self.attention([5, 2]), torch.zeros_like(allowed), per_head=4, keywords=5
        )
        assert nothing == []

    def test_text_shorter_than_the_number_of_keywords(self):
        targets, _ = keyword_targets(
            torch.rand(1, 2, 3).softmax(-1), self.ids[:, :3], self.ids[:, :3] != 2, 20
        )
        assert sorted(torch.nonzero(targets[0]).squeeze(1).tolist()) == [10, 11]

    def test_a_word_said_twice_is_one_keyword(self):
        ids = torch.tensor([[2, 7, 7, 8]])
        targets, _ = keyword_targets(
            torch.tensor([[[0.1, 0.5, 0.3, 0.1]]]), ids, ids != 2, 20, per_head=2
        )
        assert torch.nonzero(targets[0]).squeeze(1).tolist() == [7]
