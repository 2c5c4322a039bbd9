"""The same sweeps under every launcher, and what becomes of them when workers, nodes and pools die."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from reprise.cli import main
from reprise.config import compose
from reprise.training.ownership import LOOK_EVERY, is_alive
from reprise.training.ray_jobs import resources_of

pytestmark = pytest.mark.slow

SMOKE = ("experiment=vit/small", "smoke=true", "arm=vit_100")
LONG = ("steps=160", "val_every=160", "callbacks.checkpoint.every_steps=10")  # long enough to be hit
RAY = "hydra/launcher=ray"
PATIENCE = 600.0  # a busy machine may need minutes to start a few processes


@pytest.fixture
def runs() -> Path:
    return Path(os.environ["REPRISE_RUNS"])


@pytest.fixture
def with_ray() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(autouse=True)
def fresh_workers() -> None:
    """joblib keeps its worker processes, with the environment of an earlier test."""
    get_reusable_executor().shutdown(wait=True)


def metrics(runs: Path) -> dict[str, dict[str, float]]:
    return {path.parent.name: json.loads(path.read_text())["metrics"] for path in runs.rglob("summary.json")}


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_child_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()


def start(
    runs: Path,
    *overrides: str,
    before: tuple[str, ...] = (),
    verb: str = "sweep",
    start_new_session: bool = False,
    **environment: str,
) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "reprise.cli", verb, *SMOKE, *overrides]
    given = {**os.environ, "REPRISE_RUNS": str(runs), "REPRISE_JOBS": "2", **environment}
    child = subprocess.Popen(
        command,
        env=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )
    STARTED.append(child)
    return child


def wait_for(what: Callable[[], object], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"did not happen in time: {what}"
        if child.poll() is not None:
            assert child.stderr is not None
            pytest.fail(child.stderr.read())
        time.sleep(0.05)


def parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        found[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    return found


def descendants(root: int) -> list[int]:
    known = parents()
    found, layer = [], [root]
    while layer:
        layer = [pid for pid, parent in known.items() if parent in layer]
        found += layer
    return found


def titled(root: int, start_of_title: str) -> list[int]:
    """The processes below `root` whose command line begins with a text."""
    found = []
    for pid in descendants(root):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(start_of_title.encode()):
                found.append(pid)
        except OSError:
            continue
    return found


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = child.communicate(timeout=PATIENCE)
    return child.returncode, errors


def checkpointed(runs: Path, seed: int) -> bool:
    return any(runs.rglob(f"seed={seed}/checkpoints/step=*.ckpt"))


def test_a_job_asks_ray_for_the_devices_of_its_trainer() -> None:
    on_cpus = compose([*SMOKE, "trainer=ddp_cpu", "threads=2"])
    assert resources_of(on_cpus) == {"CPU": 4.0}
    assert resources_of(compose([*SMOKE, "trainer=ddp"])) == {"CPU": 8.0, "GPU": 8.0}


@pytest.mark.usefixtures("with_ray")
def test_ray_gives_the_numbers_of_local_processes(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["sweep", *SMOKE, "seed=100,101", RAY]) == 0
    there = metrics(runs)
    assert len(there) == 2
    assert main(["sweep", *SMOKE, "seed=100,101", RAY]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().err
    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path))
    assert main(["sweep", *SMOKE, "seed=100,101", "hydra/launcher=basic"]) == 0
    assert metrics(tmp_path) == there


@pytest.mark.usefixtures("with_ray")
def test_several_ranks_are_one_job_on_ray(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRISE_JOBS", "1")
    assert main(["train", "-m", *SMOKE, "seed=100", "trainer=ddp_cpu", RAY]) == 1
    assert "asks for 2 CPU on one node, and no node of the Ray cluster has as many" in capsys.readouterr().err
    monkeypatch.setenv("REPRISE_JOBS", "2")
    assert main(["train", "-m", *SMOKE, "seed=100", "trainer=ddp_cpu", RAY]) == 0
    assert len(metrics(runs)) == 1


@pytest.mark.usefixtures("with_ray")
def test_a_killed_ray_worker_costs_one_job_or_none(tmp_path: Path) -> None:
    words = (*LONG, "seed=100,101", RAY)
    child = start(tmp_path, *words, "hydra.launcher.max_retries=0")
    wait_for(lambda: checkpointed(tmp_path, 100), child)
    os.kill(titled(child.pid, "ray::vit/small vit_100 seed=100")[0], signal.SIGKILL)
    code, errors = finish(child)
    assert code == 1
    assert "seed=100 did not finish: the job's worker or node died" in errors
    assert "1 of 2 runs did not finish" in errors
    assert list(metrics(tmp_path)) == ["seed=101"]

    other = tmp_path / "other"
    child = start(other, *words)
    wait_for(lambda: checkpointed(other, 101), child)
    os.kill(titled(child.pid, "ray::vit/small vit_100 seed=101")[0], signal.SIGKILL)
    assert finish(child)[0] == 0, "with retries the sweep survives"
    assert set(metrics(other)) == {"seed=100", "seed=101"}
    assert metrics(other)["seed=101"] == metrics(tmp_path)["seed=101"], "and the numbers are the same"


@pytest.mark.usefixtures("with_ray")
def test_ctrl_c_saves_the_running_ray_jobs_and_starts_no_other(tmp_path: Path) -> None:
    child = start(tmp_path, "steps=2000", "val_every=2000", "seed=100,101,102", RAY, REPRISE_JOBS="1")
    wait_for(lambda: list(tmp_path.rglob("progress.json")), child)
    child.send_signal(signal.SIGINT)
    code, errors = finish(child)
    assert code == 130, errors
    assert "run the same command again to go on" in errors
    assert len(list(tmp_path.rglob("step=*.ckpt"))) == 1
    statuses = [json.loads(path.read_text())["status"] for path in tmp_path.rglob("run.json")]
    assert statuses == ["interrupted"]


def test_ctrl_c_again_and_again_stops_the_local_pool_at_once(tmp_path: Path) -> None:
    child = start(tmp_path, "steps=3000", "val_every=3000", "seed=100,101,102", start_new_session=True)
    wait_for(lambda: len(list(tmp_path.rglob("progress.json"))) == 2, child)
    below = descendants(child.pid)
    for _ in range(
        6
    ):  # as a terminal does: to every process of the group, also to one that a pool starts to end others
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.05)
    code, errors = finish(child)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    time.sleep(2 * LOOK_EVERY)
    assert not list(filter(is_alive, below))


def test_a_killed_process_of_the_local_pool_is_started_again(tmp_path: Path) -> None:
    child = start(tmp_path, *LONG, "seed=100,101")
    wait_for(lambda: list(tmp_path.rglob("step=*.ckpt")), child)
    workers = [pid for pid in descendants(child.pid) if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    code, errors = finish(child)
    assert code == 0, errors
    assert set(metrics(tmp_path)) == {"seed=100", "seed=101"}


@pytest.mark.parametrize("how", [("seed=100,101",), ("seed=100", "trainer=ddp_cpu", "hydra/launcher=basic")])
def test_a_killed_sweep_leaves_nothing_behind_and_goes_on(tmp_path: Path, how: tuple[str, ...]) -> None:
    runs, whole = tmp_path / "runs", tmp_path / "whole"
    child = start(runs, *LONG, *how)
    wait_for(lambda: list(runs.rglob("step=*.ckpt")), child)
    below = descendants(child.pid)
    assert below
    child.kill()  # its children, some in sessions of their own, get no signal
    child.wait()
    code, errors = finish(start(runs, *LONG, *how))
    assert code == 0, errors
    assert not list(filter(is_alive, below))
    run = json.loads(next(runs.rglob("run.json")).read_text())
    assert run["seconds"] > 0
    assert finish(start(whole, *LONG, *how))[0] == 0
    assert metrics(runs) == metrics(whole)


@pytest.mark.parametrize(("number", "verb"), [(signal.SIGTERM, "sweep"), (signal.SIGUSR1, "reproduce")])
def test_a_pre_empted_sweep_saves_its_jobs_and_asks_for_another_start(
    tmp_path: Path, number: signal.Signals, verb: str
) -> None:
    child = start(tmp_path, "steps=3000", "val_every=3000", "seed=100,101,102", verb=verb)
    wait_for(lambda: len(list(tmp_path.rglob("progress.json"))) == 2, child)
    child.send_signal(number)  # to the sweep alone
    code, errors = finish(child)
    assert code == 75, errors
    assert "run the same command again to go on" in errors
    assert len(list(tmp_path.rglob("step=*.ckpt"))) == 2
    assert {json.loads(path.read_text())["exit_code"] for path in tmp_path.rglob("run.json")} == {75}
    assert not list((tmp_path / ".stops").iterdir())
    if verb == "reproduce":  # the time counts towards that of the verdict
        assert json.loads(next(tmp_path.rglob("sweep.json")).read_text())["seconds"] > 0


def test_a_lost_job_of_submitit_costs_no_other(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    submitit = ("hydra/launcher=submitit_local", f"hydra.launcher.submitit_folder={tmp_path}/jobs")
    child = start(tmp_path, *LONG, "seed=100,101", *submitit, "hydra.launcher.timeout_min=5")
    wait_for(lambda: checkpointed(tmp_path, 100), child)
    lock = next(tmp_path.rglob(".seed=100.lock"))
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    code, errors = finish(child)
    assert code == 1
    assert "seed=100 did not finish: the cluster lost the job" in errors
    assert "1 of 2 runs did not finish" in errors
    assert list(metrics(tmp_path)) == ["seed=101"]


NODES = {"a": "10.213.77.1", "b": "10.213.77.2"}
PORT = "6399"


def run(*words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run(words, env=given, capture_output=True, text=True, check=check, timeout=PATIENCE)


def inside(node: str) -> tuple[str, ...]:
    return "ip", "netns", "exec", f"reprise-{node}"


@pytest.fixture
def two_namespaces() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    if shutil.which("ip") is None or run("ip", "netns", "add", "reprise-a", check=False).returncode:
        pytest.skip("network namespaces are not permitted here (ip netns add)")
    try:
        run("ip", "netns", "add", "reprise-b")
        run("ip", "link", "add", "reprise-a", "type", "veth", "peer", "name", "reprise-b")
        for node, address in NODES.items():
            run("ip", "link", "set", f"reprise-{node}", "netns", f"reprise-{node}")
            run(*inside(node), "ip", "address", "add", f"{address}/24", "dev", f"reprise-{node}")
            for device in ("lo", f"reprise-{node}"):
                run(*inside(node), "ip", "link", "set", device, "up")
        yield
    finally:
        for node in NODES:
            kill_node(node)
            run("ip", "netns", "delete", f"reprise-{node}", check=False)


def kill_node(node: str) -> None:
    """Everything that runs in the namespace dies at once."""
    for pid in run("ip", "netns", "pids", f"reprise-{node}", check=False).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def start_node(node: str, folder: Path, **secret: str) -> None:
    ray = (*inside(node), str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--disable-usage-stats")
    common = (f"--node-ip-address={NODES[node]}", f"--object-store-memory={100 * 2**20}")
    head = ("--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}")
    quick = {"RAY_health_check_failure_threshold": "3", "RAY_health_check_period_ms": "1000"}
    run(*ray, *common, *(head if node == "a" else (f"--address={NODES['a']}:{PORT}",)), **quick, **secret)


@pytest.mark.usefixtures("with_ray")
def test_a_sweep_survives_the_death_of_a_node(two_namespaces: None, tmp_path: Path) -> None:
    folder = Path("/tmp") / f"reprise-ray-{os.getpid()}"  # short: the paths of sockets are limited
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        for node in NODES:
            start_node(node, folder, **secret)
        words = (*LONG, "seed=100,101,102", RAY, f"hydra.launcher.address={NODES['a']}:{PORT}")
        child = start(tmp_path, *words, before=inside("a"), **secret)
        wait_for(lambda: len({path.parent for path in tmp_path.rglob("step=*.ckpt")}) == 2, child)
        run(*inside("b"), "ip", "link", "set", "reprise-b", "down")  # no farewell reaches the others
        kill_node("b")
        code, errors = finish(child)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert code == 0, errors
    assert set(metrics(tmp_path)) == {"seed=100", "seed=101", "seed=102"}
