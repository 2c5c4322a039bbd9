"""scripts/slurm/train.sbatch: a run that asks for another start is requeued, any other end is final."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from reprise import paths
from reprise.errors import InterruptedRunError, PreemptedRunError, RepriseError

TEMPLATE = paths.root() / "scripts" / "slurm" / "train.sbatch"
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
    """A folder with a Slurm command that notes what it was asked."""
    script(tmp_path / "bin" / "scontrol", '#!/bin/bash\necho "$@" > asked\n')
    return tmp_path


def submit(cluster: Path, program: str) -> subprocess.Popen[bytes]:
    script(cluster / ".venv" / "bin" / "reprise", program)
    environment = {**os.environ, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    return subprocess.Popen(["bash", str(TEMPLATE), "experiment=x/small"], cwd=cluster, env=environment)


@pytest.mark.parametrize("signals", [1, 2])
def test_preemption_requeues(cluster: Path, signals: int) -> None:
    job = submit(cluster, SAVES)
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
