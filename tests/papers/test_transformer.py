"""The Transformer's parts against slow formulas, its traps, and the recurrent network beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from reprise.config import compose
from reprise.errors import CheckpointError
from reprise.papers.transformer.criterion import label_smoothed_loss, soft_target_entropy, token_log_probs
from reprise.papers.transformer.model import Transformer
from reprise.papers.transformer.module import TransformerModule
from reprise.papers.transformer.networks import Network
from reprise.papers.transformer.parity import build_transformer
from reprise.papers.transformer.pictures import attention_maps
from reprise.papers.transformer.recurrent import RecurrentSeq2Seq
from reprise.papers.transformer.scores import CorpusBleu, TokenScores
from reprise.papers.transformer.weights import export_weights, import_weights
from reprise.training.beam import beam_search
from reprise.training.run import build

VOCAB = 11


def tiny(**options: Any) -> Transformer:
    sizes: dict[str, Any] = {
        "dim": 16,
        "hidden_dim": 24,
        "num_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "dropout": 0.0,
    }
    return Transformer(VOCAB, **(sizes | options)).eval()


def networks() -> list[Network]:
    return [
        tiny(),
        tiny(pre_norm=True, positions="timing", tied=False),
        tiny(positions="learned", key_dim=3, value_dim=5),
        RecurrentSeq2Seq(VOCAB, dim=12, state_dim=10).eval(),
        RecurrentSeq2Seq(VOCAB, dim=12, state_dim=10, attention=False).eval(),
    ]


NAMES = ["paper", "later release", "learned, own head sizes", "recurrent", "recurrent without attention"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.tensor([[3, 4, 5, 6, 1], [7, 8, 1, 0, 0]])
    target = torch.tensor([[6, 5, 4, 3, 1, 0], [8, 7, 9, 2, 4, 1]])
    return source, target


@pytest.mark.parametrize("network", networks(), ids=NAMES)
def test_the_decoder_never_sees_what_it_has_to_predict(network: Network) -> None:
    source, target = batch()
    changed = target.clone()
    changed[:, 3:] = 5
    before, after = network(source, target), network(source, changed)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-4)


@pytest.mark.parametrize("network", networks(), ids=NAMES)
def test_padding_of_the_source_changes_nothing(network: Network) -> None:
    source, target = batch()
    alone = network(source[1:, :3], target[1:])
    assert torch.allclose(network(source, target)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("network", networks(), ids=NAMES)
def test_an_all_padding_source_gives_no_nan(network: Network) -> None:
    source, target = batch()
    assert torch.isfinite(network(torch.zeros_like(source), target)).all()


@pytest.mark.parametrize("network", networks(), ids=NAMES)
def test_step_by_step_decoding_equals_teacher_forcing(network: Network) -> None:
    """Beam 1 without a length penalty is greedy decoding, whose symbols teacher forcing confirms."""
    source, _ = batch()
    with torch.no_grad():
        step, state = network.begin(source, 1)
        found = beam_search(step, state, 2, beam_size=1, max_length=7, alpha=0.0, end=VOCAB + 5)
        words = found.best()
        log_probs = network(source, words).log_softmax(-1)
    assert torch.equal(log_probs.argmax(-1), words)
    assert torch.allclose(found.scores[:, 0], log_probs.amax(-1).sum(1), atol=1e-4)


def test_embeddings_have_unit_variance_after_scaling() -> None:
    network = tiny(dim=256, num_heads=4)
    ids = torch.randint(1, VOCAB, (1, 4000))
    assert network.embed(ids, network.source_table).std().item() == pytest.approx(1.0, abs=0.1)
    assert not network.embed(torch.zeros_like(ids), network.source_table).any()


def test_tied_and_untied_matrices() -> None:
    tied, untied = tiny(), tiny(tied=False)
    assert tied.source_table is tied.output_table is tied.target_table
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 2 * VOCAB * 16


def test_post_norm_has_no_final_norm_and_no_inner_dropout() -> None:
    """nn.Transformer has both; the paper has neither."""
    network = Transformer(VOCAB, dim=16, hidden_dim=24, num_heads=2, encoder_layers=1, decoder_layers=1)
    assert not any("encoder_norm" in name or "decoder_norm" in name for name, _ in network.named_parameters())
    rates = {name: module.p for name, module in network.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert all((rate == 0) == ("feed_forward.2" in name) for name, rate in rates.items())


def test_unknown_or_too_few_positions() -> None:
    with pytest.raises(ValueError, match="unknown positions"):
        tiny(positions="rotary")
    with pytest.raises(ValueError, match="were learned"):
        tiny(positions="learned", max_length=3)(*batch())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("as_released", [False, True])
def test_label_smoothing_against_the_definition(smoothing: float, as_released: bool) -> None:
    logits, target = torch.randn(2, 3, VOCAB), torch.tensor([[2, 3, 0], [1, 10, 4]])
    found = label_smoothed_loss(logits, target, smoothing, as_released=as_released)
    hot = F.one_hot(target, VOCAB).float()
    if as_released:
        soft = hot * (1 - smoothing) + (1 - hot) * smoothing / (VOCAB - 1)
    else:
        soft = hot * (1 - smoothing) + smoothing / VOCAB
    expected = -(soft * logits.log_softmax(-1)).sum(-1)
    if as_released:
        expected = expected + torch.xlogy(soft, soft).sum(-1)
        assert soft_target_entropy(smoothing, VOCAB) == pytest.approx(
            -torch.xlogy(soft, soft).sum(-1)[0, 0].item(), abs=1e-5
        )
    assert torch.allclose(found, expected * (target != 0), atol=1e-5)


def test_perplexity_is_of_the_unsmoothed_likelihood() -> None:
    logits, target = torch.randn(2, 3, VOCAB), torch.tensor([[2, 3, 0], [1, 10, 4]])
    scores = TokenScores()
    scores.update(logits, target)
    found = scores.compute(torch.device("cpu"))
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)
    assert found["perplexity"].item() == pytest.approx(math.exp(nll.item()), rel=1e-5)
    assert token_log_probs(logits, target)[0, 2] == 0


def test_accuracies_count_padding_neither_way() -> None:
    target = torch.tensor([[2, 3, 0], [1, 10, 4]])
    logits = F.one_hot(target, VOCAB).float() * 9
    logits[0, 2, 5] = 99.0  # at padding
    logits[1, 0, 7] = 99.0
    scores = TokenScores()
    scores.update(logits, target)
    found = scores.compute(torch.device("cpu"))
    assert found["token_accuracy"].item() == pytest.approx(4 / 5)
    assert found["exact"].item() == 0.5
    assert TokenScores().compute(torch.device("cpu")) == {}


def test_bleu_from_sums_is_sacrebleu_and_names_its_signature() -> None:
    from sacrebleu.metrics import BLEU

    hypotheses = ["Ein Mann fährt Rad.", "Zwei Hunde laufen über eine Wiese .", "Haus"]
    references = ["Ein Mann fährt ein Rad.", "Zwei Hunde rennen über die Wiese.", "Ein Haus"]
    ours, theirs = CorpusBleu(), BLEU()
    ours.update(hypotheses[:1], references[:1])
    ours.update(hypotheses[1:], references[1:])
    assert ours.compute(torch.device("cpu")) == pytest.approx(theirs.corpus_score(hypotheses, [references]).score)
    assert ours.describe() == str(theirs.get_signature())


def golden(goldens: Path, case: str) -> tuple[Transformer, dict[str, torch.Tensor]]:
    folder = goldens / "transformer" / case
    if not folder.is_dir():
        pytest.skip(f"no golden case {case}")
    config = json.loads((folder / "case.json").read_text())["config"]
    return build_transformer(config), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("case", ["model_prenorm", "model_untied", "model_postnorm"])
def test_official_weights_round_trip(goldens: Path, case: str) -> None:
    model, official = golden(goldens, case)
    ours = import_weights(official, model)
    model.load_state_dict(ours, strict=True)
    back = export_weights(ours, model, official)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_left_over_weights_are_an_error(goldens: Path) -> None:
    model, official = golden(goldens, "model_postnorm")
    with pytest.raises(CheckpointError, match="stranger"):
        import_weights(official | {"stranger": torch.zeros(1)}, model)
    lacking = dict(official)
    lacking.pop(next(name for name in official if name.endswith("conv1/kernel")))
    with pytest.raises(CheckpointError, match="conv1/kernel"):
        import_weights(lacking, model)
    with pytest.raises(CheckpointError, match="Transformer"):
        import_weights(official, RecurrentSeq2Seq(VOCAB, dim=4, state_dim=4))


@pytest.mark.parametrize("network", networks(), ids=NAMES)
def test_attention_maps_are_distributions_over_the_source(network: Network) -> None:
    source, target = batch()
    maps = attention_maps(network, source[:1], target[:1])
    for weights in maps.values():
        assert weights.shape[1:] == (6, 5)
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
    assert bool(maps) != (isinstance(network, RecurrentSeq2Seq) and network.attention is None)


def test_paper_recipe_is_post_norm_with_the_published_warm_up() -> None:
    with torch.device("meta"):
        module = build(compose(["experiment=transformer/paper"])).module
    cfg = compose(["experiment=transformer/paper"])
    assert not cfg.paper.model.transformer.pre_norm
    assert cfg.schedule.warmup_steps == 4000
    assert cfg.data.batch_size * cfg.data.bucket_length == 25_000
    assert sum(p.numel() for p in module.get_submodule("model").parameters()) == 63_045_632


def test_as_released_changes_positions_smoothing_and_length() -> None:
    cfg = compose(["experiment=transformer/small", "paper.as_released=true"])
    module = build(cfg).module
    assert isinstance(module, TransformerModule)
    assert module.model.positions == "timing"
    assert module.extra_length == 100
    assert module.as_released
