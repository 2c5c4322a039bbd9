"""The losses: symmetric contrast within the batch (figure 3), and its rivals of figure 2, words and captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("symmetric", "image_to_text", "text_to_image")


def contrastive_loss(
    logits_per_image: Tensor,
    logits_per_text: Tensor,
    target: Tensor,
    *,
    direction: str = "symmetric",
) -> Tensor:
    """Mean cross-entropy of finding each image's text among all texts, and each text's image among all images.

    Args:
        logits_per_image: [B, N], this process's images against the texts of the global batch.
        logits_per_text: [B, N], its texts against the images of the global batch.
        target: int64 [B] (the column of the partner, figure 3) or probabilities [B, N] (several right answers).
        direction: "symmetric" (the mean of both), "image_to_text" or "text_to_image".

    Raises:
        ValueError: an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; one of {', '.join(DIRECTIONS)}")
    losses = []
    if direction != "text_to_image":
        losses.append(F.cross_entropy(logits_per_image, target))
    if direction != "image_to_text":
        losses.append(F.cross_entropy(logits_per_text, target))
    return torch.stack(losses).mean()


def same_caption_target(mine: Tensor, everyone: Tensor) -> Tensor:
    """[B, N] probabilities, even over the rows of `everyone` int64 [N, L] that equal a row of `mine` int64 [B, L].

    With few distinct captions a batch holds some of them twice, and the plain target calls the second one wrong.
    """
    same = (mine[:, None] == everyone[None]).all(-1).float()
    return same / same.sum(1, keepdim=True)


def bag_of_words_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Softmax cross-entropy with the caption's words as an even distribution (Joulin et al. 2016; section 2.3).

    Args:
        logits: [B, V].
        words: bool [B, V], the words of each caption. Captions without words do not count.
    """
    share = words.float() / words.sum(1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(-1)).sum(1).mean()


def caption_log_prob(logits: Tensor, text: Tensor, end_token: int) -> Tensor:
    """Mean log-probability of each caption's tokens after the first, up to and with its end token, [B].

    Args:
        logits: [B, L, V]; position i predicts token i + 1.
        text: int64 [B, L], starting with the start token, zero padded behind the end token.
    """
    following = text[:, 1:]
    log_prob = logits[:, :-1].log_softmax(-1).gather(-1, following[..., None])[..., 0]
    ended = (following == end_token).long().cumsum(1) - (following == end_token).long()  # end tokens before this one
    counted = (ended == 0).float()
    return (log_prob * counted).sum(1) / counted.sum(1)


def classifier_weights(prompt_features: Tensor) -> Tensor:
    """Zero-shot classifier from prompt embeddings [C, T, E] of C classes in T templates: [E, C] (section 3.1.4).

    Each embedding is normalised, they are averaged over the templates, and the mean is normalised again.
    """
    unit = prompt_features / prompt_features.norm(dim=-1, keepdim=True)
    mean = unit.mean(1)
    return (mean / mean.norm(dim=-1, keepdim=True)).T
