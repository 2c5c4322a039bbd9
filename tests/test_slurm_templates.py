"""scripts/slurm: a run or sweep that asks for another start is requeued, any other end is final."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from reprise import paths
from reprise.errors import InterruptedRunError, PreemptedRunError, RepriseError

TEMPLATES = paths.root() / "scripts" / "slurm"
WORDS = {"train": ["experiment=x/small"], "reproduce": ["x", "small"], "train_nodes": ["experiment=x/small"]}
# Stands for `reprise train`: saves for a moment after the signal, then ends with code 75.
SAVES = """#!/bin/bash
trap 'sleep 0.3; exit 75' USR1
touch started
while true; do sleep 0.05; done
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with Slurm commands: one that notes what it was asked, one that runs a command (once)."""
    script(tmp_path / "bin" / "scontrol", '#!/bin/bash\necho "$@" > asked\n')
    script(tmp_path / "bin" / "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (tmp_path / "scripts").symlink_to(TEMPLATES.parent, target_is_directory=True)
    return tmp_path


def submit(cluster: Path, program: str, name: str = "train") -> subprocess.Popen[bytes]:
    script(cluster / ".venv" / "bin" / "reprise", program)
    environment = {**os.environ, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    command = ["bash", str(TEMPLATES / f"{name}.sbatch"), *WORDS[name]]
    return subprocess.Popen(command, cwd=cluster, env=environment)


@pytest.mark.parametrize(("name", "signals"), [("train", 1), ("train", 2), ("train_nodes", 1), ("reproduce", 1)])
def test_preemption_requeues(cluster: Path, name: str, signals: int) -> None:
    job = submit(cluster, SAVES, name)
    while not (cluster / "started").exists():
        time.sleep(0.02)
    for _ in range(signals):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert job.wait(20) == PreemptedRunError.exit_code == 75
    assert (cluster / "asked").read_text() == "requeue 17\n"


def test_a_signal_before_the_run_listens_requeues(cluster: Path) -> None:
    job = submit(cluster, "#!/bin/bash\ntouch started\nexec sleep 20\n")
    while not (cluster / "started").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 128 + signal.SIGUSR1
    assert (cluster / "asked").read_text() == "requeue 17\n"


@pytest.mark.parametrize("code", [0, RepriseError.exit_code, InterruptedRunError.exit_code])
def test_any_other_end_is_final(cluster: Path, code: int) -> None:
    assert submit(cluster, f"#!/bin/bash\nexit {code}\n").wait(20) == code
    assert not (cluster / "asked").exists()


@pytest.mark.parametrize("name", WORDS)
def test_slurm_is_asked_to_signal_the_script_and_to_requeue(name: str) -> None:
    text = (TEMPLATES / f"{name}.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@120\n" in text
    assert "#SBATCH --requeue\n" in text


def test_two_nodes_are_said_to_srun_and_to_the_run_alike(cluster: Path) -> None:
    assert submit(cluster, '#!/bin/bash\necho "$@" > words\n', "train_nodes").wait(20) == 0
    assert (cluster / "words").read_text() == "train trainer.num_nodes=2 trainer.devices=8 experiment=x/small\n"
