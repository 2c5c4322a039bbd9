"""What the stages change: detections, pseudo objects, pseudo targets and distilled features, and where queries look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from reprise.data.loader import Batch
from reprise.nn.boxes import cxcywh_to_xyxy, scale_to_pixels
from reprise.nn.detection import evaluation_sizes, ground_truth, padding_of
from reprise.nn.matching import pad_targets
from reprise.papers.incremental_detr.criterion import kept_proposals
from reprise.papers.incremental_detr.distillation import covered_cells
from reprise.papers.incremental_detr.model import DeformableDETR
from reprise.training.figures import class_name, detections_figure, displayable, draw_box, without_frames
from reprise.training.module import Picture

if TYPE_CHECKING:
    from reprise.papers.incremental_detr.module import IncrementalDetrModule

SHOWN_IMAGES, TRAINING_IMAGES, SHOWN_QUERIES = 8, 4, 3
KNOWN, KEPT, DROPPED, NOVEL, PSEUDO = "white", "lime", "red", "magenta", "cyan"


def pictures(module: IncrementalDetrModule) -> Iterator[Picture]:
    """All figures of the stage."""
    data = module.classes
    batch = module.transfer_batch_to_device(next(iter(data.test_dataloader())), module.device, 0)
    batch = _first(batch, SHOWN_IMAGES)
    found = module.detections(batch)
    yield Picture(
        "detections",
        detections_figure(
            batch["image"],
            found,
            ground_truth(batch["targets"], evaluation_sizes(batch)),
            data.spec.classes,
            sure_above=module.score_threshold,
        ),
        f"Test images: objects (white, dashed) and detections with a score above {module.score_threshold}; novel "
        f"classes: {', '.join(data.spec.classes[int(label)] for label in data.novel_labels)}.",
    )
    yield Picture(
        "locations",
        locations_figure(module.model, batch, data.spec.classes, module.real_classes),
        "Where the surest queries look: sampling points of the last decoder layer, larger where they weigh more.",
    )
    training = module.transfer_batch_to_device(next(iter(data.train_dataloader())), module.device, 0)
    training = _first(training, TRAINING_IMAGES)
    if module.stage == "self_supervised":
        yield Picture(
            "proposals",
            proposals_figure(module, training),
            "Training images of stage 1b: base objects (white, dashed), proposals that become pseudo objects (green) "
            "and those that overlap a base object (red).",
        )
    if module.teacher is not None:
        yield Picture(
            "distillation",
            distillation_figure(module, training),
            "Above: training images of stage 2, novel boxes (magenta) and pseudo targets (cyan). Below: "
            "how far the projected features have moved from the base model's (bright), and the cells that are free.",
        )


def locations_figure(model: DeformableDETR, batch: Batch, classes: Sequence[str], real_classes: int) -> Figure:
    """Two images with the sampling points of the surest queries."""
    batch = _first(batch, 2)
    image, sizes = batch["image"], evaluation_sizes(batch)
    looked: list[tuple[Tensor, Tensor]] = []
    attention = model.transformer.decoder.layers[-1].get_submodule("cross_attn")
    kept = attention.register_forward_pre_hook(lambda module, args: looked.append(module.look(*args[:2], args[3])))
    try:
        with torch.no_grad():
            output = model(image, padding_of(batch))
    finally:
        kept.remove()
    locations, weights = (value.flatten(2, 4) for value in looked[0])  # [B, Q, points, 2] and [B, Q, points]
    scores, labels = output.logits[-1, ..., :real_classes].sigmoid().max(-1)
    boxes = scale_to_pixels(cxcywh_to_xyxy(output.boxes[-1]), sizes)
    shown = min(SHOWN_QUERIES, model.num_queries)
    figure, axes = plt.subplots(len(image), shown, figsize=(2.4 * shown, 2.5 * len(image)), squeeze=False)
    without_frames(axes.flat)
    for index, (line, picture) in enumerate(zip(axes, displayable(image), strict=True)):
        height, width = picture.shape[:2]
        for axis, query in zip(line, scores[index].argsort(descending=True).tolist(), strict=False):
            axis.imshow(picture)
            x, y = (locations[index, query] * locations.new_tensor([width, height])).cpu().unbind(-1)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            axis.scatter(x[inside], y[inside], s=60 * weights[index, query].cpu()[inside], c="yellow", linewidths=0)
            draw_box(axis, boxes[index, query].tolist(), PSEUDO)
            name = class_name(classes, int(labels[index, query]))
            axis.set_title(f"query {query}: {name} {float(scores[index, query]):.2f}", fontsize=7)
    figure.tight_layout()
    return figure


def proposals_figure(module: IncrementalDetrModule, batch: Batch) -> Figure:
    """Training images of stage 1b with base objects, and kept and dropped proposals."""
    real = [target["labels"] < module.real_classes for target in batch["targets"]]
    pairs = list(zip(batch["targets"], real, strict=True))
    known = [{"labels": target["labels"][chosen], "boxes": target["boxes"][chosen]} for target, chosen in pairs]
    proposals = [target["boxes"][~chosen] for target, chosen in pairs]
    kept = kept_proposals(proposals, pad_targets(known), module.criterion.overlap)
    figure, axes = plt.subplots(1, len(known), figsize=(2.6 * len(known), 2.7), squeeze=False)
    without_frames(axes.flat)
    for index, (axis, picture) in enumerate(zip(axes.flat, displayable(batch["image"]), strict=True)):
        axis.imshow(picture)
        size = batch["targets"][index]["size"]
        kinds = ((proposals[index], DROPPED, ":"), (kept[index], KEPT, "-"), (known[index]["boxes"], KNOWN, "--"))
        for boxes, colour, style in kinds:
            for box in scale_to_pixels(cxcywh_to_xyxy(boxes), size).tolist():
                draw_box(axis, box, colour, style=style)
    figure.tight_layout()
    return figure


@torch.no_grad()
def distillation_figure(module: IncrementalDetrModule, batch: Batch) -> Figure:
    """Training images of stage 2 with novel boxes and pseudo targets, and the change of their features."""
    assert module.teacher is not None
    mask = padding_of(batch)
    ours, theirs = module.model(batch["image"], mask), module.teacher(batch["image"], mask)
    targets = pad_targets(batch["targets"])
    pseudo, _ = module.criterion.pseudo_targets(theirs.logits[-1], theirs.boxes[-1], targets)
    moved = (ours.projected[0] - theirs.projected[0]).square().sum(1).sqrt().cpu()
    padding = ours.paddings[0]
    extent = torch.stack([(~padding[:, 0]).sum(-1), (~padding[:, :, 0]).sum(-1)], -1).float()
    free = covered_cells(targets.boxes, targets.counts, extent, moved.shape[-2:]).cpu()
    figure, axes = plt.subplots(2, len(moved), figsize=(2.6 * len(moved), 5.2), squeeze=False)
    without_frames(axes.flat)
    for index, picture in enumerate(displayable(batch["image"])):
        above, below = axes[:, index]
        above.imshow(picture)
        size = batch["targets"][index]["size"]
        for boxes, colour in ((targets.boxes, NOVEL), (pseudo.boxes, PSEUDO)):
            count = (targets if colour == NOVEL else pseudo).counts[index]
            for box in scale_to_pixels(cxcywh_to_xyxy(boxes[index, :count]), size).tolist():
                draw_box(above, box, colour)
        below.imshow(moved[index], cmap="inferno", vmin=0, vmax=float(moved.max()))
        for row, column in free[index].nonzero().tolist():
            draw_box(below, (column - 0.5, row - 0.5, column + 0.5, row + 0.5), NOVEL)
    figure.tight_layout()
    return figure


def _first(batch: Batch, count: int) -> Batch:
    """The first items of a batch."""
    return {name: value[:count] for name, value in batch.items()}
