"""What a translation system is judged by, as sums that ranks can add up: perplexity, accuracies, corpus BLEU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reprise.distributed import all_reduce_sum
from reprise.papers.transformer.criterion import PAD, token_log_probs

ORDERS = 4  # BLEU counts n-grams up to this length


class TokenScores:
    """Perplexity (from UNsmoothed likelihoods), token accuracy and whole-sequence accuracy under teacher forcing.

    A greedy decoder reproduces a target exactly if and only if each symbol is the most probable one after the right
    ones before it, so `exact` is the accuracy of free-running greedy decoding as well.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(5, dtype=torch.float64)  # log-probability, right symbols, symbols, right pairs, pairs

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits [B, T, V], targets int64 [B, T]."""
        real = target != PAD
        right = (logits.argmax(-1) == target) & real
        exact = right.sum(1) == real.sum(1)
        log_prob = token_log_probs(logits, target).sum(dtype=torch.float64)
        counts = [right.sum(), real.sum(), exact.sum(), torch.tensor(len(target), device=target.device)]
        self.sums += torch.stack([log_prob, *(count.double() for count in counts)]).cpu()

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """`perplexity`, `token_accuracy`, `exact` over all ranks; nothing where nothing was counted."""
        log_prob, right, symbols, exact, pairs = all_reduce_sum(self.sums.to(device, copy=True)).unbind()
        if pairs == 0:
            return {}
        return {
            "perplexity": (-log_prob / symbols).exp().float(),
            "token_accuracy": (right / symbols).float(),
            "exact": (exact / pairs).float(),
        }


class CorpusBleu:
    """sacreBLEU's corpus score from sums over sentences: 13a tokens, mixed case, exponential smoothing."""

    def __init__(self) -> None:
        from sacrebleu.metrics import BLEU

        self.metric = BLEU(effective_order=True)  # of sentences; the corpus score below is the usual one
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(2 * ORDERS + 2, dtype=torch.float64)

    def update(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Count sentences."""
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            found = self.metric.sentence_score(hypothesis, [reference])
            self.sums += torch.tensor([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=torch.float64)

    def compute(self, device: torch.device) -> float:
        """BLEU in points (0 to 100) over all ranks."""
        sums = all_reduce_sum(self.sums.to(device, copy=True)).round().long().tolist()
        score = self.metric.compute_bleu(
            correct=sums[:ORDERS],
            total=sums[ORDERS : 2 * ORDERS],
            sys_len=sums[-2],
            ref_len=sums[-1],
            smooth_method="exp",
            effective_order=False,
        )
        return float(score.score)

    def describe(self) -> str:
        """The signature that says how the score was computed."""
        from sacrebleu import __version__

        return f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{__version__}"


def prefixed(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values under `prefix` + name."""
    return {prefix + name: value for name, value in values.items()}
