"""Official checkpoints (flat .npz, keys with '/', kernels in x out) to and from our parameters.

Also read: the prefixes under which files of different ages keep the model, big_vision's names of the sub-layers, its
position embedding outside the transformer, and files whose layers are stacked along a leading axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprise.errors import CheckpointError
from reprise.papers.vit.model import VisionTransformer
from reprise.papers.vit.positions import Grid, LearnedPositions1d, resize_positions, square_grid

State = dict[str, Tensor]
POSITION_KEY = "Transformer/posembed_input/pos_embedding"
PREFIXES = ("opt/target/", "params/img/", "params/", "target/")
BIG_VISION_NAMES = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


@dataclass(frozen=True)
class Rule:
    """One of our tensors, the official ones it is made of, and both directions."""

    ours: str
    official: tuple[str, ...]
    load: Callable[[Sequence[Tensor]], Tensor]
    save: Callable[[Tensor], Sequence[Tensor]]


def import_weights(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """Our state dict of `model` from official keys.

    Raises:
        CheckpointError: keys or shapes that do not match, on either side, or a model that is not a ViT.
    """
    vit = _vision_transformer(model)
    official = canonical(state, vit)
    used: set[str] = set()
    result: State = {}
    for rule in rules(vit):
        missing = [name for name in rule.official if name not in official]
        if missing:
            raise CheckpointError(f"the weights lack {', '.join(missing)}", looked_at=f"our {rule.ours}")
        result[rule.ours] = _load(rule, official, vit.get_parameter(rule.ours).shape)
        used.update(rule.official)
    left_over = sorted(official.keys() - used)
    if left_over:
        raise CheckpointError(
            f"{len(left_over)} keys have no place in this model: {', '.join(left_over[:8])}",
            looked_at=f"positions, classifier, pre_logits and depth of {type(vit).__name__}",
            next_step="build the model that the file was made with, or load it for fine-tuning (paper.pretrained)",
        )
    lacking = sorted(vit.state_dict().keys() - result.keys())
    if lacking:
        raise CheckpointError(
            f"official files hold nothing for {', '.join(lacking)}", looked_at="paper.model.vit.positions"
        )
    return result


def export_weights(tensors: Mapping[str, Tensor], model: nn.Module) -> State:
    """Official keys and layouts of a state dict, or of gradients under the same names; absent entries are left out."""
    result: State = {}
    for rule in rules(_vision_transformer(model)):
        if rule.ours in tensors:
            result.update(zip(rule.official, rule.save(tensors[rule.ours]), strict=True))
    return result


def adapt_for_fine_tuning(state: Mapping[str, Tensor], model: nn.Module, *, as_released: bool = False) -> State:
    """Official keys made to fit another task and resolution (section 3.2).

    The head becomes the model's own, `pre_logits` goes unless the model has it, and the positions are interpolated
    where the number of patches differs (the file's grid is taken to be square).

    Args:
        as_released: take a square number of patches for a square grid, whatever the model's is (2 x 8: 4 x 4).

    Raises:
        CheckpointError: the file's positions do not form a square grid.
    """
    vit = _vision_transformer(model)
    official = canonical(state, vit)
    kept = {name: value for name, value in official.items() if not name.startswith("head/")}
    if vit.pre_logits is None:
        kept = {name: value for name, value in kept.items() if not name.startswith("pre_logits/")}
    kept |= {name: value for name, value in export_weights(vit.state_dict(), vit).items() if name.startswith("head/")}
    if POSITION_KEY in kept:
        patches = vit.grid[0] * vit.grid[1]
        is_square = as_released and math.isqrt(patches) ** 2 == patches
        grid = square_grid(patches) if is_square else vit.grid
        kept[POSITION_KEY] = _fit_positions(kept[POSITION_KEY], grid, vit.cls is not None)
    return kept


def canonical(state: Mapping[str, Tensor], model: VisionTransformer) -> State:
    """The keys of the first published files, whatever the age of the file."""
    official = _without_prefix(state)
    official = _unstacked(official)
    if any("MultiHeadDotProductAttention_0" in name for name in official):
        official = {_first_name(name): value for name, value in official.items()}
    if "pos_embedding" in official:
        official[POSITION_KEY] = _with_class_position(official.pop("pos_embedding"), official, model)
    return official


def rules(model: VisionTransformer) -> Iterator[Rule]:
    """What each parameter of `model` is called in official files."""
    if model.cls is not None:
        yield _same("cls", "cls")
    yield from _convolution("embedding", "embedding")
    yield _same("embedding.bias", "embedding/bias")
    if isinstance(model.positions, LearnedPositions1d):
        yield _same("positions.table", POSITION_KEY)
    for number, block in enumerate(model.layers):
        yield from _block_rules(f"blocks.{number}", f"Transformer/encoderblock_{number}", block.attn.num_heads)
    yield from _norm("encoder_norm", "Transformer/encoder_norm")
    if model.pre_logits is not None:
        yield from _dense("pre_logits", "pre_logits")
    yield from _dense("head", "head")
    if model.stem is not None:
        yield from _stem_rules(model)


def _block_rules(ours: str, official: str, heads: int) -> Iterator[Rule]:
    attention = f"{official}/MultiHeadDotProductAttention_1"
    names = [f"{attention}/{part}" for part in ("query", "key", "value")]
    yield from _norm(f"{ours}.norm1", f"{official}/LayerNorm_0")
    yield Rule(
        f"{ours}.attn.qkv.weight",
        tuple(f"{name}/kernel" for name in names),
        lambda kernels: torch.cat([kernel.flatten(1).T for kernel in kernels]),
        lambda weight: [part.T.unflatten(1, (heads, -1)) for part in weight.chunk(3)],
    )
    yield Rule(
        f"{ours}.attn.qkv.bias",
        tuple(f"{name}/bias" for name in names),
        lambda biases: torch.cat([bias.flatten() for bias in biases]),
        lambda bias: [part.unflatten(0, (heads, -1)) for part in bias.chunk(3)],
    )
    yield Rule(
        f"{ours}.attn.proj.weight",
        (f"{attention}/out/kernel",),
        lambda kernels: kernels[0].flatten(0, 1).T,
        lambda weight: [weight.T.unflatten(0, (heads, -1))],
    )
    yield _same(f"{ours}.attn.proj.bias", f"{attention}/out/bias")
    yield from _norm(f"{ours}.norm2", f"{official}/LayerNorm_2")
    yield from _dense(f"{ours}.mlp.fc1", f"{official}/MlpBlock_3/Dense_0")
    yield from _dense(f"{ours}.mlp.fc2", f"{official}/MlpBlock_3/Dense_1")


def _stem_rules(model: VisionTransformer) -> Iterator[Rule]:
    yield from _convolution("stem.conv_root", "conv_root")
    yield from _norm("stem.gn_root", "gn_root")
    assert model.stem is not None
    for name, module in model.stem.stages.named_modules():
        stage, _, rest = name.partition(".")
        unit, _, layer = rest.partition(".")
        if not layer:
            continue
        make = _norm if isinstance(module, nn.GroupNorm) else _convolution
        yield from make(f"stem.stages.{name}", f"block{int(stage) + 1}/unit{int(unit) + 1}/{layer}")


def _same(ours: str, official: str) -> Rule:
    return Rule(ours, (official,), lambda tensors: tensors[0], lambda tensor: [tensor])


def _norm(ours: str, official: str) -> Iterator[Rule]:
    for mine, theirs in (("weight", "scale"), ("bias", "bias")):
        # hybrid files hold GroupNorm parameters as (1, 1, 1, C)
        yield Rule(f"{ours}.{mine}", (f"{official}/{theirs}",), lambda tensors: tensors[0].flatten(), lambda t: [t])


def _dense(ours: str, official: str) -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", (f"{official}/kernel",), lambda kernels: kernels[0].T, lambda weight: [weight.T])
    yield _same(f"{ours}.bias", f"{official}/bias")


def _convolution(ours: str, official: str) -> Iterator[Rule]:
    yield Rule(
        f"{ours}.weight",
        (f"{official}/kernel",),
        lambda kernels: kernels[0].permute(3, 2, 0, 1),
        lambda weight: [weight.permute(2, 3, 1, 0)],
    )


def _load(rule: Rule, official: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    parts = [official[name] for name in rule.official]
    problem = f"{' + '.join(rule.official)} of shape {tuple(parts[0].shape)} does not fit {rule.ours} of {tuple(shape)}"
    try:
        tensor = rule.load(parts)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(problem) from error
    if tensor.shape != shape:
        raise CheckpointError(problem, next_step="choose the variant, patch and image size that the file was made with")
    return tensor.contiguous()


def _fit_positions(table: Tensor, grid: Grid, class_token: bool) -> Tensor:
    patches = table.shape[1] - int(class_token)
    if patches == grid[0] * grid[1]:
        return table
    try:
        return resize_positions(table, square_grid(patches), grid, class_token)
    except ValueError as error:
        raise CheckpointError(str(error), looked_at=POSITION_KEY) from error


def _without_prefix(state: Mapping[str, Tensor]) -> State:
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inside:  # beside it lie only optimizer state and, in two-tower files, the text model
            return inside
    return dict(state)


def _unstacked(state: State) -> State:
    stacked = "Transformer/encoderblock/"
    result = {name: value for name, value in state.items() if not name.startswith(stacked)}
    for name in state.keys() - result.keys():
        for layer, value in enumerate(state[name]):
            result[f"Transformer/encoderblock_{layer}/{name.removeprefix(stacked)}"] = value
    return result


def _first_name(name: str) -> str:
    return re.sub(r"(?<=/)[A-Za-z]+_\d+(?=/)", lambda match: BIG_VISION_NAMES.get(match[0], match[0]), name)


def _with_class_position(table: Tensor, official: State, model: VisionTransformer) -> Tensor:
    """big_vision adds positions before the class token: that token's own position is zero in our terms."""
    if "cls" not in official or table.shape[1] == model.grid[0] * model.grid[1] + 1:
        return table
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def _vision_transformer(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(
            f"official ViT weights cannot go into a {type(model).__name__}", next_step="use paper.model.network=vit"
        )
    return model
