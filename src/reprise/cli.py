"""The command line. Every subcommand imports what it needs only when it runs, so that help and lists answer at once."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reprise.errors import RepriseError
from reprise.paths import environment_variable

if TYPE_CHECKING:
    from reprise.training.jobs import SweepOutcome

TRACEBACK = "--traceback"
HYDRA_HELP = (
    "any Hydra overrides, e.g. experiment=vit/small seed=3 optimizer.lr=0.01; and Hydra's flags (-m, --cfg job)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; one clear message and a non-zero exit code when something is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if TRACEBACK in words:  # wherever it stands, also after overrides
        words = [word for word in words if word != TRACEBACK]
        os.environ["REPRISE_TRACEBACK"] = "1"
    args, rest = _parser().parse_known_args(words)
    if rest and not args.takes_overrides:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with environment_variable("REPRISE_COMMAND", shlex.join(["reprise", *words])):  # what run folders will name
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args) or 0
    except RepriseError as error:
        return _report(error, error.exit_code)
    except KeyboardInterrupt:
        return _stopped_at_once()
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:  # what nobody foresaw also ends in one message; the traceback on request
        return _report(_unexpected(error), 1)


def _stopped_at_once() -> int:
    """Ctrl-C without saving; a sweep's pool is not waited for at exit, because its workers end with this process."""
    from reprise.training.stopping import is_ctrl_c_ignored

    code = _report(RepriseError("stopped", next_step="run the same command again; it continues"), 130)
    if is_ctrl_c_ignored():
        sys.stdout.flush()
        os._exit(code)
    return code


def _report(error: RepriseError, code: int) -> int:
    if os.environ.get("REPRISE_TRACEBACK"):
        import traceback

        traceback.print_exc()
    print(f"reprise: {error}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> RepriseError:
    return RepriseError(
        f"{type(error).__name__}: {error}",
        next_step="repeat with --traceback (or REPRISE_TRACEBACK=1) to see where it happened",
    )


def train(args: argparse.Namespace) -> int:
    """One run, or a sweep with -m."""
    from reprise.app import run_hydra
    from reprise.config import job_overrides

    flags, overrides = _split(args.rest)
    if {"-m", "--multirun"} & set(flags):
        return _finish_sweep(run_hydra(overrides, flags), verdicts=False)
    metrics = run_hydra(job_overrides(overrides), flags)
    if metrics is not None:
        for name, value in metrics.items():
            print(f"{name:<32} {value:.6g}")
    return 0


def sweep(args: argparse.Namespace) -> int:
    """An ablation or any other sweep: a multirun; with search=METRIC Optuna chooses the values."""
    from reprise.app import run_hydra
    from reprise.config import split_override

    flags, overrides = _split(args.rest)
    searches = [item for item in overrides if split_override(item)[0] == "search"]
    if searches:
        from reprise.search.options import read_options

        if args.dry_run:
            raise RepriseError(
                "a search cannot list its runs before it makes them", looked_at="--dry-run", next_step="leave it out"
            )
        others = [item for item in overrides if item not in searches]
        return _run_search(flags, others, read_options(searches[-1]))
    dry = ["hydra.sweeper.dry_run=true"] if args.dry_run else []
    return _finish_sweep(run_hydra([*overrides, *dry], [*flags, "--multirun"]), verdicts=False)


def reproduce(args: argparse.Namespace) -> int:
    """All arms and seeds of a claim, then the verdict and the report."""
    from reprise.app import run_hydra
    from reprise.config import experiment_of, split_override

    flags, overrides = _split(args.rest)
    experiment_of(overrides)
    extra = ["hydra.sweeper.claim=true", *(["hydra.sweeper.dry_run=true"] if args.dry_run else [])]
    outcome = run_hydra([*overrides, *extra], [*flags, "--multirun"])
    named = any(split_override(item)[0] == "seed" for item in overrides)
    return _finish_sweep(outcome, verdicts=True, named_seeds=named)


def search(args: argparse.Namespace) -> int:
    """Another name for sweep with search=METRIC: Optuna chooses, by validation and on seeds from 100 up."""
    flags, overrides = _split(args.rest)
    options = {
        "metric": args.metric,
        "direction": "minimize" if args.minimize else "maximize",
        "trials": args.trials,
        "parallel": args.parallel,
    }
    return _run_search(flags, overrides, options)


def _run_search(flags: Sequence[str], overrides: Sequence[str], options: Mapping[str, Any]) -> int:
    from rich.console import Console

    from reprise.app import run_hydra
    from reprise.config import experiment_of
    from reprise.search.loop import render
    from reprise.search.options import to_override
    from reprise.search.study import require_optuna

    require_optuna()
    experiment_of(overrides)
    outcome = run_hydra([*overrides, to_override(options)], [*flags, "--multirun"])
    Console().print(render(outcome))
    print(f"{outcome.folder}: trials.csv, search.json and the run folders")
    for failure in outcome.failures:
        print(f"reprise: {failure}", file=sys.stderr)
    if outcome.stopped:
        from reprise.training.stopping import kind_of_stop

        raise kind_of_stop(outcome.stopped)("the search was stopped", next_step="run the same command again to go on")
    return 0 if outcome.best else 1


def _finish_sweep(outcome: object, *, verdicts: bool, named_seeds: bool = False) -> int:
    from reprise.training.jobs import SweepOutcome

    if not isinstance(outcome, SweepOutcome) or outcome.dry_run:
        return 0
    if verdicts:
        _count_time(outcome)
    if outcome.stopped:
        from reprise.training.stopping import kind_of_stop

        done = sum(job.finished for job in outcome.jobs)
        raise kind_of_stop(outcome.stopped)(
            f"stopped; {done} of {len(outcome.jobs)} runs are finished and the others saved where they were",
            next_step="run the same command again to go on",
        )
    if verdicts:
        _conclude(outcome, named_seeds=named_seeds)
    for job, reason in outcome.failed:
        print(f"reprise: {job.name} did not finish: {reason}", file=sys.stderr)
    if outcome.failed:
        print(
            f"reprise: {len(outcome.failed)} of {len(outcome.jobs)} runs did not finish; the others are kept\n"
            "  next step: correct the cause and run the same command again; it does only what is missing",
            file=sys.stderr,
        )
    return 1 if outcome.failed else 0


def _count_time(outcome: SweepOutcome) -> None:
    """What the sweep took belongs to what its verdict took, also when it was stopped and another one goes on."""
    from reprise import paths
    from reprise.evidence.sweeps import add_sweep

    runs = paths.runs_dir()
    for slug, scale in dict.fromkeys((job.slug, job.scale) for job in outcome.asked):
        if outcome.seconds and (runs / slug / scale).is_dir():
            add_sweep(runs, slug, scale, seconds=outcome.seconds, jobs_at_once=outcome.jobs_at_once)


def _conclude(outcome: SweepOutcome, *, named_seeds: bool) -> None:
    """Verdicts and reports of a sweep; seeds that the user named are judged in place of the claim's."""
    from rich.console import Console

    from reprise import paths
    from reprise.config import compose_job
    from reprise.evidence.panel import render_panel
    from reprise.evidence.report import build_index, build_report
    from reprise.evidence.verdict import make_verdict
    from reprise.training.mirrors import mirror_conclusion

    console = Console()
    runs = paths.runs_dir()
    for slug, scale in dict.fromkeys((job.slug, job.scale) for job in outcome.asked):
        own = [job for job in outcome.asked if (job.slug, job.scale) == (slug, scale)]
        if not any(job.finished for job in own):
            continue
        seeds = {scale: sorted({job.seed for job in own})} if named_seeds else {}
        verdict = make_verdict(runs, slug, scale, seeds.get(scale))
        example = own[0]
        mirror_conclusion(compose_job(example.overrides), verdict.model_dump(mode="json"), runs / slug / scale)
        console.print(render_panel(verdict))
        console.print(f"report: {build_report(runs, slug, seeds)}")
    build_index(runs)


def report(args: argparse.Namespace) -> int:
    """Rebuild reports (and with --write the committed RESULTS.md) from run folders."""
    from reprise import discovery, paths
    from reprise.evidence.report import build_index, build_report
    from reprise.evidence.results import write_results
    from reprise.evidence.runs import find_runs, scale_labels

    runs = args.path or paths.runs_dir()
    if not runs.is_dir():
        raise RepriseError("there are no run folders", looked_at=runs, next_step="make reproduce PAPER=vit")
    found = [slug for slug in discovery.papers() if scale_labels(runs, slug)]
    chosen = [discovery.check_paper(args.paper)] if args.paper else found
    if not chosen:
        raise RepriseError(
            "no report was built: the folder holds no run folders of any paper",
            looked_at=runs.resolve(),
            next_step="name the folder that holds <paper>/<scale>/<arm>/seed=<n> (such as runs)",
        )
    for slug in chosen:
        print(build_report(runs, slug))
        if args.write and (args.paper or any(run.is_finished for run in find_runs(runs, slug))):
            print(write_results(runs, slug))
    print(build_index(runs))
    return 0


def parity(args: argparse.Namespace) -> int:
    """Run golden cases of official code against our implementations."""
    from rich.console import Console

    from reprise.evidence import parity as runner

    results = runner.run_parity(args.dir, args.paper)
    if args.json:
        print(runner.to_json(results))
    else:
        runner.print_results(results, Console())
    if args.write:
        runner.write_records(results)
    return 0 if results and all(result.passed for result in results) else 1


def plan(args: argparse.Namespace) -> int:
    """What a recipe needs and whether the model has its published size."""
    from rich.console import Console

    from reprise.evidence import plan as planner

    _, overrides = _split(args.rest)
    result = planner.plan_experiment(overrides)
    print(planner.to_json(result)) if args.json else Console().print(planner.render(result))
    if args.write:
        planner.write_sizes(result)
    return 0 if result.ok else 1


def papers(args: argparse.Namespace) -> int:
    """A row a paper: scales, golden cases, sizes, verdicts."""
    from reprise.evidence import table

    rows = table.papers_table()
    if args.json:
        print(table.to_json(rows))
    elif args.markdown:
        print(table.to_markdown(rows))
    else:
        from rich.console import Console

        console = Console()
        console.print(table.render(rows, console.width))
    return 0


def data(args: argparse.Namespace) -> int:
    """List, check, fetch or show data sets."""
    from reprise.data import commands

    return commands.run(args.action, args.name, out=args.out, as_json=args.json)


def weights(args: argparse.Namespace) -> int:
    """Import official weights under our key names."""
    from reprise.training.weights import import_weights_file

    _, overrides = _split(args.rest)
    options = dict(item.partition("=")[::2] for item in overrides if item.startswith(("src=", "out=")))
    missing = [name for name in ("src", "out") if name not in options]
    if missing:
        raise RepriseError(
            f"{' and '.join(missing)} not given",
            next_step="reprise weights import experiment=detr/paper src=FILE out=FILE.safetensors",
        )
    others = [item for item in overrides if not item.startswith(("src=", "out="))]
    count = import_weights_file(others, Path(options["src"]), Path(options["out"]))
    print(f"{count} tensors -> {options['out']}")
    return 0


def new_paper(args: argparse.Namespace) -> int:
    """Make the files of a paper that composes, runs and is collected by every test."""
    import tempfile

    from reprise.scaffold import make_paper
    from reprise.training.golden_losses import record

    for path in make_paper(args.slug):
        print(path)
    with tempfile.TemporaryDirectory() as runs:
        os.environ["REPRISE_RUNS"] = runs
        print(record(args.slug))
    print(f"next: make reproduce PAPER={args.slug} ARGS=smoke=true")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has: versions, devices, data sets, loggers."""
    from reprise.doctor import diagnose

    findings = diagnose()
    lines = [f"{name:<22} {value}" for name, value in findings.items()]
    print(json.dumps(findings, indent=1) if args.json else "\n".join(lines))
    return 0


def _split(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """(Hydra's flags with their values, overrides)."""
    flags, overrides = [], []
    words = iter(rest)
    for word in words:
        if word.startswith("-") and word != "-":
            flags.append(word)
            if word in ("--cfg", "-c", "--package", "-p", "--info", "-i"):
                flags.append(next(words, ""))
        else:
            overrides.append(word)
    return flags, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reprise", description="Reproduce deep-learning papers, with a verdict.")
    parser.add_argument(TRACEBACK, action="store_true", help="show Python tracebacks of errors (anywhere in the line)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, *, overrides: bool = False) -> argparse.ArgumentParser:
        doc = (run.__doc__ or "").strip()
        command = commands.add_parser(name, help=doc, description=doc, epilog=HYDRA_HELP if overrides else None)
        command.set_defaults(run=run, takes_overrides=overrides)
        return command

    add("train", train, overrides=True)
    for name, run in (("reproduce", reproduce), ("sweep", sweep)):
        add(name, run, overrides=True).add_argument("--dry-run", action="store_true", help="list the runs, start none")
    command = add("search", search, overrides=True)
    command.add_argument("--metric", required=True, help="the validation metric that chooses, e.g. val/accuracy")
    command.add_argument("--minimize", action="store_true", help="less of it is better")
    command.add_argument("--trials", type=int, default=20, help="in all, those of earlier starts included (20)")
    command.add_argument("--parallel", type=int, help="trials at the same time (one a core); proposals depend on it")
    command = add("report", report)
    command.add_argument("path", nargs="?", type=Path, help="folder of run folders (default: runs/)")
    command.add_argument("--paper", help="only this paper")
    command.add_argument("--write", action="store_true", help="also write experiments/<slug>/RESULTS.md")
    command = add("parity", parity)
    command.add_argument("dir", type=Path, help="folder with golden cases")
    command.add_argument("--paper", help="only this paper's cases")
    command.add_argument("--write", action="store_true", help="record the result in experiments/<slug>/PARITY.json")
    command.add_argument("--json", action="store_true")
    command = add("plan", plan, overrides=True)
    command.add_argument("--write", action="store_true", help="record the sizes in experiments/<slug>/SIZES.json")
    command.add_argument("--json", action="store_true")
    command = add("papers", papers)
    command.add_argument("--json", action="store_true")
    command.add_argument("--markdown", action="store_true", help="as a Markdown table (the README's)")
    command = add("data", data)
    command.add_argument("action", choices=("list", "check", "fetch", "show"))
    command.add_argument("name", nargs="?", help="data set")
    command.add_argument("--out", type=Path, help="file to write (show; by default in the cache)")
    command.add_argument("--json", action="store_true")
    command = add("weights", weights, overrides=True)
    command.add_argument("action", choices=("import",))
    add("new-paper", new_paper).add_argument("slug", help="folder name: lower case letters, digits and _")
    add("doctor", doctor).add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
