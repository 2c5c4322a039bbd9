"""Captioned scenes with held-out pairs: what is held out, what captions say, which caption training sees."""

from __future__ import annotations

import pytest
import torch

from reprise.data.captions import CAPTIONS, CaptionedShapes, held_out_pairs
from reprise.errors import ConfigError

SCENE = {"image_size": 32, "shapes": ["circle", "square", "star"], "colours": ["red", "green", "blue", "cyan"]}


def make(**options: object) -> CaptionedShapes:
    given = {"scene": SCENE, "sizes": [60, 20, 20], "batch_size": 8, "steps": 3, "eval_batch_size": 16, **options}
    return CaptionedShapes(**given)


@pytest.mark.parametrize(("shapes", "colours", "each"), [(6, 6, 1), (6, 6, 2), (3, 4, 1), (8, 5, 2)])
def test_held_out_pairs_leave_every_word_in_training(shapes: int, colours: int, each: int) -> None:
    for seed in range(5):
        held = held_out_pairs(shapes, colours, each, seed)
        assert (held.sum(1) == each).all()
        assert held.sum(0).max() - held.sum(0).min() <= 1
        assert (~held).any(0).all()
    with pytest.raises(ValueError, match="held out"):
        held_out_pairs(3, 4, 4, 0)


def test_training_never_shows_a_held_out_pair() -> None:
    data = make()
    assert not data.source("train").fields["unseen"].any()
    for split in ("val", "test"):
        assert data.source(split).fields["unseen"].tolist() == [True, False] * 10
    assert len(data.source("train")) == data.spec.sizes["train"] == 60


def test_captions_say_what_is_there() -> None:
    data = make()
    source = data.source("test")
    for item in range(10):
        batch = source.fetch(torch.tensor([item]))
        name = data.spec.classes[int(batch["label"])]
        for kind, row in zip(CAPTIONS, batch["captions"][0], strict=True):
            text = data.tokenizer.decode(row[1 : int((row == data.tokenizer.end_token).long().argmax())].tolist())
            assert name in text
            assert text.startswith(kind.split("{}")[0])
            picture = data.normalisation.invert(batch["image"])[0].mean(0)
            left, right = picture[:, :16].sum(), picture[:, 16:].sum()
            if abs(left - right) > 60:  # clearly on one side
                assert ("left" in text) == bool(left > right)


def test_training_draws_one_caption_for_each_step() -> None:
    data = make(batch_size=60, crop=1)
    first, second = (data.train_dataloader().batch(step) for step in (0, 1))
    assert first["text"].shape == (60, 13)
    assert "captions" not in first
    source = data.source("train")
    for batch in (first, second):
        rows = source.fields["captions"][batch["index"]]
        assert (rows == batch["text"][:, None]).all(-1).any(1).all()
    order = first["index"].argsort(), second["index"].argsort()
    assert not torch.equal(first["text"][order[0]], second["text"][order[1]])


def test_every_word_is_one_token_and_prompts_cover_the_classes() -> None:
    data = make(templates=["{}", "a {}"])
    assert data.prompts().shape == (12, 2, 13)
    assert len(data.tokenizer.encode("a picture of a small red circle in the bottom right")) == 11


@pytest.mark.parametrize(
    "options",
    [{"held_out": 0}, {"held_out": 4}, {"templates": ["a thing"]}, {"context_length": 2}, {"sizes": [5, 5]}],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make(**options)
