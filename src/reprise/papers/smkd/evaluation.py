"""The few-shot protocol: which episodes, which classifiers, which features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.errors import ConfigError
from reprise.papers.smkd.model import VisionTransformer, pooled_features
from reprise.training.episodes import (
    cosine_classifier_logits,
    episode_accuracy,
    interval,
    nearest_neighbour_logits,
    prototype_logits,
    sample_episodes,
)

CHUNK = 200  # episodes evaluated at once


@dataclass(frozen=True)
class FewShotProtocol:
    """How frozen features are evaluated on classes that were not trained on.

    Attributes:
        ways, shots: classes of an episode, and support images of each (one evaluation for each entry).
        queries: of each class; None: all that are left, as in the released code.
        episodes: number of episodes; the same ones in every run with the same split.
        classifier_episodes: how many of them the cosine classifier is trained on; 0: none.
        neighbours: of the k-nearest-neighbour classifier.
        cls, average, weighted: parts of the features, see `model.pooled_features`.
    """

    ways: int = 5
    shots: Sequence[int] = (1, 5)
    queries: int | None = 15
    episodes: int = 600
    classifier_episodes: int = 0
    neighbours: int = 5
    cls: bool = True
    average: bool = False
    weighted: bool = True

    def __post_init__(self) -> None:
        if not (self.cls or self.average or self.weighted):
            raise ConfigError("features need a part", looked_at="paper.protocol.cls, .average and .weighted")

    def features(self, backbone: VisionTransformer, image: Tensor) -> Tensor:
        """Features [B, parts * D] of images [B, C, S, S]."""
        tokens, attention = backbone.with_attention(image)
        return pooled_features(tokens, attention, cls=self.cls, average=self.average, weighted=self.weighted)

    def episodes_of(self, label: Tensor, shots: int) -> Tensor:
        """Item indices int64 [E, ways, shots + queries].

        Raises:
            ConfigError: the split has too few classes or images.
        """
        try:
            return sample_episodes(label, self.ways, shots, self.queries, self.episodes, seed=0)
        except ValueError as error:
            raise ConfigError(
                f"few-shot episodes cannot be drawn: {error}",
                looked_at="paper.protocol and the data's classes",
                next_step="lower paper.protocol.ways, shots or queries, or raise data.limit",
            ) from error

    def evaluate(self, feature: Tensor, label: Tensor) -> dict[str, float]:
        """Accuracy and 95 % half-width over episodes of each classifier, for features [N, D] and labels [N].

        Keys: accuracy_<k>shot and interval_<k>shot (prototypes), knn_<k>shot, classifier_<k>shot.
        """
        found: dict[str, float] = {}
        for shots in self.shots:
            episode = self.episodes_of(label.cpu(), shots)
            parts = episode.split(CHUNK)
            accuracy = torch.cat([episode_accuracy(prototype_logits(feature, part, shots)) for part in parts])
            found[f"accuracy_{shots}shot"], found[f"interval_{shots}shot"] = interval(accuracy)
            nearest = [nearest_neighbour_logits(feature, part, shots, self.neighbours) for part in parts]
            found[f"knn_{shots}shot"] = interval(torch.cat([episode_accuracy(logits) for logits in nearest])).mean
            if self.classifier_episodes:
                logits = cosine_classifier_logits(feature, episode[: self.classifier_episodes], shots, seed=0)
                found[f"classifier_{shots}shot"] = interval(episode_accuracy(logits)).mean
        return found
