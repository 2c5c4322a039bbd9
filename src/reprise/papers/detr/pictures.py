"""What the queries find, where they look, and what the decoder layers add (as in the paper's figures 4, 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reprise.nn.detection import Detection, ground_truth, set_detections
from reprise.papers.detr.model import DETR
from reprise.training.module import Picture

if TYPE_CHECKING:
    from reprise.papers.detr.module import DetrModule

SHOWN_IMAGES, SHOWN_QUERIES, MOST_CENTRES, SURE = 8, 4, 2000, 0.5


def pictures(module: DetrModule) -> Iterator[Picture]:
    """All figures, from the first test batch."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
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
        detections_figure(image[shown], found[shown], ground_truth(targets[shown], sizes[shown]), classes),
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


def detections_figure(
    image: Tensor, found: Sequence[Detection], truth: Sequence[Detection], classes: Sequence[str]
) -> Figure:
    """Images [B, 3, H, W] with the boxes of the sure detections and of the objects, in pixels."""
    columns = min(4, len(image))
    rows = -(-len(image) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.6 * rows), squeeze=False)
    _without_frames(axes.flat)
    for axis, picture, detection, objects in zip(axes.flat, _displayable(image), found, truth, strict=False):
        axis.imshow(picture)
        for box in objects["boxes"].tolist():
            _draw_box(axis, box, "white", style="--")
        sure = detection["scores"] > SURE
        chosen = (detection[name][sure].tolist() for name in ("boxes", "scores", "labels"))
        for box, score, label in zip(*chosen, strict=True):
            _draw_box(axis, box, f"C{label % 10}", f"{_name(classes, label)} {score:.2f}")
    figure.tight_layout()
    return figure


def attention_figure(detector: DETR, image: Tensor, mask: Tensor, sizes: Tensor, classes: Sequence[str]) -> Figure:
    """Two images, each with the attention of its surest queries over the image."""
    image, mask, sizes = image[:2], mask[:2], sizes[:2]
    output, maps = detector.cross_attention(image, mask)
    found = set_detections(output.logits[-1], output.boxes[-1], sizes)
    shown = min(SHOWN_QUERIES, detector.num_queries)
    figure, axes = plt.subplots(len(image), shown + 1, figsize=(2.2 * (shown + 1), 2.3 * len(image)), squeeze=False)
    _without_frames(axes.flat)
    for line, picture, attention, detection in zip(axes, _displayable(image), maps[-1].cpu(), found, strict=True):
        height, width = picture.shape[:2]
        line[0].imshow(picture)
        for axis, query in zip(line[1:], detection["scores"].argsort(descending=True).tolist(), strict=False):
            axis.imshow(picture.mean(-1), cmap="gray")
            axis.imshow(
                attention[query], cmap="inferno", alpha=0.6, extent=(0, width, height, 0), interpolation="bilinear"
            )
            label, score = int(detection["labels"][query]), float(detection["scores"][query])
            _draw_box(axis, detection["boxes"][query].tolist(), "cyan")
            axis.set_title(f"query {query}: {_name(classes, label)} {score:.2f}", fontsize=7)
    figure.tight_layout()
    return figure


def centres_figure(boxes: Tensor) -> Figure:
    """One panel a query slot for boxes [B, Q, 4] cxcywh: centres in the image, coloured by the box's area."""
    slots = min(boxes.shape[1], 20)
    columns = min(5, slots)
    rows = -(-slots // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.7 * rows), squeeze=False)
    _without_frames(axes.flat)
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


def _displayable(image: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] to [B, H, W, 3] in [0, 1], each stretched to its own range."""
    image = image.cpu().permute(0, 2, 3, 1)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low).clamp(min=1e-6)


def _draw_box(axis: Axes, box: Sequence[float], colour: str, text: str = "", style: str = "-") -> None:
    left, top, right, bottom = box
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style, linewidth=1.3)
    )
    if text:
        axis.text(left, top, text, color=colour, fontsize=6, va="bottom")


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


def _without_frames(axes: Any) -> None:
    for axis in axes:
        axis.axis("off")
