"""Seeds that are pure functions of what they are for, so that nothing has to remember a position in a stream."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "augment", step)`; equal arguments give equal seeds."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def seed_all(seed: int, *purpose: object) -> None:
    """Seed Python, NumPy and torch (the CPU and every device in use) for one purpose.

    `torch.manual_seed` would also queue a call, with a formatted traceback, for each kind of device that is not in use:
    a millisecond a step, and a queue that grows with the run.
    """
    value = derive(seed, *purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            backend.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
