"""Whatever a user does wrong ends in one clear message, a non-zero exit and no traceback; finished runs stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reprise import config as configuration
from reprise.cli import main
from reprise.training.runfolder import write_json
from tests.cross.support import run_child, smoke_config, write_config


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must fail."""
    code = main(list(argv))
    message = capsys.readouterr().err
    assert code != 0
    assert "Traceback" not in message
    assert message.count("reprise:") == 1, message
    return message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "no experiment is named"),
        (["experiment=vitt/small"], "vit"),
        (["experiment=vit/smal"], "did you mean small"),
        (["experiment=vit/claim"], "no recipe 'claim'"),
        (["experiment=vit/small", "arm=nonsense"], "has no arm 'nonsense'"),
        (["experiment=vit/small", "paper.modle.depth=3"], "modle"),
        (["experiment=vit/small", "+paper.modle=3"], "modle"),
        (["experiment=vit/small", "steps=many"], "steps must be int, not 'many'"),
        (["experiment=vit/small", "steps=0"], "steps must be 1 or more, not 0"),
        (["experiment=vit/small", "steps=-3"], "steps must be 1 or more, not -3"),
        (["experiment=vit/small", "val_every=0"], "val_every must be 1 or more, not 0"),
        (["experiment=vit/small", "trainer.precision=12"], "choose one of: 32-true, bf16-mixed"),
        (
            ["experiment=vit/small", "optimizer.lrr=0.1"],
            "no configuration key optimizer.lrr (did you mean optimizer.lr",
        ),
        (["experiment=vit/small", "optimiser=sgd"], "did you mean optimizer"),
        (["experiment=vit/small", "optimizer.unheard_of=0.1"], "+optimizer.unheard_of=... adds it"),
        (["experiment=vit/small", "trainer=nope"], "choose one of: cpu, ddp, ddp_cpu, fsdp, fsdp_cpu, gpu"),
        (["experiment=vit/small", "trainer=fspd"], "no trainer=fspd (did you mean fsdp"),
        (["experiment=vit/small", "seed=1,2"], "`reprise train -m ...` makes all of them"),
        (["experiment=vit/small", "+typo=3"], "nothing reads the configuration key typo"),
        (["experiment=vit/small", "paper._target_=os.system"], "'os.system' is not allowed"),
        (["experiment=vit/small", "data=unheard_of"], "unheard_of"),
        (["experiment=vit/small", "trainer.devices=auto"], "must be a number"),
        (["experiment=vit/small", "trainer.devices=0"], "must be a number from 1 up, not 0"),
        (["experiment=vit/small", "trainer=ddp_cpu", "trainer.num_nodes=2"], "scripts/slurm/train_nodes.sbatch"),
        (["experiment=vit/small", "+optimizer.typo=1"], "the optimizer cannot be built"),
        (["experiment=vit/small", "data.batch_size=many"], "data.batch_size must be a whole number, not 'many'"),
        (["experiment=vit/small", "data.batch_size=2.5"], "data.batch_size must be a whole number, not 2.5"),
        (["experiment=vit/small", "data.batch_size=0"], "data.batch_size must be 1 or more, not 0"),
        (["experiment=vit/small", "data.eval_batch_size=0"], "data.eval_batch_size must be 1 or more, not 0"),
        (["experiment=vit/small", "data.limit=x"], "data.limit must be a whole number or null, not 'x'"),
        (["experiment=vit/small", "data.seed=x"], "data.seed must be a whole number, not 'x'"),
        (["experiment=vit/small", "optimizer.lr=abc"], "optimizer.lr must be a number, not 'abc'"),
        (["experiment=vit/small", "optimizer.lr=-1"], "looked at: optimizer.lr=-1"),
        (["experiment=vit/small", "optimizer.weight_decay=-1"], "looked at: optimizer.weight_decay=-1"),
        (["experiment=sam/small", "optimizer.lr=abc"], "optimizer.lr"),
        (["experiment=vit/small", "schedule.warmup_steps=x"], "schedule.warmup_steps must be a whole number, not 'x'"),
    ],
)
def test_configuration_mistakes(capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str) -> None:
    assert expected in fails(capsys, "train", *overrides)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiment=detr/ablations/nope"], "choose one of: small, public, paper, ablations/aux_loss"),
        (["experiment=vit/small,vit/nope"], "has no recipe 'nope'"),
        (["experiment=vit/small", "seed=100,101", "optimizer.lrr=0.1,0.2"], "did you mean optimizer.lr"),
    ],
)
def test_mistakes_in_a_sweep(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    message = fails(capsys, "sweep", *words)
    assert expected in message
    assert "Config search path" not in message


@pytest.mark.parametrize(
    "words", [["train"], ["reproduce"], ["sweep"], ["search", "--metric", "val/accuracy", "optimizer.lr=interval(0,1)"]]
)
def test_no_place_for_run_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path / "file" / "runs"))
    message = fails(capsys, *words, "experiment=vit/small", "smoke=true")
    assert "cannot be written" in message
    assert "REPRISE_RUNS" in message


def test_missing_data_names_the_place_and_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    message = fails(capsys, "train", "experiment=vit/public", "smoke=true")
    assert str(tmp_path) in message
    assert "reprise data fetch cifar10" in message


@pytest.mark.parametrize(
    "mistake",
    [
        "data.batch_size=0",
        "optimizer.lr=-1",
        "+optimizer.typo=1",
        "paper.model.depth=x",
        "callbacks.checkpoint.every_steps=x",
        "data=cifar10",
        "trainer.precision=12",
    ],
)
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_run_that_cannot_be_built_neither_moves_a_finished_one_nor_leaves_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, trainer: str
) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    typed = ["experiment=vit/small", "smoke=true", "variant=mine", f"trainer={trainer}", mistake]
    folder = configuration.paths.runs_dir() / "vit" / "smoke~mine" / "vit" / "seed=0"
    fails(capsys, "train", *typed)
    assert not folder.exists()
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"status": "finished", "config_hash": "of another configuration"})
    fails(capsys, "train", *typed)
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == ["seed=0"]
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_checkpoint_of_another_paper(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    cfg = smoke_config("vit")
    folder = configuration.run_dir(cfg) / "checkpoints"
    folder.mkdir(parents=True)
    foreign = {"reprise": {"format": "reprise-1", "step": 2, "paper": "detr", "config_hash": "0" * 16}}
    torch.save(foreign, folder / "step=000000002.ckpt")
    message = fails(capsys, "train", "experiment=vit/small", "smoke=true")
    assert "belongs to another run" in message
    assert "paper=detr" in message


def test_unwritable_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("REPRISE_RUNS", str(file / "runs"))
    assert "cannot be written" in fails(capsys, "train", "experiment=vit/small", "smoke=true")


def test_a_nan_loss_stops_with_step_and_batch(tmp_path: Path) -> None:
    config = write_config(smoke_config("vit", "callbacks.checkpoint.every_steps=1"), tmp_path)
    fault = """
import torch.nn.functional as F
loss, calls = F.cross_entropy, []
def broken(*args, **kwargs):
    calls.append(1)
    return loss(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1)
F.cross_entropy = torch_loss = broken
import torch; torch.nn.functional.cross_entropy = broken
import reprise.training.classification as c; c.nn.functional.cross_entropy = broken
"""
    failed = run_child(config, tmp_path / "runs", fault=fault)
    assert failed.returncode == 1, failed.stderr
    assert "NaN or infinite at step 1" in failed.stderr
    assert "with the training items [" in failed.stderr
    assert "step=000000001.ckpt" in failed.stderr
    run = json.loads(next((tmp_path / "runs").rglob("run.json")).read_text())
    assert run["status"] == "failed"


NAN_ON_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import torch.nn.functional as F
    loss, calls = F.cross_entropy, []
    def broken(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1)
    F.cross_entropy = broken
"""


@pytest.mark.slow
def test_a_nan_on_another_rank_gives_one_message_with_step_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NAN_ON_RANK_1)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    config = write_config(smoke_config("vit", "trainer=ddp_cpu"), tmp_path)
    failed = run_child(config, tmp_path / "runs", fault="")
    assert failed.returncode == 1
    assert failed.stderr.startswith("the training loss became NaN or infinite at step 1, with the training items [")
    assert len(failed.stderr.splitlines()) == 3, failed.stderr
    folder = next((tmp_path / "runs").rglob("run.json")).parent
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["error"]) == ("failed", failed.stderr.strip())
    assert run["cpu_seconds"] > 0
    assert "Traceback" in (folder / "ranks.log").read_text(), "what the other rank met stays to be read"
    assert json.loads((folder / "error.rank=1.json").read_text())["kind"] == "DivergedError"


SLOW_STEPS = """
import time
from reprise.training.interrupt import StopBetweenSteps
def wait(self, *args): print("step", flush=True); time.sleep(0.5)
StopBetweenSteps.on_train_batch_end = wait
"""


def start_and_signal(config: Path, runs: Path, signals: list[signal.Signals]) -> tuple[int, str]:
    """Start a run, send signals once it trains, and return its exit code and messages."""
    from tests.cross.support import CHILD

    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(fault=SLOW_STEPS), str(config)],
        env={**os.environ, "REPRISE_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    for number in signals:
        child.send_signal(number)
        time.sleep(0.05)
    _, errors = child.communicate(timeout=120)
    return child.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_one_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    config = write_config(smoke_config("vit"), tmp_path)
    code, errors = start_and_signal(config, tmp_path / "runs", [number])
    assert code == expected
    assert f"stopped by {number.name} at step" in errors
    assert "run the same command again" in errors
    assert list((tmp_path / "runs").rglob("step=*.ckpt"))
    again = run_child(config, tmp_path / "runs")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    config = write_config(smoke_config("vit"), tmp_path)
    code, _ = start_and_signal(config, tmp_path / "runs", [signal.SIGINT, signal.SIGINT])
    assert code != 0
    assert not list((tmp_path / "runs").rglob("step=*.ckpt"))


def test_a_failed_run_loses_no_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["train", "-m", "experiment=vit/small", "smoke=true", "seed=0,1", "data.train_size=64,100000"]
    message_code = main([*argv, "hydra/launcher=basic"])
    message = capsys.readouterr().err
    assert message_code == 1
    assert "2 of 4 runs did not finish" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "argv", [["report", "no-such-folder"], ["parity", "no-such-folder"], ["data", "check", "nothing"]]
)
def test_other_commands(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    fails(capsys, *argv)
