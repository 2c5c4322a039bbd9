"""Speed of the data layer against the usual ways, measured alternately in one process.

python bench/data.py [--write]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from reprise.data import augment
from reprise.data.loader import StepLoader, TensorSource
from reprise.data.shapes import SceneOptions, draw_scenes, render
from reprise.evidence import benchmarks
from reprise.seeding import generator


def alternately(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Median milliseconds of both, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    ours()
    theirs()
    for _ in range(rounds):
        for kept, work in zip(times, (ours, theirs), strict=True):
            start = time.perf_counter()
            work()
            kept.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def report(what: str, ours: float, theirs: float) -> None:
    print(f"{what:<58} {ours:9.2f} ms {theirs:9.2f} ms   ratio {ours / theirs:.2f}")


def shapes() -> None:
    start = time.process_time()
    options = SceneOptions()
    render(options, draw_scenes(options, 5000, 0))
    print(f"5,000 scenes of 64x64 drawn and rendered: {time.process_time() - start:.2f} s of one core")


def augmentation() -> None:
    image = torch.rand(128, 3, 32, 32)
    batched = augment.Compose([augment.RandomCrop(4), augment.RandomHorizontalFlip(), augment.Cutout(8)])
    each = v2.Compose(
        [v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), v2.RandomErasing(1.0, (1 / 16, 1 / 16), (1, 1))]
    )
    ours, theirs = alternately(
        lambda: batched.apply({"image": image}, batched.draw(128, generator(0, "bench"))),
        lambda: torch.stack([each(item) for item in image]),
    )
    report("crop, flip, cutout of 128 images: batched / torchvision", ours, theirs)


def loading() -> None:
    images, labels = torch.rand(10_000, 3, 32, 32), torch.randint(10, (10_000,))
    stepped = StepLoader(TensorSource(image=images, label=labels), 128, 78, seed=0)
    usual = DataLoader(TensorDataset(images, labels), 128, shuffle=True, drop_last=True)
    ours, theirs = alternately(lambda: sum(1 for _ in stepped), lambda: sum(1 for _ in usual), rounds=7)
    report("78 batches of 128 from memory: StepLoader / DataLoader", ours, theirs)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread; ours, theirs (median)")
    shapes()
    augmentation()
    loading()


if __name__ == "__main__":
    benchmarks.run(__file__, main)
