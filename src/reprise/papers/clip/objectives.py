"""What the image tower learns from captions: contrast (CLIP), or the rivals of figure 2 with the same tower.

Each objective gives a training loss, and scores of images against prompts, from which zero-shot classification and
retrieval follow. Shapes: N images, C classes in T templates of L tokens, E embedding, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from reprise.distributed import gather, gather_with_gradient, rank
from reprise.papers.clip.criterion import (
    DIRECTIONS,
    bag_of_words_loss,
    caption_log_prob,
    classifier_weights,
    contrastive_loss,
    same_caption_target,
)
from reprise.papers.clip.model import CLIP
from reprise.papers.clip.transformer import unit

POSITIVES = ("partner", "same_caption")
SCORE_ROWS = 4096  # sequences that captioning scores at once


class Objective(nn.Module):
    """A loss over a batch of pairs, and scores of images against prompts.

    Attributes:
        retrieves: whether scoring every image against every caption is affordable.
    """

    retrieves = True

    def prepare(self, model: CLIP) -> None:
        """Build what is needed beside the model, and freeze what is not trained (DDP wants all to have gradients)."""

    @abstractmethod
    def loss(self, model: CLIP, image: Tensor, text: Tensor) -> Tensor:
        """Mean over this process's pairs of images [B, 3, R, R] and token ids [B, L]."""

    @abstractmethod
    def scores(self, model: CLIP, embedding: Tensor, prompts: Tensor) -> Tensor:
        """[N, C], larger for likelier classes.

        Args:
            embedding: image embeddings [N, E] as the tower gives them.
            prompts: token ids [C, T, L].
        """


class Contrastive(Objective):
    """CLIP: each image against all texts of the GLOBAL batch, and each text against all images.

    Each rank computes its own rows against everybody's features, through which gradients flow back to their ranks.

    Args:
        direction: "symmetric", "image_to_text" or "text_to_image".
        positives: "partner" (figure 3), or "same_caption": every pair whose caption is the same.

    Raises:
        ValueError: an unknown choice.
    """

    def __init__(self, direction: str = "symmetric", positives: str = "partner") -> None:
        super().__init__()
        if direction not in DIRECTIONS or positives not in POSITIVES:
            raise ValueError(f"{direction!r}, {positives!r}: directions are {DIRECTIONS}, positives {POSITIVES}")
        self.direction, self.positives = direction, positives

    def loss(self, model: CLIP, image: Tensor, text: Tensor) -> Tensor:
        image_features, text_features = model(image, text)
        scale = model.logit_scale.exp()
        per_image = scale * image_features @ gather_with_gradient(text_features).T
        per_text = scale * text_features @ gather_with_gradient(image_features).T
        if self.positives == "same_caption":
            target = same_caption_target(text, gather(text))
        else:
            target = torch.arange(len(image), device=image.device) + rank() * len(image)
        return contrastive_loss(per_image, per_text, target, direction=self.direction)

    def scores(self, model: CLIP, embedding: Tensor, prompts: Tensor) -> Tensor:
        weights = classifier_weights(model.text(prompts.flatten(0, 1)).unflatten(0, prompts.shape[:2]))
        return unit(embedding) @ weights


class BagOfWords(Objective):
    """Predict which words the caption has, in no order (Joulin et al. 2016); prompts' words score classes."""

    head: nn.Linear

    def prepare(self, model: CLIP) -> None:
        self.head = nn.Linear(model.embed_dim, model.text.vocab_size)
        model.text.requires_grad_(False)
        model.logit_scale.requires_grad_(False)

    def words(self, text: Tensor) -> Tensor:
        """bool [..., V]: the ids of texts [..., L] without padding, start and end."""
        present = torch.zeros(*text.shape[:-1], self.head.out_features, dtype=torch.bool, device=text.device)
        present.scatter_(-1, text, torch.ones_like(text, dtype=torch.bool))
        present[..., 0] = False
        present[..., -2:] = False
        return present

    def loss(self, model: CLIP, image: Tensor, text: Tensor) -> Tensor:
        return bag_of_words_loss(self.head(model.visual(image)), self.words(text))

    def scores(self, model: CLIP, embedding: Tensor, prompts: Tensor) -> Tensor:
        words = self.words(prompts).float()
        share = (words / words.sum(-1, keepdim=True).clamp(min=1)).mean(1)
        return self.head(embedding).log_softmax(-1) @ share.T


class Captioning(Objective):
    """Predict the caption word by word: the text tower as a language model that begins with the image embedding."""

    retrieves = False

    prefix: nn.Linear

    def prepare(self, model: CLIP) -> None:
        self.prefix = nn.Linear(model.embed_dim, model.text.transformer.width)
        model.text.text_projection.requires_grad_(False)
        model.logit_scale.requires_grad_(False)

    def log_prob(self, model: CLIP, embedding: Tensor, text: Tensor) -> Tensor:
        """Mean log-probability of each text [B, L] given its image embedding [B, E], [B]."""
        words = model.text.token_embedding(text)
        begun = torch.cat([words[:, :1] + self.prefix(embedding)[:, None], words[:, 1:]], dim=1)
        logits = model.text.hidden(begun) @ model.text.token_embedding.weight.T
        return caption_log_prob(logits, text, model.text.vocab_size - 1)

    def loss(self, model: CLIP, image: Tensor, text: Tensor) -> Tensor:
        return -self.log_prob(model, model.visual(image), text).mean()

    def scores(self, model: CLIP, embedding: Tensor, prompts: Tensor) -> Tensor:
        texts = prompts.flatten(0, 1)
        rows = []
        for part in embedding.split(max(SCORE_ROWS // len(texts), 1)):
            paired = self.log_prob(model, part.repeat_interleave(len(texts), 0), texts.repeat(len(part), 1))
            rows.append(paired.view(len(part), *prompts.shape[:2]).mean(2))
        return torch.cat(rows)


def objective(name: str, *, direction: str = "symmetric", positives: str = "partner") -> Objective:
    """An objective by name: "contrastive", "bag_of_words" or "captioning".

    Raises:
        ValueError: there is none of this name.
    """
    if name == "contrastive":
        return Contrastive(direction, positives)
    if name == "bag_of_words":
        return BagOfWords()
    if name == "captioning":
        return Captioning()
    raise ValueError(f"unknown objective {name!r}; one of contrastive, bag_of_words, captioning")
