"""Comparing our implementations with numbers from official code: every golden case through its paper's adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reprise import discovery
from reprise.errors import ConfigError, RepriseError
from reprise.evidence.files import write_json
from reprise.golden import Adapter, GoldenCase, StoredCase, find_cases, load_case

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class OutputResult:
    """One output of a case.

    Attributes:
        max_error: largest |ours - golden|; None where they cannot be compared.
        excess: largest |ours - golden| / (atol + rtol |golden|); passed means at most 1. None as above.
        message: why it failed, or "".
    """

    name: str
    passed: bool
    max_error: float | None
    excess: float | None
    atol: float
    rtol: float
    message: str = ""

    def distance(self) -> float:
        """`excess`, infinite where there is none."""
        return float("inf") if self.excess is None else self.excess


@dataclass(frozen=True)
class CaseResult:
    """One golden case; `message` says why it failed as a whole, or "" when its outputs tell."""

    case: str
    paper: str
    kind: str
    passed: bool
    outputs: list[OutputResult] = field(default_factory=list)
    message: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> OutputResult | None:
        """The output nearest to, or farthest beyond, its tolerance; one that cannot be compared comes first."""
        return max(self.outputs, key=OutputResult.distance, default=None)


def run_parity(folder: Path, paper: str | None = None) -> list[CaseResult]:
    """Run every golden case at or below a folder, in order of path.

    Args:
        folder: holds case folders at any depth.
        paper: only the cases of this paper.

    Raises:
        ConfigError: no such paper, or no case to run.
    """
    return list(iterate_parity(folder, paper))


def iterate_parity(folder: Path, paper: str | None = None) -> Iterator[CaseResult]:
    """As `run_parity`, one result at a time, for a progress display."""
    for path in select_cases(folder, paper):
        yield run_case(path, _case_name(path, folder))


def select_cases(folder: Path, paper: str | None = None) -> list[Path]:
    """The case folders that `run_parity` would run.

    Raises:
        ConfigError: no such paper, or no case to run.
    """
    if paper is not None:
        discovery.check_paper(paper)
    found = [path for path in find_cases(folder) if paper is None or _declared(path, "paper") == paper]
    if not found:
        whose = f" of {paper}" if paper else ""
        raise ConfigError(
            f"There are no golden cases{whose}.",
            looked_at=folder,
            next_step="give the folder that holds <paper>/<case>/case.json",
        )
    return found


def run_case(path: Path, name: str | None = None) -> CaseResult:
    """Run one case folder; whatever goes wrong is a failure with its message."""
    started = time.perf_counter()
    name = name or path.name
    paper, kind = _declared(path, "paper"), _declared(path, "kind")
    try:
        stored = load_case(path)
        outputs = _run_adapter(find_adapter(stored.case), stored.case)
        results = [compare_output(stored, output, outputs.get(output)) for output in sorted(stored.outputs)]
        message = "" if results else "the case has no outputs to compare"
    except Exception as error:  # an adapter may raise anything; the other cases are still compared
        results, message = [], _message(error)
    passed = not message and all(result.passed for result in results)
    return CaseResult(name, paper, kind, passed, results, message, time.perf_counter() - started)


def find_adapter(case: GoldenCase) -> Adapter:
    """The paper's adapter for a case's kind.

    Raises:
        ConfigError: no such paper, no parity.py, or no adapter for the kind.
    """
    adapters: Mapping[str, Adapter] = discovery.module(case.paper, "parity").ADAPTERS
    if case.kind not in adapters:
        raise ConfigError(
            f"no adapter for the kind {case.kind!r}", looked_at=f"ADAPTERS of reprise.papers.{case.paper}.parity"
        )
    return adapters[case.kind]


def compare_output(stored: StoredCase, name: str, ours: Any) -> OutputResult:
    """Compare one output: |ours - golden| <= atol + rtol |golden|; NaN and infinities must stand in the same places."""
    golden = stored.outputs[name]
    atol, rtol = stored.tolerance_of(name)

    def failed(message: str) -> OutputResult:
        return OutputResult(name, False, None, None, atol, rtol, message)

    if ours is None:
        return failed("the adapter gave no such output")
    found = torch.as_tensor(ours).detach().cpu()
    if found.shape != golden.shape:
        return failed(f"shape {list(found.shape)} instead of {list(golden.shape)}")
    error, excess = _errors(found, golden, atol, rtol)
    if error is None or excess is None:
        return failed("NaN or infinite where the golden value is not, or the reverse")
    return OutputResult(name, excess <= 1.0, error, excess, atol, rtol)


def _errors(ours: Tensor, golden: Tensor, atol: float, rtol: float) -> tuple[float | None, float | None]:
    """Largest error, and largest error over its tolerance; None where special values differ."""
    if golden.numel() == 0:
        return 0.0, 0.0
    kind = torch.complex128 if golden.is_complex() or ours.is_complex() else torch.float64
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in (ours, golden)):
        kind = torch.int64  # exact also beyond 2**53
    a, b = ours.to(kind), golden.to(kind)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    if not (same | (torch.isfinite(a) & torch.isfinite(b))).all():
        return None, None
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(same, zero, (a - b).abs().to(torch.float64))
    allowed = atol + rtol * torch.where(torch.isfinite(b), b.abs().to(torch.float64), zero)
    excess = torch.where(error == 0, zero, error / allowed)  # no tolerance at all: infinite
    return float(error.max()), float(excess.max())


def _run_adapter(adapter: Adapter, case: GoldenCase) -> Mapping[str, Tensor]:
    with _own_randomness(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = adapter(case)
    if not isinstance(outputs, Mapping):
        raise TypeError(f"the adapter returned {type(outputs).__name__} instead of a mapping of tensors")
    return outputs


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Python's and NumPy's generators are put back afterwards, and so is torch's default dtype."""
    import random

    import numpy as np

    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)


def _declared(path: Path, key: str) -> str:
    try:
        return str(json.loads((path / "case.json").read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError):
        return "?"


def _case_name(path: Path, folder: Path) -> str:
    relative = path.relative_to(folder)
    return "/".join((relative if relative.parts else Path(path.parent.name, path.name)).parts[-2:])


def _message(error: Exception) -> str:
    text = error.problem if isinstance(error, RepriseError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def closing_line(results: Sequence[CaseResult]) -> str:
    """`N passed, M failed`."""
    passed = sum(result.passed for result in results)
    return f"{passed} passed, {len(results) - passed} failed"


def render(results: Sequence[CaseResult]) -> Table:
    """Case, max error, tolerance, and pass or fail; the numbers are of the output nearest to its tolerance."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("tolerance", justify="right", no_wrap=True)
    table.add_column("")
    for result in results:
        outcome = Text("pass", style="green") if result.passed else Text("FAIL", style="bold red")
        table.add_row(Text(result.case), *_numbers(result.worst), outcome)
    return table


def print_results(results: Sequence[CaseResult], console: Console) -> None:
    """The table, why cases failed, and the closing line."""
    console.print(render(results))
    for result in results:
        if not result.passed:
            console.print(f"{result.case}: {_detail(result)}", style="red", highlight=False, markup=False)
    console.print(closing_line(results), highlight=False)


def _numbers(worst: OutputResult | None) -> tuple[str, str]:
    if worst is None:
        return "–", "–"
    error = "–" if worst.max_error is None else f"{worst.max_error:.2g}"
    return error, f"{worst.atol:g} + {worst.rtol:g}·|x|"


def _detail(result: CaseResult) -> str:
    """Why a case failed."""
    if result.message:
        return result.message
    failed = [output for output in result.outputs if not output.passed]
    shown = ", ".join(f"{output.name} ({output.message or f'error {output.max_error:.2g}'})" for output in failed[:3])
    return f"{len(failed)} of {len(result.outputs)} outputs: {shown}{', …' if len(failed) > 3 else ''}"


def to_json(results: Sequence[CaseResult]) -> str:
    """All results as JSON; a number that is not finite is null."""
    passed = sum(result.passed for result in results)
    cases = [asdict(result) for result in results]
    for case in cases:
        for output in case["outputs"]:
            if output["excess"] == float("inf"):
                output["excess"] = None
    content = {"passed": passed, "failed": len(results) - passed, "total": len(results), "cases": cases}
    return json.dumps(content, indent=1, allow_nan=False)


def write_records(results: Sequence[CaseResult]) -> list[Path]:
    """Write `experiments/<slug>/PARITY.json` for every known paper among the results: counts and outcomes."""
    written = []
    for slug in sorted({result.paper for result in results} & set(discovery.papers())):
        own = [result for result in results if result.paper == slug]
        content = {
            "passed": sum(result.passed for result in own),
            "total": len(own),
            "torch": torch.__version__,
            "cases": [_brief(result) for result in own],
        }
        written.append(write_json(discovery.experiment_dir(slug) / "PARITY.json", content))
    return written


def _brief(result: CaseResult) -> dict[str, Any]:
    errors = [output.max_error for output in result.outputs if output.max_error is not None]
    return {
        "case": result.case.rpartition("/")[2],
        "kind": result.kind,
        "passed": result.passed,
        "outputs": len(result.outputs),
        "max_error": float(f"{max(errors):.2g}") if errors else None,
    }
