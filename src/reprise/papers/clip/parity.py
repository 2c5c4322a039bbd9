"""Our CLIP against numbers from openai/CLIP, by kind of golden case; every option comes from the case's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from reprise.data.byte_pair import OFFICIAL_MERGES, BytePairTokenizer
from reprise.data.image_text import preprocess
from reprise.golden import Adapter, GoldenCase
from reprise.papers.clip import model as models
from reprise.papers.clip.criterion import classifier_weights, contrastive_loss
from reprise.papers.clip.transformer import unit
from reprise.papers.clip.weights import import_weights, rename

ZERO_SHOT_SCALE = 100.0  # of the released evaluation, instead of the learned one
TOWER_PREFIX = "visual."


def contrastive(case: GoldenCase) -> dict[str, Tensor]:
    """Logits, loss and gradients of given features."""
    given = {name: case.inputs[name].clone().requires_grad_() for name in ("image_features", "text_features")}
    scale = case.inputs.get("logit_scale")
    scale = torch.tensor(case.config["logit_scale"]) if scale is None else scale.clone()
    given["logit_scale"] = scale.requires_grad_()
    logits = scale.exp() * unit(given["image_features"]) @ unit(given["text_features"]).T
    loss = _symmetric(logits)
    loss.backward()
    gradients = {f"grad_{name}": value.grad for name, value in given.items() if value.grad is not None}
    return {"logits_per_image": logits, "logits_per_text": logits.T, "loss": loss, **gradients}


def _symmetric(logits: Tensor) -> Tensor:
    return contrastive_loss(logits, logits.T, torch.arange(len(logits)))


def _built(case: GoldenCase) -> models.CLIP:
    config = case.config
    layers = config["vision_layers"]
    built = models.clip(
        embed_dim=config["embed_dim"],
        image_size=config["image_resolution"],
        vision_layers=list(layers) if isinstance(layers, list | tuple) else layers,
        vision_width=config["vision_width"],
        vision_patch_size=config.get("vision_patch_size"),
        vision_heads=config.get("vision_heads"),
        context_length=config.get("context_length", 77),
        vocab_size=config.get("vocab_size", 49408),
        text_width=config["transformer_width"],
        text_heads=config.get("transformer_heads"),
        text_layers=config.get("transformer_layers", 12),
        end_token=None,
    )
    built.load_state_dict(import_weights(case.weights, built))
    return built


def whole_model(case: GoldenCase) -> dict[str, Tensor]:
    """Features, logits both ways, zero-shot classifier; loss and gradients in each mode, statistics after training."""
    outputs: dict[str, Tensor] = {}
    for mode in case.config.get("modes", ["eval"]):
        built = _built(case).train(mode == "train")
        prefix = "train/" if mode == "train" else ""
        found = _losses(built, case)
        outputs |= {f"{prefix}{name}": value for name, value in found.items()}
        state = built.state_dict()
        outputs |= {f"{prefix}after/{name}": state[rename(name)] for name in case.config.get("batchnorm_after", [])}
    with torch.no_grad():
        return outputs | _evaluation(_built(case).eval(), case.inputs)


def _losses(built: models.CLIP, case: GoldenCase) -> dict[str, Tensor]:
    logits = built.logits(case.inputs["image"], case.inputs["text"])
    loss = _symmetric(logits)
    loss.backward()
    return {"logits_per_image": logits, "logits_per_text": logits.T, "loss": loss, **_gradients(built, case, rename)}


def _evaluation(built: models.CLIP, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs = {"image_features": built.visual(inputs["image"])}
    if "text" in inputs:
        outputs["text_features"] = built.text(inputs["text"])
    if "more_text" in inputs:
        logits = built.logits(inputs["image"], inputs["more_text"])
        outputs |= {"logits_per_image_more": logits, "logits_per_text_more": logits.T}
    if "prompts" in inputs:
        prompts = inputs["prompts"]
        weights = classifier_weights(built.text(prompts.flatten(0, 1)).unflatten(0, prompts.shape[:2]))
        outputs["zeroshot_weights"] = weights
        outputs["zeroshot_logits"] = ZERO_SHOT_SCALE * unit(outputs["image_features"]) @ weights
    return outputs


def _gradients(built: nn.Module, case: GoldenCase, ours: Any) -> dict[str, Tensor]:
    parameters = dict(built.named_parameters())
    found = {}
    for name in case.config.get("grads", []):
        gradient = parameters[ours(name)].grad
        found[f"grad_{name}"] = torch.zeros_like(parameters[ours(name)]) if gradient is None else gradient
    return found


def vision_tower(case: GoldenCase) -> dict[str, Tensor]:
    """One image tower with a free number of heads; gradients of sum(coef * features)."""
    config = case.config
    layers = config["layers"]
    sizes = models.Sizes(
        embed_dim=config["output_dim"],
        image_size=config["image_resolution"],
        vision_layers=tuple(layers) if isinstance(layers, list | tuple) else layers,
        vision_width=config["width"],
        vision_patch_size=config.get("patch_size"),
        vision_heads=config["heads"],
        text_width=64,
    )
    tower = models.vision_tower(sizes)
    tower.load_state_dict({key.removeprefix(TOWER_PREFIX): value for key, value in case.weights.items()})
    features = tower.eval()(case.inputs["image"])
    outputs = {"features": features}
    if "coef" in case.inputs:
        (case.inputs["coef"] * features).sum().backward()
        outputs |= _gradients(tower, case, lambda name: name)
    return outputs


def preprocessing(case: GoldenCase) -> dict[str, Tensor]:
    """8-bit pictures [H, W, 3] as the released evaluation input."""
    size = case.config["n_px"]
    return {
        f"out{name.removeprefix('img')}": preprocess(Image.fromarray(picture.numpy()), size)
        for name, picture in case.inputs.items()
    }


def tokenizer(case: GoldenCase) -> dict[str, Tensor]:
    """Ids of texts in two contexts, and their lengths before truncation; merges as far as the texts need them."""
    merges = {(first, second): rank for rank, first, second in _merges(case)}
    made = BytePairTokenizer(merges, OFFICIAL_MERGES)
    texts = list(case.config["texts"])
    lengths = [len(made.encode(text)) + 2 for text in texts]
    outputs = {"ids77": made(texts, case.config.get("context_length", 77)), "lengths": torch.tensor(lengths)}
    if "short_context" in case.config:
        outputs["ids_short"] = made(texts, case.config["short_context"])
    return outputs


def _merges(case: GoldenCase) -> list[tuple[int, str, str]]:
    return [(int(rank), str(first), str(second)) for rank, first, second in case.config["merges"]]


ADAPTERS: dict[str, Adapter] = {
    "clip_contrastive": contrastive,
    "clip_model": whole_model,
    "clip_vision_tower": vision_tower,
    "clip_preprocess": preprocessing,
    "clip_tokenizer": tokenizer,
}
