"""The distillation objective with its state: centers of the teacher's logits, temperatures, pairs across ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reprise.distributed import all_reduce_mean, gather, rank, world_size
from reprise.errors import ConfigError
from reprise.papers.smkd import criterion
from reprise.papers.smkd.criterion import MATCHES, Pairs, PatchTokens
from reprise.papers.smkd.model import Projected


@dataclass(frozen=True)
class Temperatures:
    """Teacher temperatures by epoch; the student's is constant.

    Attributes:
        warmup, final, warmup_epochs: of the class tokens: a straight line over the warm-up epochs, both ends included.
        patch_warmup, patch_final: of the patch tokens, over the same epochs.
        patch_delay: epochs for which the patch temperature first stays at its warm-up value.
    """

    warmup: float = 0.04
    final: float = 0.07
    warmup_epochs: int = 30
    patch_warmup: float = 0.04
    patch_final: float = 0.07
    patch_delay: int = 0
    student: float = 0.1

    def cls(self, epoch: int) -> float:
        return warmed_up(epoch, self.warmup, self.final, self.warmup_epochs)

    def patch(self, epoch: int) -> float:
        return warmed_up(epoch - self.patch_delay, self.patch_warmup, self.patch_final, self.warmup_epochs)


def warmed_up(epoch: int, start: float, end: float, epochs: int) -> float:
    """`start` up to epoch 0, `end` from epoch `epochs - 1` on, a line between them; `end` without a warm-up."""
    if epochs <= 1:
        return start if epoch < epochs else end
    return start + (end - start) * min(max(epoch, 0) / (epochs - 1), 1.0)


@dataclass(frozen=True)
class Objective:
    """Which losses make up the training of a stage.

    Attributes:
        supervised: pairs are images of one class (stage 2); else views of one image (stage 1).
        cls_weight, patch_weight, mim_weight: lambda_1 (class tokens), lambda_2 (matched patches), lambda_3 (masked).
        attention_weighted: weigh matched patches by the teacher's attention; else uniformly.
        patch_match: see `criterion.patch_distillation`.
        same_image: pairs of the very same image count (the paper's x = y).
        sum_over_images: see `criterion.patch_distillation`.
        pairs: "global" (same-class images of all ranks) or "rank" (of each rank only, as released).
        center_momentum: of the centers.
    """

    supervised: bool = True
    cls_weight: float = 1.0
    patch_weight: float = 1.0
    mim_weight: float = 0.0
    attention_weighted: bool = False
    patch_match: str = "cosine"
    same_image: bool = True
    sum_over_images: bool = False
    pairs: str = "global"
    center_momentum: float = 0.9

    def __post_init__(self) -> None:
        for key, known in (("patch_match", MATCHES), ("pairs", ("global", "rank"))):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"unknown {key} {getattr(self, key)!r}",
                    looked_at=f"paper.objective.{key}",
                    next_step=f"one of {', '.join(known)}",
                )
        if self.patch_match == "released" and self.pairs == "global":
            raise ConfigError(
                "the released matching knows the images of one rank only",
                looked_at="paper.objective.pairs",
                next_step="set paper.objective.pairs=rank (or paper.as_released=true, which sets both)",
            )

    def released(self) -> Objective:
        """The same objective as HL-hanlin/SMKD computes it."""
        return replace(
            self,
            patch_match="released",
            pairs="rank",
            same_image=False,
            sum_over_images=self.attention_weighted,
        )

    @property
    def same_image_patches(self) -> bool:
        """Whether x = y is among the matched patches; released: only with attention weights."""
        return self.same_image or self.sum_over_images or not self.supervised

    @property
    def distils(self) -> bool:
        return bool(self.cls_weight or self.patch_weight or self.mim_weight)

    @property
    def needs_patches(self) -> bool:
        return bool(self.patch_weight or self.mim_weight)


@dataclass(frozen=True)
class Views:
    """Network outputs of one step: two global views stacked along the batch [2B, ...], view by view.

    Attributes:
        teacher, student: of the global views.
        local: class logits [B, K] of each of the student's local views.
        mask: bool [2B, N], which student patches were hidden; None: none.
        attention: the teacher's class attention to its patches [2B, N], or None.
    """

    teacher: Projected
    student: Projected
    local: list[Tensor]
    mask: Tensor | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """The weighted parts of a step's loss."""

    cls: Tensor
    patch: Tensor
    mim: Tensor

    @property
    def total(self) -> Tensor:
        return self.cls + self.patch + self.mim


class Distillation(nn.Module):
    """Losses of one step, and the centers: a moving average of the mean of the teacher's raw logits.

    The centers that a step uses are those before it.

    Args:
        prototypes, patch_prototypes: K of class and of patch tokens.
    """

    center: Tensor
    patch_center: Tensor

    def __init__(
        self, prototypes: int, patch_prototypes: int, objective: Objective, temperatures: Temperatures
    ) -> None:
        super().__init__()
        self.objective = objective
        self.temperatures = temperatures
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.register_buffer("patch_center", torch.zeros(1, 1, patch_prototypes))

    def forward(self, views: Views, label: Tensor, epoch: int) -> Losses:
        """The weighted losses of one step; updates the centers.

        Args:
            label: int64 [B] of the images, of this rank.
            epoch: for the temperatures.
        """
        goal, student = self.objective, self.temperatures.student
        teacher_cls = self.cls_probability(views.teacher.cls, epoch).unflatten(0, (2, -1))
        log_cls = student_log_probabilities(views, student)
        pairs = self.pairs(label)
        zero = views.student.cls.sum() * 0  # keeps every parameter in the graph
        cls = zero
        if goal.cls_weight and goal.supervised:
            targets = self.of_all_ranks(teacher_cls)
            cls = criterion.class_distillation(targets, log_cls, pairs, include_same_image=goal.same_image)
        elif goal.cls_weight:
            cls = criterion.self_distillation(teacher_cls, log_cls)
        patch, mim = self._patch_losses(views, pairs, epoch) if goal.needs_patches else (zero, zero)
        self._update_centers(views.teacher)
        return Losses(goal.cls_weight * cls, goal.patch_weight * patch, goal.mim_weight * mim)

    def cls_probability(self, logits: Tensor, epoch: int) -> Tensor:
        """Teacher distributions [..., K] of class logits."""
        return criterion.teacher_probability(logits, self.center, self.temperatures.cls(epoch))

    def pairs(self, label: Tensor) -> Pairs:
        """Same-class pairs in the global batch, or in this rank's part of it."""
        if not self.objective.supervised:
            return Pairs.of(torch.arange(len(label), device=label.device))
        if self.objective.pairs == "rank" or world_size() == 1:
            return Pairs.of(label)
        return Pairs.of(label, all_labels=gather(label), first=rank() * len(label))

    def of_all_ranks(self, value: Tensor) -> Tensor:
        """Teacher tensors [2, B, ...] of all ranks [2, T, ...] where pairs are global."""
        if not self.objective.supervised or self.objective.pairs == "rank" or world_size() == 1:
            return value
        return gather(value.transpose(0, 1).contiguous()).transpose(0, 1)

    def _patch_losses(self, views: Views, pairs: Pairs, epoch: int) -> tuple[Tensor, Tensor]:
        goal = self.objective
        assert views.teacher.patch is not None
        assert views.student.patch is not None
        probability = criterion.teacher_probability(
            views.teacher.patch, self.patch_center, self.temperatures.patch(epoch)
        ).unflatten(0, (2, -1))
        log_prob = criterion.student_log_probability(views.student.patch, self.temperatures.student)
        log_prob = log_prob.unflatten(0, (2, -1))
        patch = mim = log_prob.sum() * 0
        if goal.patch_weight:
            teacher, student = (by_view(output.tokens[:, 1:]) for output in (views.teacher, views.student))
            weight = by_view(views.attention) if goal.attention_weighted and views.attention is not None else None
            patch = criterion.patch_distillation(
                PatchTokens(self.of_all_ranks(teacher), self.of_all_ranks(probability)),
                PatchTokens(student, log_prob),
                pairs,
                weight=None if weight is None else self.of_all_ranks(weight),
                match=goal.patch_match,
                include_same_image=goal.same_image_patches,
                sum_over_images=goal.sum_over_images,
            )
        if goal.mim_weight and views.mask is not None:
            mim = criterion.masked_patches(probability, log_prob, by_view(views.mask))
        return patch, mim

    @torch.no_grad()
    def _update_centers(self, teacher: Projected) -> None:
        momentum = self.objective.center_momentum
        mean = all_reduce_mean(teacher.cls.detach().mean(0, keepdim=True))
        self.center.mul_(momentum).add_(mean, alpha=1 - momentum)
        if teacher.patch is not None:
            mean = all_reduce_mean(teacher.patch.detach().mean(1).mean(0)[None, None])
            self.patch_center.mul_(momentum).add_(mean, alpha=1 - momentum)


def by_view(value: Tensor) -> Tensor:
    """[2B, ...] as [2, B, ...]."""
    return value.unflatten(0, (2, -1))


def student_log_probabilities(views: Views, temperature: float) -> list[Tensor]:
    """Log-probabilities [B, K] of the student's class tokens: the two global views, then the local ones."""
    stacked = [*views.student.cls.chunk(2), *views.local]
    return [criterion.student_log_probability(logits, temperature) for logits in stacked]
