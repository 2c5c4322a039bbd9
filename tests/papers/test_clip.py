"""CLIP: towers, losses, objectives, weights; formulas against slow independent ones, and the traps of the card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.checkpoints import assert_equal, imported, recipe_model, save_checkpoint
from torch import Tensor, nn

from reprise.errors import CheckpointError, ConfigError
from reprise.papers.clip import evaluation, objectives
from reprise.papers.clip.criterion import (
    bag_of_words_loss,
    caption_log_prob,
    classifier_weights,
    contrastive_loss,
    same_caption_target,
)
from reprise.papers.clip.model import CLIP, VARIANTS, clip
from reprise.papers.clip.resnet import Bottleneck
from reprise.papers.clip.transformer import end_positions, quick_gelu, unit
from reprise.papers.clip.weights import import_weights, sizes_of
from reprise.training.probes import Features
from reprise.training.weights import read_weights

SIZES = {
    "embed_dim": 12,
    "image_size": 32,
    "vision_layers": 2,
    "vision_width": 16,
    "vision_patch_size": 8,
    "vision_heads": 2,
    "text_width": 24,
    "text_layers": 2,
    "text_heads": 3,
    "context_length": 9,
    "vocab_size": 40,
}
START, END = 38, 39


def small(**changes: Any) -> CLIP:
    return clip(**{**SIZES, **changes})


def texts(count: int, words: int = 4) -> Tensor:
    rows = torch.zeros(count, 9, dtype=torch.int64)
    rows[:, 0], rows[:, words + 1] = START, END
    rows[:, 1 : words + 1] = torch.randint(1, START, (count, words))
    return rows


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as a released file has it."""
    renamed = {key.removeprefix("text."): value.half() for key, value in state.items()}
    return renamed | {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}


# ------------------------------------------------------------------ towers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("RN50", 102007137), ("RN50x4", 178300601), ("ViT-B/32", 151277313), ("ViT-L/14@336px", 427944193)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in clip(name).parameters()) == parameters


@pytest.mark.parametrize("layers", [2, [1, 1, 1], [1, 2]])
def test_any_tower_embeds(layers: object) -> None:
    patch = None if isinstance(layers, list) else 8
    model = small(vision_layers=layers, vision_patch_size=patch).eval()
    image_features, text_features = model(torch.randn(3, 3, 32, 32), texts(3))
    assert image_features.shape == text_features.shape == (3, 12)
    assert torch.allclose(image_features.norm(dim=1), torch.ones(3), atol=1e-5)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant"):
        clip("ViT-Z/9")
    with pytest.raises(ValueError, match="needed"):
        clip(embed_dim=3)
    with pytest.raises(ValueError, match="unknown sizes"):
        clip("RN50", depth=3)
    with pytest.raises(ValueError, match="smaller than a patch"):
        small(vision_patch_size=33)
    with pytest.raises(ValueError, match="no patches"):
        small(vision_layers=[1, 1])
    with pytest.raises(ValueError, match="total stride"):
        small(vision_layers=[1, 1, 1], vision_patch_size=None, image_size=31)


def test_quick_gelu_is_not_gelu() -> None:
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 0.01


def test_text_sees_no_later_token_and_no_padding() -> None:
    model = small().eval()
    text = texts(2)
    padded = text.clone()
    padded[:, 6:] = 7
    assert torch.allclose(model.text(text), model.text(padded), atol=1e-6)


def test_the_end_token_is_explicit() -> None:
    text = torch.tensor([[1, 9, 3, 2, 0], [1, 4, 2, 0, 0]])  # a vocabulary whose end token is 2
    assert end_positions(text, 2).tolist() == [3, 2]
    assert end_positions(text, None).tolist() == [1, 1]  # the released rule reads a word instead


def test_initialisation() -> None:
    model = clip("ViT-B/32", text_layers=3, vision_layers=1)
    block = model.text.transformer.resblocks[1]
    assert block.attn.in_proj_weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert block.attn.out_proj.weight.std().item() == pytest.approx(512**-0.5 * 6**-0.5, rel=0.02)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert model.text.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.text.positional_embedding.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    resnet = small(vision_layers=[1, 1, 1], vision_patch_size=None).visual
    assert all(not m.bn3.weight.any() for m in resnet.modules() if isinstance(m, Bottleneck))


# ------------------------------------------------------------------ losses


def test_contrastive_loss_is_the_mean_of_both_directions() -> None:
    logits = torch.randn(5, 5)
    rows = -torch.stack([logits[i].log_softmax(0)[i] for i in range(5)]).mean()
    columns = -torch.stack([logits[:, i].log_softmax(0)[i] for i in range(5)]).mean()
    target = torch.arange(5)
    assert torch.allclose(contrastive_loss(logits, logits.T, target), (rows + columns) / 2)
    assert torch.allclose(contrastive_loss(logits, logits.T, target, direction="image_to_text"), rows)
    assert torch.allclose(contrastive_loss(logits, logits.T, target, direction="text_to_image"), columns)
    with pytest.raises(ValueError, match="direction"):
        contrastive_loss(logits, logits.T, target, direction="both")


def test_equal_captions_are_right_answers() -> None:
    text = torch.tensor([[1, 2], [3, 4], [1, 2]])
    assert same_caption_target(text[:2], text).tolist() == [[0.5, 0, 0.5], [0, 1, 0]]
    perfect = torch.tensor([[50.0, 0, 50], [0, 50, 0], [50, 0, 50]])
    soft = contrastive_loss(perfect, perfect.T, same_caption_target(text, text))
    assert soft.item() == pytest.approx(math.log(2) * 2 / 3, abs=1e-4)


def test_the_loss_starts_at_about_ln_n() -> None:
    objective = objectives.Contrastive()
    loss = objective.loss(small(temperature=1.0), torch.randn(64, 3, 32, 32), texts(64))
    assert loss.item() == pytest.approx(math.log(64), abs=0.1)


def test_bag_of_words_loss() -> None:
    logits, words = torch.randn(2, 6), torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    log_prob = logits.log_softmax(1)
    expected = -((log_prob[0, 0] + log_prob[0, 2]) / 2 + log_prob[1, 1]) / 2
    assert torch.allclose(bag_of_words_loss(logits, words), expected)


def test_caption_log_prob_stops_at_the_end_token() -> None:
    text, logits = texts(2), torch.randn(2, 9, 40)
    expected = [
        torch.stack([logits[row, i].log_softmax(0)[text[row, i + 1]] for i in range(5)]).mean() for row in range(2)
    ]
    assert torch.allclose(caption_log_prob(logits, text, END), torch.stack(expected))


def test_classifier_normalises_averages_and_normalises() -> None:
    features = torch.randn(3, 4, 8)
    mean = torch.stack([unit(features[c]).mean(0) for c in range(3)])
    assert torch.allclose(classifier_weights(features), unit(mean).T)
    assert not torch.allclose(classifier_weights(features), unit(features.mean(1)).T, atol=1e-3)


# ------------------------------------------------------------------ objectives


@pytest.mark.parametrize("name", ["contrastive", "queued_contrastive", "bag_of_words", "captioning"])
def test_objectives_learn_and_score(name: str) -> None:
    model, objective = small(), objectives.objective(name, queue_size=12, momentum=0.5)
    objective.prepare(model)
    trained = [p for p in [*model.parameters(), *objective.parameters()] if p.requires_grad]
    image, text = torch.randn(6, 3, 32, 32), texts(6)
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective.loss(model, image, text)
        loss.backward()
        assert all(p.grad is not None for p in trained), "DDP wants a gradient for every trained parameter"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    scores = objective.scores(model, model.visual(image), text[:, None])
    assert scores.shape == (6, 6)
    assert (scores.argmax(1) == torch.arange(6)).float().mean() > 0.5


def test_the_queue_adds_earlier_batches_as_wrong_answers() -> None:
    torch.manual_seed(0)
    model, objective = small(), objectives.QueuedContrastive(queue_size=6, momentum=0.75)
    objective.prepare(model)
    kept = model.text.text_projection.detach().clone()
    with torch.no_grad():
        model.text.text_projection.add_(1.0)
    first, second = ((torch.randn(3, 3, 32, 32), texts(3)) for _ in range(2))
    objective.loss(model, *first)
    assert torch.allclose(objective.encoders.text.text_projection, kept + 0.25)
    old_images, old_texts = (keys.detach() for keys in objective.encoders(*first))
    assert torch.allclose(objective.images.keys[:, :3].T, old_images, atol=1e-6)
    assert torch.allclose(objective.texts.keys[:, :3].T, old_texts, atol=1e-6)
    random_images, random_texts = objective.images.keys[:, 3:].T.clone(), objective.texts.keys[:, 3:].T.clone()

    loss = objective.loss(model, *second)
    image, text = model(*second)
    images, sentences = (keys.detach() for keys in objective.encoders(*second))
    scale, target = model.logit_scale.exp(), torch.arange(3)
    per_image = scale * image @ torch.cat([sentences, old_texts, random_texts]).T
    per_text = scale * text @ torch.cat([images, old_images, random_images]).T
    assert torch.allclose(loss, (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    buffers = {"images.keys", "images.position", "texts.keys", "texts.position"}
    assert buffers < objective.state_dict().keys()  # all that training needs is in a checkpoint
    with pytest.raises(ConfigError, match="6 is not a multiple of a batch of 4"):
        objective.loss(model, torch.randn(4, 3, 32, 32), texts(4))


def test_the_momentum_encoders_follow_weights_that_are_loaded() -> None:
    model, objective = small(), objectives.QueuedContrastive(queue_size=6)
    objective.prepare(model)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    objective.restart(model)
    assert objective.encoders.logit_scale.item() == 1.5


def test_unknown_choices_are_refused() -> None:
    for wrong in (("masked",), ("contrastive", "both"), ("contrastive", "symmetric", "none")):
        with pytest.raises(ValueError, match="'"):
            objectives.objective(wrong[0], **dict(zip(("direction", "positives"), wrong[1:], strict=False)))
    for options in ({"positives": "same_caption"}, {"queue_size": 0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="queue"):
            objectives.objective("queued_contrastive", **options)


def test_words_leave_out_padding_and_special_tokens() -> None:
    objective = objectives.BagOfWords()
    objective.prepare(small())
    assert objective.words(torch.tensor([START, 5, 7, 5, END, 0])).nonzero().flatten().tolist() == [5, 7]


# ------------------------------------------------------------------ evaluation


def test_recall_counts_any_relevant_column() -> None:
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [3, 1, 2]])
    relevant = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert evaluation.recall_at(scores, relevant, 1) == 0.5
    assert evaluation.recall_at(scores, relevant, 2) == 1.0
    assert evaluation.recall_at(scores, relevant, 9) == 1.0


def test_distinct_texts() -> None:
    captions = torch.tensor([[1, 2], [3, 4], [1, 2]])
    found, has = evaluation.distinct_texts(captions)
    assert torch.equal(found[has.long().argmax(1)], captions)
    assert has.sum(1).tolist() == [1, 1, 1]


def test_gathering_keeps_order_in_one_process() -> None:
    rows = torch.arange(5)[:, None]
    assert torch.equal(evaluation.gather_interleaved(rows, 5), rows)


def test_probe_learns_separable_features() -> None:
    label = torch.arange(40) % 4
    features = F.one_hot(label, 4).float() + 0.05 * torch.randn(40, 4)
    data = Features(features, label)
    assert evaluation.probe_accuracy(data, data, 4, 2) > 0.9


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("changes", [{}, {"vision_layers": [1, 2, 1], "vision_patch_size": None, "vision_heads": 4}])
def test_official_weights_are_imported(changes: dict[str, object]) -> None:
    model, other = small(**changes), small(**changes)
    state = official(model.state_dict())
    other.load_state_dict(import_weights(state, other))
    assert all(value.dtype != torch.float16 for value in other.state_dict().values())
    image, text = torch.randn(2, 3, 32, 32), texts(2)
    assert torch.allclose(model.eval().logits(image, text), other.eval().logits(image, text), atol=2e-2)
    told = sizes_of(state)
    assert {**SIZES, **changes} | told == {**SIZES, **changes}


def test_whole_checkpoints_of_residual_networks_are_imported(tmp_path: Path) -> None:
    """As open_clip saves them; the counters of batch norm may be missing."""
    model = recipe_model("clip/small")
    wanted = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    names = {f"module.{key.removeprefix('text.')}": value for key, value in wanted.items()}
    whole = save_checkpoint(tmp_path / "epoch_1.pt", model, state_dict=names)
    assert_equal(imported("clip/small", whole), model.state_dict())


def test_left_over_keys_are_refused() -> None:
    model = small()
    state = official(model.state_dict())
    with pytest.raises(CheckpointError, match="lacks keys"):
        import_weights({key: value for key, value in state.items() if key != "ln_final.bias"}, model)
    with pytest.raises(CheckpointError, match="has keys that the model lacks"):
        import_weights({**state, "visual.extra": torch.zeros(1)}, model)
    with pytest.raises(CheckpointError, match="shapes differ"):
        import_weights(official(small(embed_dim=10).state_dict()), model)
    with pytest.raises(CheckpointError, match="lacks keys"):
        import_weights({}, model)


class Archived(nn.Module):
    """Stands for a released archive: half precision, a constant that is no weight, a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4).half()
        self.norm = nn.BatchNorm1d(3)
        self.mask = torch.ones(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale + self.mask.sum()


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_read_without_running_it(tmp_path: Path) -> None:
    traced = torch.jit.trace(Archived(), torch.randn(2, 3))
    traced.save(str(tmp_path / "model.pt"))
    found, wanted = read_weights(tmp_path / "model.pt"), traced.state_dict()
    assert found.keys() == wanted.keys()
    assert "mask" not in found
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def test_every_variant_has_a_name_and_sizes() -> None:
    assert len(VARIANTS) == 9
