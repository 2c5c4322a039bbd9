"""What the shared space knows: who finds whom, what new pairs are called, which pictures a sentence brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from reprise.papers.clip.evaluation import distinct_texts
from reprise.training.module import Picture

if TYPE_CHECKING:
    from reprise.papers.clip.module import CLIPModule

SHOWN, GALLERY = 8, 500


def all_pictures(module: CLIPModule) -> Iterator[Picture]:
    """The figures of a run, from the first test items."""
    data = module.captions
    source = data.source("test")
    batch = source.fetch(torch.arange(min(GALLERY, len(source))))
    shown = data.normalisation.invert(batch["image"]).permute(0, 2, 3, 1)
    embedding = module.model.visual(batch["image"].to(module.device))
    if module.objective.retrieves:
        chosen = different(batch["captions"][:, 0], SHOWN)
        texts = batch["captions"][chosen, 0]
        scores = module.objective.scores(module.model, embedding[chosen], texts[:, None].to(module.device))
        words = [readable(module, text) for text in texts]
        yield Picture(
            "pairs",
            matrix_figure(shown[chosen], words, scores.softmax(1).cpu() if scores.amin() < -1 else scores.cpu()),
            "Test pictures (columns) against captions (rows): similarity; partners are on the diagonal (figure 3).",
        )
        texts, _ = distinct_texts(batch["captions"][:, 0])
        queries = texts[torch.linspace(0, len(texts) - 1, min(5, len(texts))).long()]
        ranking = module.objective.scores(module.model, embedding, queries[:, None].to(module.device)).T.cpu()
        yield Picture(
            "retrieval",
            retrieval_figure(shown, [readable(module, text) for text in queries], ranking),
            f"The six of {len(shown)} test pictures that lie nearest to a caption, best first.",
        )
    prompts = data.prompts()
    if prompts is not None and "label" in batch:
        scores = module.objective.scores(module.model, embedding[:SHOWN], prompts.to(module.device)).cpu()
        unseen = batch["unseen"][:SHOWN] if "unseen" in batch else torch.zeros(len(scores), dtype=torch.bool)
        yield Picture(
            "zero_shot",
            classes_figure(shown[:SHOWN], scores, batch["label"][:SHOWN], unseen, data.spec.classes),
            "The five likeliest of all classes, named only by prompts; the true one is dark. Titles in red: pairs of "
            "shape and colour that training never showed.",
        )


def different(captions: Tensor, count: int) -> Tensor:
    """Positions of the first `count` pictures whose captions [N, L] all differ."""
    kept: list[int] = []
    for place, row in enumerate(captions):
        if len(kept) < count and not any(torch.equal(row, captions[other]) for other in kept):
            kept.append(place)
    return torch.tensor(kept)


def readable(module: CLIPModule, text: Tensor) -> str:
    """The words of token ids [L] without start, end and padding."""
    ends = (0, module.model.text.vocab_size - 2, module.model.text.vocab_size - 1)
    return module.captions.tokenizer.decode(number for number in text.tolist() if number not in ends).strip()


def matrix_figure(images: Tensor, words: Sequence[str], scores: Tensor) -> Figure:
    """Images [n, H, W, 3] above the matrix of their scores [n, n] (images by texts), texts at its rows."""
    count = len(words)
    figure = plt.figure(figsize=(0.75 * count + 3.2, 0.62 * (count + 1.4)))
    grid = figure.add_gridspec(2, count, height_ratios=[1, count], hspace=0.05, wspace=0.05)
    for column, image in enumerate(images):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(image)
        axis.set_axis_off()
    axis = figure.add_subplot(grid[1, :])
    axis.imshow(scores.T, cmap="viridis", aspect="auto")
    axis.set_yticks(range(count), words, fontsize=7)
    axis.set_xticks([])
    bright = 0.3 * scores.min() + 0.7 * scores.max()
    for row in range(count):
        for column in range(count):
            shade = "black" if scores[column, row] > bright else "white"
            axis.text(column, row, f"{scores[column, row]:.2f}", ha="center", va="center", color=shade, fontsize=6)
    figure.subplots_adjust(left=0.38, right=0.99, top=0.99, bottom=0.02)
    return figure


def retrieval_figure(images: Tensor, queries: Sequence[str], scores: Tensor, most: int = 6) -> Figure:
    """For each query the `most` images [N, H, W, 3] of highest score [queries, N]."""
    most = min(most, len(images))
    figure, axes = plt.subplots(len(queries), most, figsize=(1.1 * most, 1.35 * len(queries)), squeeze=False)
    for line, query, row in zip(axes, queries, scores, strict=True):
        for axis, place in zip(line, row.topk(most).indices, strict=True):
            axis.imshow(images[place])
            axis.set_axis_off()
        line[0].set_title(query, fontsize=8, loc="left")
    figure.tight_layout(pad=0.4)
    return figure


def classes_figure(images: Tensor, scores: Tensor, label: Tensor, unseen: Tensor, names: Sequence[str]) -> Figure:
    """Images [n, H, W, 3] with bars of their five best classes; scores [n, C] are shown relative to the fifth."""
    most = min(5, scores.shape[1])
    figure, axes = plt.subplots(2, len(images), figsize=(1.45 * len(images), 3.0), squeeze=False)
    for place, image in enumerate(images):
        axes[0, place].imshow(image)
        axes[0, place].set_axis_off()
        colour = "tab:red" if unseen[place] else "black"
        axes[0, place].set_title(names[int(label[place])], fontsize=7, color=colour)
        best = scores[place].topk(most)
        height = (best.values - best.values[-1]) + 0.1 * (best.values[0] - best.values[-1]).clamp(min=1e-6)
        shades = ["tab:blue" if int(number) == int(label[place]) else "lightsteelblue" for number in best.indices]
        axis = axes[1, place]
        axis.barh(range(most), height, color=shades)
        for row, number in enumerate(best.indices):
            axis.text(0, row, names[int(number)], fontsize=6, va="center")
        axis.invert_yaxis()
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    return figure
