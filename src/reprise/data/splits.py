"""Which items go where: stratified orders and subsets, label noise, long-tailed frequencies. All pure in their seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reprise.seeding import derive

IntArray = npt.NDArray[np.int64]


def stratified_order(labels: npt.ArrayLike, seed: int, *purpose: object) -> IntArray:
    """An order of all items in which every contiguous part holds the classes in nearly their overall proportions.

    Item i of a class of n items is placed at (i + u) / n with one random u per class, and the places are sorted; so
    the count of a class in any part differs from its fair share by less than one, whichever way the order is cut.

    Args:
        labels: integer labels [N].

    Returns:
        Indices int64 [N].
    """
    label = np.asarray(labels)
    rng = np.random.default_rng(derive(seed, "stratified", *purpose))
    place = np.empty(len(label))
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def stratified_parts(labels: npt.ArrayLike, sizes: list[int], seed: int, *purpose: object) -> list[IntArray]:
    """Disjoint stratified parts of the given sizes, each in stratified order (its beginning is stratified, too).

    Raises:
        ValueError: the sizes are negative or sum to more than there are items.
    """
    order = stratified_order(labels, seed, *purpose)
    if min(sizes) < 0 or sum(sizes) > len(order):
        raise ValueError(f"parts of {sizes} items cannot be taken from {len(order)}")
    borders = np.cumsum([0, *sizes])
    return [order[first:last] for first, last in pairwise(borders)]


def noisy_labels(labels: npt.ArrayLike, fraction: float, num_classes: int, seed: int) -> IntArray:
    """A copy in which round(fraction * N) labels are replaced by a uniformly chosen WRONG class (symmetric noise).

    Raises:
        ValueError: the fraction is outside [0, 1], or there is only one class to choose from.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"label_noise is a fraction in [0, 1], not {fraction}")
    noisy = np.array(labels, dtype=np.int64)
    count = round(fraction * len(noisy))
    if count and num_classes < 2:
        raise ValueError("label noise needs at least two classes")
    rng = np.random.default_rng(derive(seed, "label_noise"))
    chosen = rng.permutation(len(noisy))[:count]
    if count:
        noisy[chosen] = (noisy[chosen] + rng.integers(1, num_classes, count)) % num_classes
    return noisy


def long_tail(num_classes: int, imbalance: float) -> npt.NDArray[np.float64]:
    """Class probabilities that fall exponentially; the first class is `imbalance` times as frequent as the last.

    Raises:
        ValueError: imbalance is below 1.
    """
    if imbalance < 1:
        raise ValueError(f"imbalance is the ratio of the most to the least frequent class, at least 1, not {imbalance}")
    weight = imbalance ** (-np.arange(num_classes) / max(num_classes - 1, 1))
    return weight / weight.sum()


def limited(sizes: dict[str, int], limit: int | None) -> dict[str, int]:
    """Split sizes when at most `limit` items of each are used."""
    return sizes if limit is None else {split: min(size, limit) for split, size in sizes.items()}
