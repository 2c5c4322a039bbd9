"""One run of a search: tells Optuna its validation metric and stops when the trial is not worth going on."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer

from reprise.errors import InterruptedRunError
from reprise.search.space import no_such_metric
from reprise.search.study import PRUNED_AT, open_study, trial_of
from reprise.training.checkpoint import current_step

WARM_UP = 1 / 3  # of the steps, in which nothing is judged: schedules warm up, and early curves cross


class PrunedRunError(InterruptedRunError):
    """The search stopped the run, because others were better at this step."""


class PruneTrial(Callback):
    """Reports a validation metric to a trial after each validation and ends a run that is worse than the median.

    Args:
        journal: the study's file.
        trial: the trial's number.
        metric: what is reported.
        steps: of the whole run.
    """

    def __init__(self, journal: str, trial: int, metric: str, steps: int) -> None:
        self.journal, self.number, self.metric, self.steps = Path(journal), trial, metric, steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = current_step(trainer)
        value = trainer.callback_metrics.get(self.metric)
        if value is None:
            raise no_such_metric(self.metric, trainer.callback_metrics)
        verdict = trainer.is_global_zero and self._is_hopeless(step, float(value))
        if trainer.strategy.broadcast(verdict):
            raise PrunedRunError(f"pruned by the search at step {step}: {self.metric} {float(value):.4g}")

    def _is_hopeless(self, step: int, value: float) -> bool:
        study = open_study(self.journal)
        trial, known = trial_of(study, self.number), study.trials[self.number].intermediate_values
        if step not in known:  # a run that goes on from a checkpoint reports some steps again
            trial.report(value, step)
        if step <= WARM_UP * self.steps or step >= self.steps or not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED_AT, step)
        return True
