"""Every paper with official weights takes whole checkpoints as it takes the state dict in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reprise import discovery
from reprise.training.weights import STATE_KEYS, read_weights
from tests.checkpoints import assert_equal, import_command, recipe_model, save_checkpoint

WITH_WEIGHTS = [slug for slug in discovery.papers() if discovery.has_module(slug, "weights")]


@pytest.mark.parametrize("slug", WITH_WEIGHTS)
def test_a_whole_checkpoint_is_imported_like_its_state(slug: str, tmp_path: Path) -> None:
    """Also where the paper refuses the state, since its official names are not ours: both end alike."""
    own_keys: tuple[str, ...] = getattr(discovery.module(slug, "weights"), "STATE_KEYS", ())
    model = recipe_model(f"{slug}/small")
    state: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "state.pth")
    code, target = import_command(f"{slug}/small", tmp_path / "state.pth")
    for number, key in enumerate((*own_keys, *STATE_KEYS)):
        wrapped = {f"module.{name}" if number % 2 else name: value for name, value in state.items()}
        whole = save_checkpoint(tmp_path / f"{key}.pth.tar", model, **{key: wrapped})
        assert_equal(read_weights(whole, own_keys), state)
        whole_code, whole_target = import_command(f"{slug}/small", whole)
        assert whole_code == code
        if code == 0:
            assert_equal(load_file(whole_target), load_file(target))
