"""SGD with a narrow accumulator against a plain loop, and across a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from reprise.training.optimizers import MomentumSGD


def gradients(steps: int, seed: int = 0) -> Tensor:
    return torch.randn(steps, 7, generator=torch.Generator().manual_seed(seed))


def run(optimizer: MomentumSGD, parameter: nn.Parameter, grads: Tensor) -> None:
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()


def test_float32_accumulator_is_torchs_sgd() -> None:
    ours, theirs = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    run(MomentumSGD([ours], lr=0.1, momentum=0.9, accumulator="float32"), ours, gradients(5))
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for gradient in gradients(5):
        theirs.grad = gradient.clone()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_bfloat16_rounds_what_is_stored_and_the_factor() -> None:
    parameter = nn.Parameter(torch.ones(7))
    run(MomentumSGD([parameter], lr=0.1), parameter, gradients(4))
    stored, value = torch.zeros(7), torch.ones(7)
    for gradient in gradients(4):
        total = gradient + 0.8984375 * stored
        value = value - 0.1 * total
        stored = total.bfloat16().float()
    assert torch.allclose(parameter, value, atol=1e-6)


def test_a_resumed_run_is_bit_identical() -> None:
    whole = nn.Parameter(torch.ones(7))
    first = MomentumSGD([whole], lr=0.1)
    run(first, whole, gradients(6)[:3])
    resumed = nn.Parameter(whole.detach().clone())
    second = MomentumSGD([resumed], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, whole, gradients(6)[3:])
    run(second, resumed, gradients(6)[3:])
    assert torch.equal(whole, resumed)
    assert second.state[resumed]["momentum"].dtype == torch.bfloat16


def test_closures_and_unknown_accumulators() -> None:
    parameter = nn.Parameter(torch.ones(2))

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert MomentumSGD([parameter], lr=0.25).step(closure) == 2.0
    assert torch.equal(parameter, torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="unknown accumulator"):
        MomentumSGD([parameter], lr=0.1, accumulator="float8")
