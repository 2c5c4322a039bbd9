"""ViT's official files: keys there and back, files of every age, loading for fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.papers.vit_models import perturbed, tiny
from torch import Tensor

from reprise.errors import CheckpointError
from reprise.papers.vit.cnn import ConvNet
from reprise.papers.vit.model import VisionTransformer
from reprise.papers.vit.positions import resize_positions
from reprise.papers.vit.weights import (
    POSITION_KEY,
    adapt_for_fine_tuning,
    export_weights,
    import_weights,
)
from reprise.training.weights import read_weights


def hybrid(**changes: object) -> VisionTransformer:
    return tiny(**({"image_shape": (3, 16, 24), "patch": 1, "stem_layers": [1, 2], "stem_width_factor": 0.5} | changes))


@pytest.mark.parametrize(
    "build",
    [tiny, lambda: tiny(classifier="gap"), lambda: tiny(representation_size=7), hybrid],
    ids=["token", "gap", "pre_logits", "hybrid"],
)
def test_official_keys_there_and_back(build: object) -> None:
    assert callable(build)
    model = perturbed(build())
    official = export_weights(model.state_dict(), model)
    again = import_weights(official, build())
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    kernel = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/{}/kernel"
    assert official[kernel.format("key")].shape == (16, 2, 8)
    assert official[kernel.format("out")].shape == (2, 8, 16)


def test_hybrid_reduces_like_tensorflows_same_padding() -> None:
    model = hybrid(image_shape=(3, 17, 23))
    assert model.grid == (3, 3)
    assert model(torch.randn(1, 3, 17, 23)).shape == (1, 5)
    official = export_weights(model.state_dict(), model)
    assert {"block2/unit1/conv_proj/kernel", "block2/unit2/gn3/scale", "gn_root/bias"} <= official.keys()
    squeezed = {name: value[None, None, None] if "/gn" in name else value for name, value in official.items()}
    assert import_weights(squeezed, model).keys() == model.state_dict().keys()


def old_names(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as a big_vision file holds them."""
    renamed = {}
    for name, value in official.items():
        for theirs, first in (
            ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
            ("LayerNorm_1", "LayerNorm_2"),
            ("MlpBlock_0", "MlpBlock_3"),
        ):
            name = name.replace(first, theirs)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("style", ["opt", "params", "big_vision", "stacked"])
def test_files_of_every_age(style: str, tmp_path: Path) -> None:
    model = perturbed(tiny())
    official = export_weights(model.state_dict(), model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    if style == "opt":
        stored = {f"opt/target/{name}": value for name, value in official.items()} | {"opt/state/step": torch.ones(1)}
    elif style == "params":
        stored = {f"params/{name}": value for name, value in official.items()}
    else:
        stored = old_names(official)
        stored["pos_embedding"] = stored.pop(POSITION_KEY)[:, 1:]
        expected["positions.table"][:, 0] = 0
        if style == "stacked":
            for name in [name for name in stored if "encoderblock_0" in name]:
                other = stored.pop(name.replace("block_0", "block_1"))
                stored[name.replace("block_0", "block")] = torch.stack([stored.pop(name), other])
        stored = {f"params/img/{name}": value for name, value in stored.items()} | {"params/txt/head": torch.ones(2)}
    np.savez(tmp_path / "weights.npz", **{name: value.numpy() for name, value in stored.items()})
    loaded = import_weights(read_weights(tmp_path / "weights.npz"), tiny())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_bfloat16_arrays_are_read(tmp_path: Path) -> None:
    value = torch.randn(5).bfloat16()
    raw = value.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "half.npz", x=raw)
    assert torch.equal(read_weights(tmp_path / "half.npz")["x"], value.float())


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    model = tiny()
    official = export_weights(model.state_dict(), model)
    with pytest.raises(CheckpointError, match="lack cls"):
        import_weights({name: value for name, value in official.items() if name != "cls"}, model)
    with pytest.raises(CheckpointError, match="no place in this model: pre_logits/bias"):
        import_weights(official | {"pre_logits/bias": torch.zeros(3)}, model)
    with pytest.raises(CheckpointError, match="does not fit"):
        import_weights(official, tiny(num_classes=6))
    with pytest.raises(CheckpointError, match="no place"):
        import_weights(official, tiny(positions="sin_cos"))
    with pytest.raises(CheckpointError, match="ConvNet"):
        import_weights(official, ConvNet(image_shape=(3, 8, 8), num_classes=2, widths=(4,)))
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name in ("text.npz", "objects.npz", "absent.npz", "absent.safetensors"):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / name)


def test_fine_tuning_drops_the_head_and_resizes_only_patch_positions() -> None:
    source = perturbed(tiny(image_shape=(3, 12, 12), representation_size=7, num_classes=9))
    official = export_weights(source.state_dict(), source)
    target = tiny(image_shape=(3, 16, 20))
    loaded = import_weights(adapt_for_fine_tuning(official, target), target)
    assert not loaded["head.weight"].any()
    assert loaded["head.weight"].shape == (5, 16)
    assert torch.equal(loaded["positions.table"][:, 0], official[POSITION_KEY][:, 0])
    assert loaded["positions.table"].shape == (1, 4 * 5 + 1, 16)
    kept = tiny(image_shape=(3, 12, 12), representation_size=7)
    assert "pre_logits/kernel" in adapt_for_fine_tuning(official, kept)


def test_the_release_takes_a_square_number_of_patches_for_a_square_grid() -> None:
    source = perturbed(tiny(image_shape=(3, 12, 12)))
    official, table = export_weights(source.state_dict(), source), source.positions.table
    target = tiny(image_shape=(3, 8, 32))
    for as_released, grid in ((False, (2, 8)), (True, (4, 4))):
        adapted = adapt_for_fine_tuning(official, target, as_released=as_released)
        expected = resize_positions(table, (3, 3), grid, class_token=True)
        torch.testing.assert_close(adapted[POSITION_KEY], expected)
