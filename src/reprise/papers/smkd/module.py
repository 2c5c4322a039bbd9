"""Both stages of SMKD, and what they are compared with, as one Lightning module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprise.data.loader import Batch
from reprise.distributed import gather, world_size
from reprise.errors import CheckpointError, ConfigError
from reprise.papers.smkd import criterion
from reprise.papers.smkd.distillation import Distillation, Objective, Temperatures, Views
from reprise.papers.smkd.evaluation import FewShotProtocol
from reprise.papers.smkd.model import DistillationNetwork, VisionTransformer, follow, make_teacher
from reprise.papers.smkd.steps import prepare_gradients, view_outputs
from reprise.training.checkpoint import current_step
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory
from reprise.training.scheduled import decay_groups, set_weight_decay
from reprise.training.schedules import cosine_value

CLASSIFIER = "classifier."


class SMKDModule(PaperModule):
    """A student that follows a teacher, which is its own moving average; evaluated by few-shot episodes.

    Stage 1 is an `objective` that is not supervised (iBOT), stage 2 a supervised one that continues from its end.
    Cross-entropy on the base classes can be added, or stand alone. Logs `<split>/accuracy_<k>shot` and its like (see
    `FewShotProtocol`), of the teacher's features.

    Args:
        model: the student.
        objective, temperatures: of the distillation.
        protocol: of the evaluation.
        as_released: compute the objective as HL-hanlin/SMKD does (see the card).
        total_steps: of the run, for the schedules of weight decay and momentum.
        steps_per_epoch: for what goes by epochs: temperatures and frozen prototypes.
        momentum: of the teacher at the first step; it goes to 1 along half a cosine.
        weight_decay_end: weight decay at the last step; it starts at the optimizer's own, along half a cosine.
        clip_norm: of each parameter's gradient by itself; None: not clipped.
        frozen_prototype_epochs: for which the prototypes are left as they are.
        cross_entropy: its weight.
        cross_entropy_on: `tokens` (the class token of the unmasked views) or `prototypes` (the student's class logits,
            as in the released code).
        num_classes: base classes.
        local_views: how many local views a batch has and their side, for `reprise plan`.
    """

    refuses = {
        "accumulation": "pairs of one class and the teacher's centres are those of the whole batch",
        "sharding": "the teacher follows whole parameters",
    }

    def __init__(
        self,
        model: DistillationNetwork,
        objective: Objective,
        temperatures: Temperatures,
        protocol: FewShotProtocol,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        num_classes: int,
        total_steps: int,
        steps_per_epoch: int,
        as_released: bool = False,
        momentum: float = 0.996,
        weight_decay_end: float = 0.4,
        clip_norm: float | None = 3.0,
        frozen_prototype_epochs: int = 1,
        cross_entropy: float = 0.0,
        cross_entropy_on: str = "tokens",
        local_views: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(optimizer, schedule)
        self.objective = objective.released() if as_released else objective
        _check(self.objective, cross_entropy, cross_entropy_on)
        self.student = model
        self.teacher = make_teacher(model)
        classes, patches = model.head.last_layer.weight_g, model.head.last_layer2.weight_g
        self.distillation = Distillation(len(classes), len(patches), self.objective, temperatures)
        self.protocol = protocol
        self.as_released = as_released
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.momentum, self.weight_decay_end, self.clip_norm = momentum, weight_decay_end, clip_norm
        self.frozen_prototype_epochs = frozen_prototype_epochs
        self.cross_entropy, self.cross_entropy_on = cross_entropy, cross_entropy_on
        self.local_views = local_views
        self.classifier: nn.Module = nn.Identity()
        if cross_entropy:
            width = model.backbone.width if cross_entropy_on == "tokens" else len(classes)
            self.classifier = nn.Linear(width, num_classes)
        self._leave_out_idle_parameters()
        self._evaluated: list[tuple[Tensor, Tensor, Tensor]] = []

    def _leave_out_idle_parameters(self) -> None:
        """Parameters that no loss of this run reaches are not trained (DDP expects a gradient for all that are)."""
        if not self.objective.distils:
            self.student.backbone.masked_embed.requires_grad_(False)
            if self.cross_entropy_on == "tokens":
                self.student.head.requires_grad_(False)
        if not self.objective.needs_patches and not self.student.head.shared:
            self.student.head.last_layer2.requires_grad_(False)

    @property
    def model(self) -> VisionTransformer:
        """What is used after the training: the teacher's backbone."""
        return self.teacher.backbone

    def forward(self, image: Tensor, step: Batch | None = None) -> Tensor | Views:
        """Features of the teacher for few-shot evaluation, [B, parts * D].

        While it trains, and given the batch of a step: all outputs that the losses need, for `reprise plan` to count.
        """
        if self.training and step is not None:
            return self._views(step)
        return self.protocol.features(self.teacher.backbone, image)

    def continue_from(self, state: Mapping[str, Tensor]) -> None:
        """Student, teacher and centers of the earlier stage; a classifier of this stage starts anew.

        Raises:
            CheckpointError: the earlier stage had other networks.
        """
        kept = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER)}
        own = {name for name in self.state_dict() if not name.startswith(CLASSIFIER)}
        if kept.keys() != own:
            raise CheckpointError(
                f"the earlier stage does not fit: {', '.join(sorted(kept.keys() ^ own)[:5])}",
                looked_at="its final state",
                next_step="give both stages the same paper.model",
            )
        self.load_state_dict(kept, strict=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """With and without weight decay: biases, norms and other vectors have none."""
        trained = nn.ModuleDict({"student": self.student, "classifier": self.classifier})
        return decay_groups(trained)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        epoch = current_step(self.trainer) // self.steps_per_epoch
        parts: dict[str, Tensor] = self._distil(batch, epoch) if self.objective.distils else {}
        if self.cross_entropy and "cross_entropy" not in parts:
            images = torch.cat([batch[name] for name in view_names(batch, "global")])
            logits = self.classifier(self.student.backbone(images)[:, 0])
            parts["cross_entropy"] = self._cross_entropy(logits, batch["label"])
        loss = torch.stack(list(parts.values())).sum()
        self.log("train/loss", loss, sync_dist=True)
        for name, value in parts.items():
            self.log(f"train/{name}", value, sync_dist=True)
        return loss

    def _views(self, batch: Batch) -> Views:
        return view_outputs(
            self.student,
            self.teacher,
            [batch[name] for name in view_names(batch, "global")],
            [batch[name] for name in view_names(batch, "local")],
            batch["mask"].transpose(0, 1).flatten(0, 1),
            patches=self.objective.needs_patches,
            attention=self.objective.attention_weighted,
        )

    def _distil(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        views = self._views(batch)
        probability = self.distillation.cls_probability(views.teacher.cls, epoch)
        self.log("train/teacher_entropy", criterion.entropy(probability), sync_dist=True)
        losses = self.distillation(views, batch["label"], epoch)
        parts = {"cls": losses.cls, "patch": losses.patch, "mim": losses.mim}
        if self.cross_entropy and self.cross_entropy_on == "prototypes":
            parts["cross_entropy"] = self._cross_entropy(self.classifier(views.student.cls), batch["label"])
        return parts

    def _cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = criterion.prototype_cross_entropy(logits, label, as_released=self.as_released)
        return self.cross_entropy * loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        start = optimizer.defaults["weight_decay"]
        set_weight_decay(optimizer, self._scheduled(start, self.weight_decay_end))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Each parameter by itself (`clip_norm`); called before every update, whatever the trainer clips."""
        frozen = current_step(self.trainer) < self.frozen_prototype_epochs * self.steps_per_epoch
        prepare_gradients(self.student, max_norm=self.clip_norm, freeze_prototypes=frozen)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        follow(self.teacher, self.student, self._scheduled(self.momentum, 1.0))

    def _scheduled(self, start: float, end: float) -> float:
        return cosine_value(current_step(self.trainer), self.total_steps, start, end)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        feature = self.protocol.features(self.teacher.backbone, batch["image"]).float()
        self._evaluated.append((feature, batch["label"], batch["index"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_episodes("val")

    def on_test_epoch_end(self) -> None:
        self._log_episodes("test")

    def _log_episodes(self, split: str) -> None:
        feature, label, index = (torch.cat(list(parts)) for parts in zip(*self._evaluated, strict=True))
        self._evaluated.clear()
        feature, label = in_order(feature, label, index)
        for name, value in self.protocol.evaluate(feature, label).items():
            self.log(f"{split}/{name}", value, sync_dist=True)

    def example_batch(self, batch_size: int) -> Batch:
        """Random views of pairs of images of one class, on torch's default device; `step` is all of it again."""
        backbone = self.student.backbone
        channels, side = backbone.patch_embed.proj.in_channels, backbone.grid * backbone.patch
        count, small = self.local_views
        views = {f"global_{number}": torch.randn(batch_size, channels, side, side) for number in range(2)}
        views |= {f"local_{number}": torch.randn(batch_size, channels, small, small) for number in range(count)}
        batch: Batch = {
            "image": views["global_0"],
            "label": torch.arange(batch_size) // 2,
            "index": torch.arange(batch_size),
            "mask": torch.rand(batch_size, 2, backbone.grid, backbone.grid) < 0.3,
            **views,
        }
        return {**batch, "step": dict(batch)}

    @torch.no_grad()
    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.smkd import pictures

        source = self.data.source("test")
        batch = source.fetch(torch.arange(min(600, len(source))))
        image, label = batch["image"].to(self.device), batch["label"]
        backbone = self.teacher.backbone
        yield pictures.attention(backbone, image[:8])
        yield pictures.matches(backbone, image, label)
        feature = torch.cat([self.protocol.features(backbone, part) for part in image.split(200)]).cpu()
        yield pictures.embedding(feature, label)
        shots = min(self.protocol.shots)
        yield pictures.episode(image.cpu(), feature, self.protocol.episodes_of(label, shots)[0], shots)


def view_names(batch: Batch, kind: str) -> list[str]:
    """Names of the batch's global or local views, by number."""
    names = [name for name in batch if name.partition("_")[0] == kind]
    return sorted(names, key=lambda name: int(name.partition("_")[2] or 0))


def in_order(feature: Tensor, label: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all ranks by item number; ranks may differ by one row."""
    if world_size() > 1:
        most = int(gather(torch.tensor([len(index)], device=index.device)).max())
        spare = most - len(index)
        feature = gather(torch.cat([feature, feature.new_zeros(spare, feature.shape[1])]))
        label = gather(torch.cat([label, label.new_zeros(spare)]))
        index = gather(torch.cat([index, index.new_full((spare,), -1)]))
    order = index.argsort()
    order = order[index[order] >= 0]
    return feature[order], label[order]


def _check(objective: Objective, cross_entropy: float, cross_entropy_on: str) -> None:
    if cross_entropy_on not in ("tokens", "prototypes"):
        raise ConfigError(
            f"cross-entropy on {cross_entropy_on!r}",
            looked_at="paper.cross_entropy_on",
            next_step="one of tokens, prototypes",
        )
    if not objective.distils and not (cross_entropy and cross_entropy_on == "tokens"):
        raise ConfigError(
            "there is nothing to train on: all weights of the objective are 0",
            looked_at="paper.objective",
            next_step="set one of cls_weight, patch_weight, mim_weight, or paper.cross_entropy with tokens",
        )
