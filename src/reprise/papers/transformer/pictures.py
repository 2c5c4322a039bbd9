"""What is translated into what, where each head looks, what positions look like, and how quality falls with length."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from reprise.data.loader import Batch
from reprise.nn.attention import MultiHeadAttention
from reprise.papers.transformer.criterion import PAD
from reprise.papers.transformer.model import Transformer
from reprise.papers.transformer.networks import Network
from reprise.papers.transformer.recurrent import AdditiveAttention
from reprise.training.module import Picture

if TYPE_CHECKING:
    from reprise.papers.transformer.module import TransformerModule

SHOWN, WIDTH, MOST_LAYERS, MOST_HEADS, POSITIONS = 6, 90, 3, 8, 64


def pictures(module: TransformerModule) -> Iterator[Picture]:
    """All figures, from the test set."""
    loader = module.pairs.test_dataloader()
    batches = [module.transfer_batch_to_device(batch, module.device, 0) for batch in loader]
    middle = batches[len(batches) // 2]
    model = module.best_model.eval()
    yield Picture("translations", translations_figure(module, rows_of(middle, SHOWN)), translations_caption(module))
    maps, labels = attention_example(module, model, middle)
    where = "encoder-decoder attention" if isinstance(model, Transformer) else "additive attention"
    if maps:
        yield Picture(
            "attention",
            attention_figure(maps, labels),
            f"Where the decoder looks: {where} for one test pair; a row is an output symbol, a column an input symbol.",
        )
    if isinstance(model, Transformer) and (signal := model.position_signal(0, POSITIONS)) is not None:
        yield Picture(
            "positions",
            positions_figure(signal.detach().cpu()),
            "The position signal, and the similarity of positions: it falls with their distance, everywhere alike.",
        )
    yield Picture(
        "length",
        length_figure(accuracy_by_length(model, batches)),
        "Accuracy of the next symbol under teacher forcing by the length of the target (test set).",
    )


def rows_of(batch: Batch, count: int) -> Batch:
    """The first rows of a batch."""
    return {name: value[:count] for name, value in batch.items()}


def translations_caption(module: TransformerModule) -> str:
    """One sentence, with the corpus score and its signature where there is one."""
    text = f"Test inputs, what should come out, and what beam search (beam {module.beam_size}) finds."
    if module.corpus_bleu is None:
        return text
    return f"{text} Corpus BLEU of this run: {module.last_bleu:.2f} ({module.corpus_bleu.describe()})."


def translations_figure(module: TransformerModule, batch: Batch) -> Figure:
    """A page of text."""
    pairs, found = module.pairs, module.search(batch["source"])
    blocks = []
    for source, target, output in zip(batch["source"], batch["target"], found, strict=True):
        for label, ids in (("input", source), ("reference", target), ("output", output)):
            lines = textwrap.wrap(pairs.decode(ids.tolist()), WIDTH) or ["(nothing)"]
            blocks += [f"{label if number == 0 else '':>9}  {line}" for number, line in enumerate(lines)]
        blocks.append("")
    figure = plt.figure(figsize=(8.5, 0.19 * len(blocks) + 0.2))
    figure.text(0.01, 0.99, "\n".join(blocks), family="monospace", fontsize=8, va="top", parse_math=False)
    return figure


def attention_maps(model: Network, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Attention of target over source under teacher forcing: {"layer 1": [h, T, S], ...}, for one pair [1, L]."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            weights = layer.weights(*arguments)[0] if isinstance(layer, MultiHeadAttention) else output[1]
            found.setdefault(name, []).append(weights.detach().cpu())

        return hook

    layers: Mapping[str, nn.Module]
    if isinstance(model, Transformer):
        layers = {f"layer {n}": layer.cross_attention for n, layer in enumerate(model.decoder_layers(), start=1)}
    else:
        layers = {"attention": model.attention} if isinstance(model.attention, AdditiveAttention) else {}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(source, target)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(model, Transformer):
        return {name: weights[0] for name, weights in found.items()}
    return {name: torch.stack(steps, dim=1) for name, steps in found.items()}


def attention_example(
    module: TransformerModule, model: Network, batch: Batch
) -> tuple[dict[str, Tensor], tuple[list[str], list[str]]]:
    """Maps of the first pair of a batch, and the symbols of its output (rows) and its input (columns)."""
    source, target = (batch[name][:1] for name in ("source", "target"))
    source, target = (ids[:, ids[0] != PAD] for ids in (source, target))
    names = [[*module.pairs.symbols(ids[0].tolist()), "end"] for ids in (target, source)]
    return attention_maps(model, source, target), (names[0], names[1])


def attention_figure(maps: Mapping[str, Tensor], labels: tuple[Sequence[str], Sequence[str]]) -> Figure:
    """A row a layer (the last ones), a column a head."""
    shown = list(maps.items())[-MOST_LAYERS:]
    columns = min(MOST_HEADS, max(len(weights) for _, weights in shown))
    figure, axes = plt.subplots(len(shown), columns, figsize=(2.4 * columns + 1, 2.6 * len(shown)), squeeze=False)
    for line, (name, weights) in zip(axes, shown, strict=True):
        for head, axis in enumerate(line):
            axis.imshow(weights[head], cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"{name}, head {head + 1}" if len(weights) > 1 else name, fontsize=7)
            axis.set_xticks(range(len(labels[1])), labels[1], rotation=90, fontsize=5, parse_math=False)
            axis.set_yticks(range(len(labels[0])), labels[0] if head == 0 else [], fontsize=5, parse_math=False)
    figure.tight_layout()
    return figure


def positions_figure(signal: Tensor) -> Figure:
    """The signal [L, d] and the cosine similarity of its rows."""
    unit = signal / signal.norm(dim=1, keepdim=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    axes[0].imshow(signal, cmap="RdBu", aspect="auto")
    axes[0].set(xlabel="channel", ylabel="position", title="signal")
    picture = axes[1].imshow(unit @ unit.T, cmap="viridis")
    axes[1].set(xlabel="position", ylabel="position", title="cosine similarity")
    figure.colorbar(picture, ax=axes[1])
    figure.tight_layout()
    return figure


def accuracy_by_length(model: Network, batches: Sequence[Batch]) -> dict[int, float]:
    """Token accuracy of the targets of each length."""
    counts: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            target = batch["target"]
            real = target != PAD
            right = (model(batch["source"], target).argmax(-1) == target) & real
            for length, correct in zip(real.sum(1).tolist(), right.sum(1).tolist(), strict=True):
                counts[length] = counts.get(length, torch.zeros(2)) + torch.tensor([correct, length])
    return {length: float(pair[0] / pair[1]) for length, pair in sorted(counts.items())}


def length_figure(accuracy: Mapping[int, float]) -> Figure:
    """A curve over the length in symbols, the end symbol included."""
    figure, axis = plt.subplots(figsize=(4.5, 2.8))
    axis.plot(list(accuracy), list(accuracy.values()), marker=".")
    axis.set(xlabel="symbols of the target", ylabel="token accuracy", ylim=(0, 1.02))
    figure.tight_layout()
    return figure
