"""SMKD's losses against slow formulas that follow the paper, and the traps of the released code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.errors import ConfigError
from reprise.papers.smkd import criterion
from reprise.papers.smkd.criterion import Pairs, PatchTokens
from reprise.papers.smkd.distillation import Distillation, Objective, Temperatures, Views
from reprise.papers.smkd.model import Projected

LABEL = torch.tensor([0, 1, 0, 2, 0, 1])
B, N, K, D = 6, 5, 7, 4


def probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(-1)


def log_probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape).log_softmax(-1)


def cross(p: Tensor, log_q: Tensor) -> float:
    return -float((p * log_q).sum())


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("locals_", [0, 2])
def test_class_distillation_is_the_mean_over_pairs(include: bool, locals_: int) -> None:
    teacher, student = probabilities(2, B, K), [log_probabilities(B, K) for _ in range(2 + locals_)]
    terms = []
    for q in range(2):
        for v in range(len(student)):
            for y in range(B):
                for x in range(B):
                    if v >= 2:
                        counts = x == y
                    elif x == y:
                        counts = include and v != q
                    else:
                        counts = bool(LABEL[x] == LABEL[y])
                    if counts:
                        terms.append(cross(teacher[q, y], student[v][x]))
    found = criterion.class_distillation(teacher, student, Pairs.of(LABEL), include_same_image=include)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_a_batch_without_pairs_gives_zero_not_nan() -> None:
    teacher, student = probabilities(2, 3, K), [log_probabilities(3, K)] * 2
    alone = Pairs.of(torch.arange(3))
    assert float(criterion.class_distillation(teacher, student, alone, include_same_image=False)) == 0
    assert float(criterion.class_distillation(teacher, student, alone)) > 0  # the paper's x = y


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_patch_distillation_is_equation_5(include: bool, weighted: bool) -> None:
    teacher = PatchTokens(torch.randn(2, B, N, D), probabilities(2, B, N, K))
    student = PatchTokens(torch.randn(2, B, N, D), log_probabilities(2, B, N, K))
    weight = torch.rand(2, B, N).softmax(-1) if weighted else None
    terms = []
    for s, t in ((0, 1), (1, 0)):
        for y in range(B):
            images = [x for x in range(B) if LABEL[x] == LABEL[y] and (include or x != y)]
            values = []
            for x in images:
                total = 0.0
                for k in range(N):
                    similarity = F.cosine_similarity(teacher.feature[t, y, k][None], student.feature[s, x], dim=-1)
                    w = 1 / N if weight is None else float(weight[t, y, k])
                    total += w * cross(teacher.value[t, y, k], student.value[s, x, similarity.argmax()])
                values.append(total)
            if values:
                terms.append(sum(values) / len(values))
    found = criterion.patch_distillation(teacher, student, Pairs.of(LABEL), weight=weight, include_same_image=include)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_released_similarity_is_a_product_of_channel_sums() -> None:
    """The trap: einsum("snc,tNC->tsNn") picks one student patch whatever the teacher patch is (up to its sign)."""
    teacher, student = F.normalize(torch.randn(2, 8, D), dim=-1), F.normalize(torch.randn(2, 8, D), dim=-1)
    y = x = torch.tensor([0])
    similarity = torch.einsum("snc,tNC->tsNn", student, teacher)[0, 0]
    found = criterion.matched(teacher, student, y, x, "released")[0]
    assert torch.equal(found, similarity.argmax(-1))
    assert len(found.unique()) <= 2
    assert len(criterion.matched(teacher, student, y, x, "cosine")[0].unique()) > 2


def test_identical_tokens_match_themselves() -> None:
    feature = F.normalize(torch.randn(1, N, D), dim=-1)
    zero = torch.tensor([0])
    assert criterion.matched(feature, feature, zero, zero, "cosine").tolist() == [list(range(N))]
    assert criterion.matched(feature, feature, zero, zero, "position").tolist() == [list(range(N))]


def test_released_matching_belongs_to_one_rank() -> None:
    two_ranks = Pairs.of(LABEL, all_labels=torch.cat([LABEL, LABEL]))
    tokens = PatchTokens(torch.randn(2, B, N, D), probabilities(2, B, N, K))
    with pytest.raises(ValueError, match="one rank only"):
        criterion.patch_distillation(tokens, tokens, two_ranks, match="released")
    with pytest.raises(ValueError, match="unknown patch matching"):
        criterion.patch_distillation(tokens, tokens, Pairs.of(LABEL), match="nearest")
    with pytest.raises(ConfigError, match="one rank only"):
        Objective(patch_match="released")
    with pytest.raises(ConfigError, match="unknown pairs"):
        Objective(pairs="everywhere")


def test_shares_of_the_ranks_average_to_the_global_loss() -> None:
    teacher, views = probabilities(2, B, K), [log_probabilities(B, K) for _ in range(3)]
    patches = PatchTokens(torch.randn(2, B, N, D), probabilities(2, B, N, K))
    student = PatchTokens(torch.randn(2, B, N, D), log_probabilities(2, B, N, K))
    whole, shares = Pairs.of(LABEL), []
    for first in (0, 3):
        rows = slice(first, first + 3)
        pairs = Pairs.of(LABEL[rows], all_labels=LABEL, first=first)
        own = PatchTokens(student.feature[:, rows], student.value[:, rows])
        shares.append(
            criterion.class_distillation(teacher, [view[rows] for view in views], pairs)
            + criterion.patch_distillation(patches, own, pairs)
        )
    expected = criterion.class_distillation(teacher, views, whole) + criterion.patch_distillation(
        patches, student, whole
    )
    assert float(sum(shares) / 2) == pytest.approx(float(expected), rel=1e-5)


def test_masked_patches_average_within_images_first() -> None:
    teacher, student = probabilities(2, B, N, K), log_probabilities(2, B, N, K)
    mask = torch.rand(2, B, N) < 0.4
    mask[0, 0] = False
    values = [
        sum(cross(teacher[v, b, i], student[v, b, i]) for i in range(N) if mask[v, b, i])
        / max(1, int(mask[v, b].sum()))
        for v in range(2)
        for b in range(B)
    ]
    assert float(criterion.masked_patches(teacher, student, mask)) == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_temperatures_warm_up_by_epoch() -> None:
    warm = Temperatures(warmup_epochs=3, patch_delay=2)
    assert [warm.cls(epoch) for epoch in range(5)] == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert [warm.patch(epoch) for epoch in range(6)] == pytest.approx([0.04, 0.04, 0.04, 0.055, 0.07, 0.07])
    assert Temperatures(warmup_epochs=0).cls(0) == 0.07


def outputs() -> Projected:
    return Projected(torch.randn(2 * B, 1 + N, D), torch.randn(2 * B, K), torch.randn(2 * B, N, K))


def test_the_center_of_a_step_is_the_one_before_it_and_has_raw_logits() -> None:
    distillation = Distillation(K, K, Objective(), Temperatures())
    views = Views(outputs(), outputs(), [])
    assert views.teacher.patch is not None
    distillation(views, LABEL, 0)
    torch.testing.assert_close(distillation.center, 0.1 * views.teacher.cls.mean(0, keepdim=True))
    torch.testing.assert_close(distillation.patch_center, 0.1 * views.teacher.patch.mean((0, 1))[None, None])


def test_entropy_tells_a_collapse() -> None:
    assert float(criterion.entropy(torch.full((3, K), 1 / K))) == pytest.approx(math.log(K))
    assert float(criterion.entropy(F.one_hot(torch.tensor([1, 2]), K).float())) == pytest.approx(0, abs=1e-6)


def test_released_cross_entropy_divides_by_the_batch_twice() -> None:
    logits = torch.randn(2 * B, 3)
    plain = criterion.prototype_cross_entropy(logits, LABEL)
    assert float(plain) == pytest.approx(float(F.cross_entropy(logits, LABEL.repeat(2))))
    assert float(criterion.prototype_cross_entropy(logits, LABEL, as_released=True)) == pytest.approx(float(plain) / B)
