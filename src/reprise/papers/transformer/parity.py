"""Golden cases of tensor2tensor and of a PyTorch port, run with our functions and models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from reprise.golden import Adapter, GoldenCase
from reprise.nn.attention import MultiHeadAttention, causal_mask
from reprise.nn.sinusoid import sinusoid, timing_signal
from reprise.papers.transformer import port
from reprise.papers.transformer.criterion import PAD, label_smoothed_loss
from reprise.papers.transformer.model import LayerOptions, Transformer
from reprise.papers.transformer.weights import ATTENTION, export_weights, import_weights
from reprise.training.beam import State, beam_search
from reprise.training.schedules import noam_rate

Tensors = dict[str, Tensor]

# What the released hyper-parameter sets say: base rate and warm-up steps. `base` is the newest, v3.
RATES = {"v1": (0.1, 4000), "v2": (0.2, 8000), "v3": (2.0, 8000), "base": (2.0, 8000)}
RATE_OPTIONS = ("learning_rate", "learning_rate_constant", "learning_rate_warmup_steps")
HIDDEN_SIZE = 512


def attention(case: GoldenCase) -> Tensors:
    """Self-attention with padding and with the causal mask, and attention over a memory, with gradients."""
    config = case.config
    heads = config["heads"]
    module = MultiHeadAttention(
        config["model_dim"], heads, key_dim=config["key_depth"] // heads, value_dim=config["value_depth"] // heads
    )
    kernels = {f"{ours}.weight": f"multihead_attention/{name}/kernel" for ours, name in ATTENTION.items()}
    module.load_state_dict({ours: case.weights[name].t() for ours, name in kernels.items()})
    x, memory = (case.inputs[name].clone().requires_grad_() for name in ("x", "memory"))
    padding = {name: case.inputs[f"{name}_mask"].bool()[:, None, None] for name in ("x", "memory")}
    parts = {
        "self_padding": (x, x, padding["x"]),
        "self_causal": (x, x, causal_mask(x.shape[1])),
        "cross": (x, memory, padding["memory"]),
    }
    outputs: Tensors = {}
    for name, arguments in parts.items():
        result = module(*arguments)
        outputs |= {f"{name}/output": result.detach(), f"{name}/weights": module.weights(*arguments).detach()}
        if name == "cross":
            gradients = torch.autograd.grad(result, (x, memory), case.inputs["cotangent"])
            outputs |= {"cross/grad_x": gradients[0], "cross/grad_memory": gradients[1]}
    return outputs


def build_transformer(config: Mapping[str, Any]) -> Transformer:
    """A model without dropout from the authors' option names."""
    hparams_set = config.get("hparams_set", "v1")
    _check_released(hparams_set)
    return Transformer(
        config["vocab_size"],
        dim=config["hidden_size"],
        hidden_dim=config["filter_size"],
        num_heads=config["num_heads"],
        encoder_layers=config["num_encoder_layers"],
        decoder_layers=config["num_decoder_layers"],
        dropout=0.0,
        pre_norm=hparams_set != "v1",
        positions={"timing": "timing", "paper": "sinusoid"}[config.get("position", "timing")],
        tied=config.get("shared_embedding_and_softmax_weights", True),
    )


def loaded_transformer(case: GoldenCase) -> Transformer:
    network = build_transformer(case.config)
    network.load_state_dict(import_weights(case.weights, network))
    return network


def _mean_loss(network: Transformer, source: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed loss and number of symbols."""
    losses = label_smoothed_loss(network(source, target), target, smoothing, as_released=True)
    return losses.sum(), (target != PAD).sum().float()


def model(case: GoldenCase) -> Tensors:
    """Both stacks, logits, loss and gradients."""
    network, config = loaded_transformer(case), case.config
    source, target = case.inputs["source"], case.inputs["target"]
    memory = network.encode(source)
    decoded = network.decode(target, memory, source)
    numerator, denominator = _mean_loss(network, source, target, config.get("label_smoothing", 0.1))
    (numerator / denominator).backward()
    named = {name: _gradient(parameter) for name, parameter in network.named_parameters()}
    gradients = export_weights(named, network, case.weights)
    signal = network.position_signal(0, max(source.shape[1], target.shape[1]))
    assert signal is not None
    outputs = {
        "encoder_output": memory * (source != PAD).unsqueeze(-1),
        "decoder_output": decoded,
        "logits": network.logits(decoded),
        "loss_numerator": numerator,
        "loss_denominator": denominator,
        "timing": signal.unsqueeze(0),
    }
    outputs |= {f"grad_{name}": gradients[name] for name in config.get("grads", ())}
    return {name: value.detach() for name, value in outputs.items()}


def _gradient(leaf: Tensor) -> Tensor:
    """The gradient, zero where the loss does not depend on the leaf."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def train_steps(case: GoldenCase) -> Tensors:
    """Adam updates under the warm-up schedule."""
    network, config = loaded_transformer(case), case.config
    betas = config.get("beta1", 0.9), config.get("beta2", 0.98)
    optimizer = torch.optim.Adam(network.parameters(), lr=1.0, betas=betas)
    override = {"hidden_size": config["hidden_size"]}
    override |= {"learning_rate_warmup_steps": config["warmup"]} if "warmup" in config else {}
    schedule = LambdaLR(optimizer, lambda step: released_rate(config.get("hparams_set", "v1"), step, override))
    losses, rates = [], []
    for step in range(config["steps"]):
        source, target = (case.inputs[f"step{step}/{name}"] for name in ("source", "target"))
        numerator, denominator = _mean_loss(network, source, target, config.get("label_smoothing", 0.1))
        loss = numerator / denominator
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        # TensorFlow adds epsilon to the root before the correction of its bias, PyTorch after it
        group["eps"] = config.get("epsilon", 1e-9) / math.sqrt(1 - betas[1] ** (step + 1))
        optimizer.step()
        schedule.step()
    final = export_weights(network.state_dict(), network, case.weights)
    return {"losses": torch.stack(losses), "lr": torch.tensor(rates)} | {
        f"final/{name}": value for name, value in final.items()
    }


def learning_rate(case: GoldenCase) -> Tensors:
    """Learning rates of the released hyper-parameter sets before the update of each global step."""
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["settings"]):
        override = setting.get("override", {})
        rates = [released_rate(setting["hparams_set"], step, override) for step in setting["steps"]]
        outputs[f"lr{number}"] = torch.tensor(rates, dtype=torch.float64)
    return outputs


def released_rate(hparams_set: str, step: int, override: Mapping[str, Any]) -> float:
    """The rate of a released hyper-parameter set at a global step (0 before the first update).

    v1 and v2 count updates from 1; v3 counts them from 0, so that its first update has rate 0.

    Raises:
        ValueError: a set that was not released, or an override of the rate that is not known here.
    """
    _check_released(hparams_set)
    if unknown := {name for name in override if name.startswith(("learning_rate", "optimizer"))} - set(RATE_OPTIONS):
        raise ValueError(f"the rate does not know {', '.join(sorted(unknown))}; it reads {', '.join(RATE_OPTIONS)}")
    base, warmup = RATES[hparams_set]
    dim, warmup = override.get("hidden_size", HIDDEN_SIZE), int(override.get("learning_rate_warmup_steps", warmup))
    if hparams_set in ("v1", "v2"):
        return 5000 * 0.002 * override.get("learning_rate", base) * noam_rate(step + 1, dim, warmup)
    return override.get("learning_rate_constant", base) * noam_rate(step, dim, warmup)


def _check_released(hparams_set: str) -> None:
    if hparams_set not in RATES:
        raise ValueError(f"no released hyper-parameter set {hparams_set!r}; there are {', '.join(RATES)}")


def label_smoothing(case: GoldenCase) -> Tensors:
    """Loss and gradient for several eps."""
    outputs: Tensors = {}
    labels = case.inputs["labels"]
    for number, smoothing in enumerate(case.config["smoothing"]):
        logits = case.inputs["logits"].clone().requires_grad_()
        per_token = label_smoothed_loss(logits, labels, smoothing, as_released=True)
        numerator, denominator = per_token.sum(), (labels != PAD).sum().float()
        (gradient,) = torch.autograd.grad(numerator / denominator, logits)
        outputs |= {
            f"numerator{number}": numerator.detach(),
            f"denominator{number}": denominator,
            f"per_token{number}": per_token.detach(),
            f"grad_logits{number}": gradient,
        }
    return outputs


def beam_table(case: GoldenCase) -> Tensors:
    """Beam search where the next symbol depends on the entry, the number of symbols and the last symbol."""
    table = case.inputs["logit_table"]
    outputs: Tensors = {}
    for number, setting in enumerate(case.config["settings"]):
        beam = setting["beam_size"]
        entry = torch.arange(len(table)).repeat_interleave(beam)

        def step(last: Tensor, position: int, state: State, entry: Tensor = entry) -> tuple[Tensor, State]:
            return table[entry, min(position, table.shape[1] - 1), last], state

        found = beam_search(
            step,
            {},
            len(table),
            beam_size=beam,
            max_length=setting["decode_length"],
            alpha=setting["alpha"],
            stop_early=setting.get("stop_early", True),
        )
        outputs |= {f"sequences{number}": found.sequences, f"scores{number}": found.scores}
    return outputs


def beam_model(case: GoldenCase) -> Tensors:
    """Beam search with a model, which keeps keys and values where the authors' code recomputes the prefix."""
    network, config = loaded_transformer(case).eval(), case.config
    source, beam = case.inputs["source"], config["beam_size"]
    with torch.no_grad():
        step, state = network.begin(source, beam)
        found = beam_search(
            step,
            state,
            len(source),
            beam_size=beam,
            max_length=config["decode_length"],
            alpha=config["alpha"],
            stop_early=config.get("stop_early", True),
        )
    return {"sequences": found.sequences, "scores": found.scores}


def sinusoid_paper(case: GoldenCase) -> Tensors:
    settings = enumerate(case.config["settings"])
    return {f"table{number}": sinusoid(length, dim).unsqueeze(0) for number, (length, dim) in settings}


def timing(case: GoldenCase) -> Tensors:
    outputs: Tensors = {}
    for number, (length, dim, low, high, start) in enumerate(case.config["settings"]):
        signal = timing_signal(length, dim, min_timescale=low, max_timescale=high, start=start)
        outputs[f"signal{number}"] = signal.unsqueeze(0)
    return outputs


def port_model(case: GoldenCase) -> Tensors:
    """The port: logits, accuracy, gradients and a few updates of the summed loss."""
    config = case.config
    network = build_port(config)
    port.load_port(case.weights, network)
    source, target = case.inputs["source"], case.inputs["target"]
    before, gold, pad = target[:, :-1], target[:, 1:], config["trg_pad_idx"]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)
    outputs: Tensors = {}
    losses, rates = [], []
    for number in range(1, config["steps"] + 1):
        logits = network(source, before)
        loss = port.port_loss(logits, gold, pad, bool(config["smoothing"]))
        optimizer.zero_grad()
        loss.backward()
        if number == 1:
            outputs = _port_outputs(case, network, logits.detach(), gold)
        rates.append(config["lr_mul"] * noam_rate(number, config["d_model"], config["n_warmup_steps"]))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        losses.append(loss.detach())
    state = network.state_dict()
    outputs |= {f"final/{name}": state[port.our_name(name) or ""] for name in config.get("track", ())}
    return outputs | {"losses": torch.stack(losses), "lr": torch.tensor(rates)}


def build_port(config: Mapping[str, Any]) -> port.PortTransformer:
    """The port from its own option names."""
    options = LayerOptions(
        dim=config["d_model"],
        hidden_dim=config["d_inner"],
        num_heads=config["n_head"],
        key_dim=config["d_k"],
        value_dim=config["d_v"],
        dropout=0.0,
    )
    return port.PortTransformer(
        options,
        source_vocab=config["n_src_vocab"],
        target_vocab=config["n_trg_vocab"],
        source_pad=config["src_pad_idx"],
        target_pad=config["trg_pad_idx"],
        layers=config["n_layers"],
        scale_emb_or_prj=config.get("scale_emb_or_prj", "prj"),
        tie_projection=config.get("trg_emb_prj_weight_sharing", True),
        tie_sides=config.get("emb_src_trg_weight_sharing", True),
    )


def _port_outputs(case: GoldenCase, network: port.PortTransformer, logits: Tensor, gold: Tensor) -> Tensors:
    pad = case.config["trg_pad_idx"]
    outputs = {
        "logits": logits,
        "n_correct_n_word": port.counted_right(logits, gold, pad),
        "loss_no_smoothing": port.port_loss(logits, gold, pad, False),
    }
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name in case.config.get("grads", ()):
        outputs[f"grad_{name}"] = _gradient(parameters[port.our_name(name) or ""]).clone()
    return outputs


ADAPTERS: dict[str, Adapter] = {
    "transformer_attention": attention,
    "transformer_beam_model": beam_model,
    "transformer_beam_search": beam_table,
    "transformer_label_smoothing": label_smoothing,
    "transformer_learning_rate": learning_rate,
    "transformer_model": model,
    "transformer_port_model": port_model,
    "transformer_sinusoid_paper": sinusoid_paper,
    "transformer_timing_signal": timing,
    "transformer_train_steps": train_steps,
}
