"""Parameters, multiply-adds, memory and the dry optimizer step, on models small enough to count by hand."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from reprise.data.spec import DataSpec
from reprise.evidence import measure, plan
from reprise.evidence.cards import Card, Size
from reprise.training.classification import Classifier
from reprise.training.module import PaperModule

from .conftest import CARD

SPEC = DataSpec("digits", (1, 4, 4), tuple("ab"))
MACS = 16 * 8 + 8 * 2
PARAMETERS = 16 * 8 + 8 + 8 * 2 + 2


def classifier(hidden: int = 8, optimizer=torch.optim.Adam) -> Classifier:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    return Classifier(model, lambda parameters: optimizer(parameters, lr=0.1), num_classes=2)


class Matching(Classifier):
    """A loss that looks at values, as a matcher does, and so cannot run on meta tensors."""

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() >= 0 else -loss


class Manual(PaperModule):
    """Optimizes by hand, on batches of its own kind."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.automatic_optimization = False
        self.model = nn.Linear(3, 1)

    def example_batch(self, batch_size: int):
        return {"rows": torch.ones(batch_size, 3)}

    def forward(self, rows: Tensor) -> Tensor:
        return self.model(rows)

    def training_step(self, batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self(batch["rows"]).square().mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss)


def test_counts_match_the_hand_count():
    module = classifier()
    assert measure.count_parameters(module) == PARAMETERS
    assert measure.multiply_adds(module, measure.example_batch(module, SPEC, 3)) == 3 * MACS


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_is_counted_in_full(device):
    length, dim = 5, 8

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.MultiheadAttention(dim, 2, batch_first=True)

        def forward(self, image: Tensor) -> Tensor:
            return self.model(image, image, image, need_weights=False)[0]

    with torch.device(device):
        module = Attention()
        counted = measure.multiply_adds(module, {"image": torch.randn(1, length, dim)})
    assert counted == 4 * length * dim * dim + 2 * length * length * dim
    assert torch.backends.mha.get_fastpath_enabled()


def test_memory_on_meta_is_exact_for_a_small_model():
    with torch.device("meta"):
        module = classifier()
        memory = measure.estimate_memory(module, measure.example_batch(module, SPEC, 10))
    metric_bytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert memory.parameters == 4 * PARAMETERS + metric_bytes
    assert memory.gradients == 4 * PARAMETERS
    assert memory.optimizer == 2 * 4 * PARAMETERS + 4 * 4  # two moments, and a step count for each of four tensors
    assert memory.activations == 4 * 10 * (16 + 8)  # the input of each linear layer; ReLU's output is the second one
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_step_changes_the_weights_on_cpu_and_runs_on_meta():
    module = classifier()
    before = module.model[1].weight.clone()
    loss = measure.optimizer_step(module, measure.example_batch(module, SPEC, 4))
    assert loss is not None
    assert loss > 0
    assert not torch.equal(before, module.model[1].weight)
    with torch.device("meta"):
        module = classifier()
        assert measure.optimizer_step(module, measure.example_batch(module, SPEC, 4)) is None


def test_manual_optimization_steps_inside_a_trainer():
    module = Manual()
    before = module.model.weight.detach().clone()
    assert measure.optimizer_step(module, module.example_batch(2)) > 0
    assert not torch.equal(before, module.model.weight)


def test_batches_that_cannot_be_made_say_why():
    module = classifier()
    with pytest.raises(ValueError, match="defines no example_batch"):
        measure.example_batch(module, DataSpec("text", None, ()), 1)
    with pytest.raises(ValueError, match="needs image"):
        measure.multiply_adds(module, {"label": torch.zeros(1)})


def make(module_of, *, sizes, batch_size=8, devices=2):
    card = Card.model_validate(CARD | {"sizes": sizes})
    return plan.make_plan(
        "toy_paper",
        "paper",
        card,
        build_size=lambda overrides: (classifier(*(int(text) for text in overrides)), SPEC),
        build=lambda: (module_of(), SPEC),
        data=plan.DataResult("digits", "ok", "in the package", None),
        steps=1000,
        batch_size=batch_size,
        devices=devices,
    )


def size(name, parameters, flops=None, overrides=(), **more):
    return {
        "name": name,
        "overrides": list(overrides),
        "parameters": parameters,
        "flops": flops,
        "source": "Table 1",
    } | more


def test_the_plan_compares_sizes_and_estimates():
    found = make(classifier, sizes=[size("base", PARAMETERS, MACS), size("near", PARAMETERS + 1, MACS * 1.009)])
    assert [each.matched for each in found.sizes] == [True, True]
    assert found.sizes[0].flops == MACS
    assert (found.step.device, found.step.batch_size) == ("cpu", 4)
    assert found.device_hours == pytest.approx(6 * MACS * 1000 * 8 / (plan.DEVICE_FLOPS * plan.UTILISATION) / 3600)
    assert found.messages == []
    assert found.ok
    data = json.loads(plan.to_json(found))
    assert data["ok"] is True
    console = Console(width=150, record=True)
    console.print(plan.render(found))
    text = console.export_text()
    assert "match" in text
    assert "4 examples on cpu" in text


def test_a_size_that_differs_fails_unless_the_card_says_why():
    wrong = size("wrong", PARAMETERS * 2)
    assert not make(classifier, sizes=[wrong]).ok
    explained = make(classifier, sizes=[wrong | {"note": "the paper counts the teacher too"}])
    assert explained.ok
    assert not explained.sizes[0].matched
    broken = make(classifier, sizes=[size("broken", 1, overrides=["x"], note="why")])
    assert not broken.ok
    assert "ValueError" in broken.sizes[0].message


def test_too_large_for_real_tensors_steps_on_meta(monkeypatch):
    monkeypatch.setattr(plan, "REAL_STEP_BYTES", 1000)
    found = make(classifier, sizes=[])
    assert found.step.device == "meta"
    assert found.step.loss is None


def test_a_loss_that_looks_at_values_steps_on_fewer_real_examples(monkeypatch):
    def module() -> Matching:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        return Matching(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1), num_classes=2)

    with torch.device("meta"):
        built = module()
        whole = measure.estimate_memory(built, measure.example_batch(built, SPEC, 100))
    fixed = whole.total - whole.activations
    monkeypatch.setattr(plan, "REAL_STEP_BYTES", fixed + 7 * whole.activations // 100)
    found = make(module, sizes=[], batch_size=100, devices=1)
    assert (found.step.device, found.step.batch_size) == ("cpu", 7)
    assert any("on meta" in message for message in found.messages)
    assert found.ok


def test_what_cannot_be_planned_is_said():
    def module() -> PaperModule:
        raise RuntimeError("no such backbone")

    found = make(module, sizes=[])
    assert not found.ok
    assert found.memory is None
    assert any("no such backbone" in message for message in found.messages)


def test_sizes_are_written(workshop):
    found = make(classifier, sizes=[size("base", PARAMETERS, MACS), size("wrong", 1)])
    content = json.loads(plan.write_sizes(found).read_text())
    assert (content["passed"], content["total"]) == (1, 2)
    assert content["sizes"][0]["flops"] == MACS


def test_a_zero_tolerance_wants_the_exact_number():
    exact = Size(name="a", parameters=PARAMETERS, tolerance=0, source="x")
    off = exact.model_copy(update={"parameters": PARAMETERS + 1})
    assert plan.check_size(exact, lambda overrides: (classifier(), SPEC)).matched
    assert not plan.check_size(off, lambda overrides: (classifier(), SPEC)).matched


class Attached(Classifier):
    """Asks for its trainer in the training step."""

    def training_step(self, batch, batch_idx: int) -> Tensor:
        assert self.trainer.max_steps == 1
        return super().training_step(batch, batch_idx)


def test_a_module_that_asks_for_its_trainer_gets_one():
    module = Attached(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.optim.Adam, num_classes=2)
    assert measure.optimizer_step(module, measure.example_batch(module, SPEC, 4)) > 0
