"""Deformable attention's sampling on a GPU: with a gradient that adds up in a fixed order, against `grid_sample`.

One encoder layer of single-scale Deformable DETR (stride 16, 800 x 1200 pixels): forward and backward, time and peak
memory. A run is exact with the first, and CUDA refuses the second then.
    python bench/sampling.py [--write]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reprise.evidence import benchmarks
from reprise.nn.deformable import sample_bilinear, sample_by_rows

IMAGES, HEADS, CHANNELS, POINTS, SIZE = 2, 8, 32, 4, (50, 75)
REPEATS, WARM_UP = 30, 5


def cost(sample: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Milliseconds (median) and peak MiB of a forward and backward pass."""
    height, width = SIZE
    image = torch.randn(IMAGES * HEADS, CHANNELS, height, width, device="cuda", requires_grad=True)
    grid = (torch.rand(IMAGES * HEADS, height * width, POINTS, 2, device="cuda") * 2 - 1).requires_grad_()
    deterministic = sample is sample_by_rows
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UP + REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        torch.autograd.grad(sample(image, grid).square().sum(), [image, grid])
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    torch.use_deterministic_algorithms(False)
    return sorted(times[WARM_UP:])[REPEATS // 2], torch.cuda.max_memory_allocated() / 2**20


def main(_: list[str]) -> None:
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing measured")
        return
    fixed, free = cost(sample_by_rows), cost(sample_bilinear)
    print(f"torch {torch.__version__}, {IMAGES} images, {SIZE[0] * SIZE[1]} queries, {HEADS} heads, {POINTS} points")
    for name, (milliseconds, memory) in (("in a fixed order", fixed), ("grid_sample", free)):
        print(f"  {name:<17} {milliseconds:6.2f} ms  {memory:6.0f} MiB")
    print(f"  ratio of times {fixed[0] / free[0]:.2f}, of memory {fixed[1] / free[1]:.2f}")


if __name__ == "__main__":
    benchmarks.run(__file__, main)
