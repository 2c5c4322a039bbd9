"""Training steps and decoded symbols per second: the Transformer and the recurrent network of the same size, in turns.

Speed is reported here and not in metrics.csv, which must be the same for every run of a seed.
    python bench/translation_speed.py [experiment=transformer/public ...] [--write]
"""

from __future__ import annotations

import statistics
import time

import torch

from reprise.config import compose
from reprise.evidence import benchmarks
from reprise.papers.transformer.criterion import label_smoothed_loss
from reprise.papers.transformer.networks import Network
from reprise.training.beam import beam_search
from reprise.training.instantiate import instantiate

LENGTHS, ROUNDS, TOKENS, DECODED = (8, 16, 32, 64), 5, 1024, 16


def make(overrides: list[str], network: str) -> Network:
    """The recipe's network of this name, with random weights."""
    cfg = compose([*overrides, f"paper.model.network={network}"])
    torch.manual_seed(0)
    return instantiate(cfg.paper.model, path="paper.model")


def training_step(model: Network, source: torch.Tensor) -> float:
    """Seconds of one forward and backward pass (the update costs both the same)."""
    model.train().zero_grad()
    began = time.perf_counter()
    losses = label_smoothed_loss(model(source, source), source, 0.1)
    (losses.sum() / source.numel()).backward()
    return time.perf_counter() - began


def decoding(model: Network, source: torch.Tensor) -> float:
    """Seconds of a beam search of fixed length (no symbol ends it)."""
    model.eval()
    began = time.perf_counter()
    with torch.no_grad():
        step, state = model.begin(source, 4)
        beam_search(step, state, len(source), beam_size=4, max_length=source.shape[1], alpha=0.6, end=-1)
    return time.perf_counter() - began


def main(words: list[str]) -> None:
    overrides = words or ["experiment=transformer/public"]
    torch.set_num_threads(1)
    models = {name: make(overrides, name) for name in ("transformer", "recurrent")}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    print(f"{' '.join(overrides)}: parameters {sizes}; {TOKENS} tokens a side and step, medians of {ROUNDS} turns")
    for length in LENGTHS:
        source = torch.randint(3, models["transformer"].vocab_size, (TOKENS // length, length))
        for what, measure, batch in (("training", training_step, source), ("decoding", decoding, source[:DECODED])):
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(ROUNDS):
                for name, model in models.items():
                    times[name].append(measure(model, batch))
            seconds = {name: statistics.median(values) for name, values in times.items()}
            speeds = ", ".join(f"{name} {batch.numel() / value:.0f} tokens/s" for name, value in seconds.items())
            ratio = seconds["recurrent"] / seconds["transformer"]
            print(f"length {length:3d} {what}: {speeds}; ratio transformer / recurrent {ratio:.2f}")


if __name__ == "__main__":
    benchmarks.run(__file__, main)
