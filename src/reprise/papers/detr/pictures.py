"""What the queries find, where they look, and what the decoder layers add (as in the paper's figures 4, 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from reprise.nn.detection import ground_truth, set_detections
from reprise.papers.detr.model import DETR
from reprise.training.figures import class_name, detections_figure, displayable, draw_box, without_frames
from reprise.training.module import Picture

if TYPE_CHECKING:
    from reprise.papers.detr.module import DetrModule

SHOWN_IMAGES, SHOWN_QUERIES, MOST_CENTRES, SURE = 8, 4, 2000, 0.5


def pictures(module: DetrModule) -> Iterator[Picture]:
    """All figures, from the first test batch."""
    data = module.data
    batch = module.transfer_batch_to_device(next(iter(data.test_dataloader())), module.device, 0)
    detector, classes = module.detector, data.spec.classes
    image, mask, targets = batch["image"], batch["mask"], batch["targets"]
    sizes = torch.stack([target["size"] for target in targets])
    shown = slice(0, SHOWN_IMAGES)
    with torch.no_grad():
        output = detector.eval()(image, mask)
    found = set_detections(output.logits[-1], output.boxes[-1], sizes)
    yield Picture(
        "detections",
        detections_figure(
            image[shown], found[shown], ground_truth(targets[shown], sizes[shown]), classes, sure_above=SURE
        ),
        f"Test images: objects (white, dashed) and all detections with a score above {SURE}; no suppression.",
    )
    yield Picture(
        "attention",
        attention_figure(detector, image[shown], mask[shown], sizes[shown], classes),
        "Where the surest queries look: cross-attention of the last decoder layer (mean over heads), with their boxes.",
    )
    yield Picture(
        "centres",
        centres_figure(output.boxes[-1][:MOST_CENTRES]),
        "Centres of the boxes that each query slot predicts over test images; slots specialise in regions and sizes.",
    )
    if module.layer_scores:
        yield Picture(
            "layers",
            layers_figure(module.layer_scores),
            "AP50 after each decoder layer, without and with non-maximum suppression.",
        )


def attention_figure(detector: DETR, image: Tensor, mask: Tensor, sizes: Tensor, classes: Sequence[str]) -> Figure:
    """Two images, each with the attention of its surest queries over the image."""
    image, mask, sizes = image[:2], mask[:2], sizes[:2]
    output, maps = detector.cross_attention(image, mask)
    found = set_detections(output.logits[-1], output.boxes[-1], sizes)
    shown = min(SHOWN_QUERIES, detector.num_queries)
    figure, axes = plt.subplots(len(image), shown + 1, figsize=(2.2 * (shown + 1), 2.3 * len(image)), squeeze=False)
    without_frames(axes.flat)
    for line, picture, attention, detection in zip(axes, displayable(image), maps[-1].cpu(), found, strict=True):
        height, width = picture.shape[:2]
        line[0].imshow(picture)
        for axis, query in zip(line[1:], detection["scores"].argsort(descending=True).tolist(), strict=False):
            axis.imshow(picture.mean(-1), cmap="gray")
            axis.imshow(
                attention[query], cmap="inferno", alpha=0.6, extent=(0, width, height, 0), interpolation="bilinear"
            )
            label, score = int(detection["labels"][query]), float(detection["scores"][query])
            draw_box(axis, detection["boxes"][query].tolist(), "cyan")
            axis.set_title(f"query {query}: {class_name(classes, label)} {score:.2f}", fontsize=7)
    figure.tight_layout()
    return figure


def centres_figure(boxes: Tensor) -> Figure:
    """One panel a query slot for boxes [B, Q, 4] cxcywh: centres in the image, coloured by the box's area."""
    slots = min(boxes.shape[1], 20)
    columns = min(5, slots)
    rows = -(-slots // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.7 * rows), squeeze=False)
    without_frames(axes.flat)
    area = (boxes[..., 2] * boxes[..., 3]).sqrt().cpu()
    for slot, axis in enumerate(axes.flat[:slots]):
        axis.axis("on")
        axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        x, y = boxes[:, slot, :2].cpu().unbind(-1)
        axis.scatter(x, y, s=3, c=area[:, slot], vmin=0, vmax=float(area.max()), cmap="viridis", linewidths=0)
        axis.set_title(f"slot {slot}", fontsize=7)
    figure.tight_layout()
    return figure


def layers_figure(layers: Sequence[Mapping[str, float]]) -> Figure:
    """AP50 of each decoder layer without and with suppression."""
    figure, axis = plt.subplots(figsize=(4.2, 2.8))
    number = range(1, len(layers) + 1)
    for name, label, marker in (("ap50", "without NMS", "o"), ("ap50_nms", "with NMS", "s")):
        axis.plot(number, [layer[name] for layer in layers], marker=marker, label=label)
    axis.set(xlabel="decoder layer", ylabel="AP50", xticks=list(number), ylim=(0, 1))
    axis.legend()
    figure.tight_layout()
    return figure
