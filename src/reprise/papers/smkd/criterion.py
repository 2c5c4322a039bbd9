"""The losses of SMKD as pure functions.

Shapes: B images, V student views, 2 global views, N patches, K prototypes, D width. H(a, b) = -sum a log b. Every loss
is linear in the student's log-probabilities, so that the teacher's targets are added up first, per student row, and the
product with the log-probabilities is taken once.

With several ranks the teacher's tensors and labels may be those of ALL ranks while the student's rows are this rank's:
`Pairs` then holds the global counts, and each loss is this rank's share times the number of ranks, so that the mean
over ranks (which DDP takes of the gradients) is the loss of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MATCHES = ("cosine", "released", "random", "position")


def teacher_probability(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((z - c) / tau_t) over the last dimension, without gradient."""
    return ((logits.detach() - center) / temperature).softmax(-1)


def student_log_probability(logits: Tensor, temperature: float = 0.1) -> Tensor:
    """log softmax(z / tau_s) over the last dimension."""
    return (logits / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Pairs:
    """Which teacher image explains which student image.

    Attributes:
        same_class: bool [T, B], teacher image (of all ranks) against this rank's student image: equal labels.
        same_image: bool [T, B]: the very same image.
        group: int [T], how many images of the global batch have the teacher image's label (itself among them).
        world: number of ranks that share the batch.
    """

    same_class: Tensor
    same_image: Tensor
    group: Tensor
    world: int = 1

    @classmethod
    def of(cls, label: Tensor, *, all_labels: Tensor | None = None, first: int = 0) -> Pairs:
        """Pairs of this rank's labels [B] with the labels of all ranks [T], among which they begin at `first`."""
        everyone = label if all_labels is None else all_labels
        own = torch.arange(first, first + len(label), device=label.device)
        same_image = torch.arange(len(everyone), device=label.device)[:, None] == own
        group = (everyone[:, None] == everyone).sum(1)
        return cls(everyone[:, None] == label, same_image, group, len(everyone) // len(label))


def self_distillation(teacher: Tensor, student: Sequence[Tensor]) -> Tensor:
    """DINO's class-token loss: the mean of H(p_t(x^q), p_s(x^v)) over images and pairs of views q != v.

    Args:
        teacher: probabilities [2, B, K] of the global views.
        student: log-probabilities [B, K] of every view; the first two are the global ones.
    """
    terms = [
        -(teacher[q] * log_prob).sum(-1).mean()
        for q in range(len(teacher))
        for v, log_prob in enumerate(student)
        if v != q
    ]
    return torch.stack(terms).mean()


def class_distillation(
    teacher: Tensor, student: Sequence[Tensor], pairs: Pairs, *, include_same_image: bool = True
) -> Tensor:
    """Supervised class-token loss: the mean of H(p_t(y')_cls, p_s(x')_cls) over pairs x, y of one class.

    Global views pair with each other, whether the view's number is the same or not; an image pairs with its own OTHER
    view as well (the paper's x = y). Local views are explained by the same image only. All pairs weigh the same.

    Args:
        teacher: probabilities [2, T, K] of the global views.
        student: log-probabilities [B, K] of every view; the first two are the global ones.
        include_same_image: whether x = y counts between global views (the released code leaves it out).

    Returns:
        A scalar; 0 where nothing pairs (the released code divides 0 by 0).
    """
    other = pairs.same_class & ~pairs.same_image
    total = student[0].new_zeros(())
    for v, log_prob in enumerate(student):
        for q, target in enumerate(teacher):
            paired = pairs.same_image if v >= len(teacher) else other
            if include_same_image and v < len(teacher) and v != q:
                paired = pairs.same_class
            weight = paired.to(target)
            total = total - ((weight.t() @ target) * log_prob).sum()
    others, images = float((pairs.group - 1).sum()), len(pairs.group)
    views = len(teacher)
    count = views * views * others + views * (len(student) - views) * images
    count += views * (views - 1) * images if include_same_image else 0
    return total * pairs.world / max(count, 1.0)


def masked_patches(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """iBOT's masked image modelling: H(p_t(x)_i, p_s(masked x)_i) averaged over an image's masked patches i.

    Args:
        teacher: probabilities [2, B, N, K] of the unmasked global views.
        student: log-probabilities [2, B, N, K] of the masked ones.
        mask: bool [2, B, N]. An image without masked patches counts as 0.
    """
    entropy = -(teacher * student).sum(-1)
    masked = mask.to(entropy)
    return ((entropy * masked).sum(-1) / masked.sum(-1).clamp(min=1)).mean()


@dataclass(frozen=True)
class PatchTokens:
    """The patch tokens of global views.

    Attributes:
        feature: backbone outputs [2, B, N, D]; used for matching only, without gradient.
        value: teacher: probabilities [2, B, N, K]; student: log-probabilities.
    """

    feature: Tensor
    value: Tensor

    def normalised(self) -> Tensor:
        return F.normalize(self.feature.detach(), dim=-1)


def patch_distillation(
    teacher: PatchTokens,
    student: PatchTokens,
    pairs: Pairs,
    *,
    weight: Tensor | None = None,
    match: str = "cosine",
    include_same_image: bool = True,
    sum_over_images: bool = False,
) -> Tensor:
    """Patch-token loss (eq. 5): sum_k w_k H(p_t(y')_k, p_s(x')_k+), k+ = argmax_l cos(f^t_k, f^s_l).

    Each teacher image y, in each of the two pairs of different global views, is one term: the mean over the images x of
    its class. The loss is the mean over the terms that have such an image.

    Args:
        teacher: of T images (all ranks); student: of this rank's B images.
        weight: w_k [2, T, N], summing to 1 over patches; None: uniform.
        match: "cosine"; "random" (a random student patch); "position" (the same place); or "released", which picks by
            the product of channel sums, always among the patches of the class's FIRST image, and pairs the pick with
            the teacher distribution of image x in the student's view (T = B only).
        include_same_image: whether x = y is among the images of the class.
        sum_over_images: the sum over x instead of the mean (released code with `weight`).

    Raises:
        ValueError: an unknown match, or "released" with the teacher images of several ranks.
    """
    if match not in MATCHES:
        raise ValueError(f"unknown patch matching {match!r}; one of {', '.join(MATCHES)}")
    if match == "released" and pairs.world > 1:
        raise ValueError("the released matching knows the images of one rank only")
    paired = pairs.same_class if include_same_image else pairs.same_class & ~pairs.same_image
    y, x = paired.nonzero(as_tuple=True)
    partners = pairs.group - (0 if include_same_image else 1)
    terms = 2 * int((partners > 0).sum())
    share = torch.ones_like(partners) if sum_over_images else partners.clamp(min=1)
    total = student.value.new_zeros(())
    for s, t in ((0, 1), (1, 0)):
        index = matched(teacher.normalised()[t], student.normalised()[s], y, x, match)
        row, source, view = x, y, t
        if match == "released":
            row, source, view = first_of_class(pairs)[x], x, s
        uniform = teacher.value.new_full(index.shape, 1 / index.shape[1])
        factor = (uniform if weight is None else weight[t][source]) / share[y][:, None]
        target = accumulated_targets(teacher.value[view], source, factor, row, index, student.value.shape[1:3])
        total = total - (target * student.value[s]).sum()
    return total * pairs.world / max(terms, 1)


def matched(teacher: Tensor, student: Tensor, y: Tensor, x: Tensor, match: str) -> Tensor:
    """For each pair p of teacher image y[p] and student image x[p]: k+ for every teacher patch, int64 [P, N].

    Args:
        teacher, student: L2-normalised features [T, N, D] and [B, N, D].
    """
    patches = teacher.shape[1]
    if match == "position":
        return torch.arange(patches, device=y.device).expand(len(y), -1)
    if match == "random":
        return torch.randint(patches, (len(y), patches), device=y.device)
    if match == "released":
        teacher, student = teacher.sum(-1, keepdim=True), student.sum(-1, keepdim=True)
    return (teacher[y] @ student[x].transpose(1, 2)).argmax(-1)


def first_of_class(pairs: Pairs) -> Tensor:
    """For each image the first one of its class, int64 [B]."""
    number = torch.arange(len(pairs.group), device=pairs.group.device)[:, None]
    return torch.where(pairs.same_class, number, len(pairs.group)).amin(0)


def accumulated_targets(
    teacher: Tensor, source: Tensor, factor: Tensor, row: Tensor, index: Tensor, shape: Sequence[int]
) -> Tensor:
    """Teacher distributions added up at the student patches that they are matched with, [B, N, K].

    Args:
        teacher: [T, N, K]; source: teacher image of each pair [P]; factor: [P, N].
        row: student image of each pair [P]; index: its matched patch for each teacher patch [P, N].
        shape: (B, N) of the result.
    """
    images, patches = shape
    target = teacher.new_zeros(images * patches, teacher.shape[-1])
    flat = (row[:, None] * patches + index).flatten()
    target.index_add_(0, flat, (teacher[source] * factor[..., None]).flatten(0, 1))
    return target.unflatten(0, (images, patches))


def prototype_cross_entropy(logits: Tensor, label: Tensor, *, as_released: bool = False) -> Tensor:
    """Mean cross-entropy of the classifier on the student's global views.

    Args:
        logits: [2B, C], all images of the first view, then all of the second.
        label: int64 [B].
        as_released: divided by B once more, as the released code does.
    """
    loss = F.cross_entropy(logits, label.repeat(len(logits) // len(label)))
    return loss / len(label) if as_released else loss


def entropy(probability: Tensor) -> Tensor:
    """Mean entropy in nats: 0 or ln K tell that the teacher has collapsed."""
    return -(probability * probability.clamp_min(1e-30).log()).sum(-1).mean()
