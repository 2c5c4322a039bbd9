"""Variables of tensor2tensor checkpoints (as .npz or safetensors) under our names.

The embedding is split by rows into shards; kernels are (in, out), so they are transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprise.errors import CheckpointError
from reprise.papers.transformer.model import Transformer

State = dict[str, Tensor]
TABLE = re.compile(r"^(?P<stem>transformer/symbol_modality_\d+_\d+/(?P<name>[a-z_]+)/weights)_(?P<shard>\d+)$")
TABLES = {"shared": "embedding", "input_emb": "embedding", "target_emb": "target_embedding", "softmax": "projection"}
ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "output_transform"}
NORM = {"weight": "layer_norm_scale", "bias": "layer_norm_bias"}
FEED_FORWARD = {"0": "conv1", "3": "conv2"}
SUBLAYERS = {"attention": "self_attention", "cross_attention": "encdec_attention", "feed_forward": "ffn"}


@dataclass(frozen=True)
class Rule:
    """One of our tensors, the official variable it is, and whether that is transposed."""

    ours: str
    official: str
    transposed: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        """From one layout to the other (either way)."""
        return tensor.t().contiguous() if self.transposed else tensor


def rules(model: Transformer) -> list[Rule]:
    """How all but the embedding matrices are called."""
    return [_rule(name, _norm_folder(model)) for name in model.state_dict() if name not in TABLES.values()]


def _norm_folder(model: Transformer) -> str:
    return "layer_prepostprocess" if isinstance(model.encoder_norm, nn.LayerNorm) else "layer_postprocess"


def _rule(ours: str, norm: str) -> Rule:
    parts = ours.split(".")
    if parts[0] in ("encoder_norm", "decoder_norm"):
        stack = parts[0].removesuffix("_norm")
        return Rule(ours, f"transformer/body/{stack}/{norm}/layer_norm/{NORM[parts[-1]]}")
    if len(parts) == 1:
        raise CheckpointError(
            f"official checkpoints hold nothing for {ours}", looked_at="paper.model.transformer.positions"
        )
    stem = f"transformer/body/{parts[0]}/layer_{parts[1]}/{SUBLAYERS[parts[2].removesuffix('_residual')]}"
    if parts[2].endswith("_residual"):
        return Rule(ours, f"{stem}/{norm}/layer_norm/{NORM[parts[-1]]}")
    if parts[2] == "feed_forward":
        kernel = parts[-1] == "weight"
        return Rule(ours, f"{stem}/{FEED_FORWARD[parts[3]]}/{'kernel' if kernel else 'bias'}", kernel)
    return Rule(ours, f"{stem}/multihead_attention/{ATTENTION[parts[3]]}/kernel", True)


def import_weights(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """Our state dict of `model` from official variables.

    Raises:
        CheckpointError: variables or shapes that do not match, on either side, or a model that is no Transformer.
    """
    transformer = _transformer(model)
    tables, used = _tables(state)
    result = {name: torch.cat([state[key] for key in keys]) for name, keys in tables.items()}
    for rule in rules(transformer):
        if rule.official not in state:
            raise CheckpointError(f"the weights lack {rule.official}", looked_at=f"our {rule.ours}")
        result[rule.ours] = rule.apply(state[rule.official])
        used.add(rule.official)
    _check(result, transformer, sorted(set(state) - used))
    return result


def export_weights(tensors: Mapping[str, Tensor], model: nn.Module, like: Mapping[str, Tensor]) -> State:
    """Official names and layouts of a state dict (or of gradients under the same names).

    Args:
        like: official variables; they say how the embedding is split.
    """
    result: State = {}
    for name, keys in _tables(like)[0].items():
        if name in tensors:
            result.update(zip(keys, tensors[name].split([len(like[key]) for key in keys]), strict=True))
    for rule in rules(_transformer(model)):
        if rule.ours in tensors:
            result[rule.official] = rule.apply(tensors[rule.ours])
    return result


def _tables(state: Mapping[str, Tensor]) -> tuple[dict[str, list[str]], set[str]]:
    """The shards of each of our embedding matrices in order, and all their names."""
    shards: dict[str, list[tuple[int, str]]] = {}
    for key in state:
        found = TABLE.match(key)
        if found and found["name"] in TABLES:
            shards.setdefault(TABLES[found["name"]], []).append((int(found["shard"]), key))
    ordered = {name: [key for _, key in sorted(parts)] for name, parts in shards.items()}
    return ordered, {key for keys in ordered.values() for key in keys}


def _transformer(model: nn.Module) -> Transformer:
    if not isinstance(model, Transformer):
        raise CheckpointError(
            f"official weights are of a Transformer, not of {type(model).__name__}",
            next_step="paper.model.network=transformer",
        )
    return model


def _check(result: State, model: Transformer, left_over: list[str]) -> None:
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    lacking = sorted(wanted.keys() - result.keys())
    extra = left_over + sorted(result.keys() - wanted.keys())
    if lacking or extra:
        raise CheckpointError(
            f"the weights do not fit: lacking {lacking[:8]}, without a place {extra[:8]}",
            looked_at="layers, tied embeddings, pre_norm and positions of the model",
        )
    for name, tensor in result.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name])}")
