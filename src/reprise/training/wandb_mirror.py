"""W&B as a mirror of the run folder: grouped by paper and scale, job type = arm, offline without a key.

W&B is never the only place of a number, and never a reason to stop: where it fails, the run goes on without it.
"""

from __future__ import annotations

import hashlib
import netrc
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.utilities import rank_zero_only

from reprise.training.recording import CurveLogger
from reprise.training.runfolder import RunFolder

PUBLIC_SERVER = "https://api.wandb.ai"
INIT_SECONDS, FINISH_SECONDS = 30.0, 120.0
SECRET = re.compile(r"(^|[._-])(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "[hidden]"
CONTRAST_COLUMNS = ("contrast", "claimed", "difference", "ci_low", "ci_high", "p", "seeds", "verdict")


def has_key() -> bool:
    """Whether a W&B key is configured by environment or netrc for the server in use (its value is not read further)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.exists() and netrc.netrc(path).authenticators(server()) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def server() -> str:
    """The host of W&B's API: that of WANDB_BASE_URL, or the public one."""
    address = os.environ.get("WANDB_BASE_URL") or PUBLIC_SERVER
    return urlsplit(address if "://" in address else f"https://{address}").hostname or ""


def wanted_mode() -> str:
    """What WANDB_MODE says; without it online where there is a key, else offline."""
    return os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")


def without_secrets(value: Any, name: str = "") -> Any:
    """The same configuration with values under secret-looking keys, and credentials in addresses, hidden."""
    if isinstance(value, Mapping):
        return {key: without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each, name) for each in value]
    if isinstance(value, str):
        return HIDDEN if SECRET.search(name) else CREDENTIALS.sub(f"{HIDDEN}@", value)
    return value


class WandbMirror(CurveLogger):
    """One W&B run a training run; it begins with the first value, and the same run goes on after a resume.

    Args:
        project, entity: where on W&B.
        tags: beside the paper and the scale.
        save_dir: the run folder; offline files lie in its `wandb/`.
        run_config: the resolved configuration, which becomes the run's config.
        scale: the scale as the run folder names it (a variant or a smoke run is a group of its own).
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        tags: Sequence[str],
        save_dir: str,
        run_config: Mapping[str, Any],
        scale: str,
    ) -> None:
        super().__init__()
        self.folder = RunFolder(Path(save_dir))
        slug, arm = str(run_config["slug"]), str(run_config["arm"])
        self._options = {
            "project": project,
            "entity": entity,
            "name": f"{arm} seed={run_config['seed']}",
            "group": f"{slug}/{scale}",
            "job_type": arm,
            "tags": list(dict.fromkeys([slug, scale, *tags])),
            "config": without_secrets(run_config),
            "dir": save_dir,
            "resume": "allow",
        }
        self._run: Any = None
        self._is_closed = False

    @property
    def name(self) -> str:
        return "wandb"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._is_closed:
            with self._sparing_the_run():
                self._started().log({**values, "step": step})

    @rank_zero_only
    def close(self, metrics: Mapping[str, float] | None) -> None:
        """End the run: with its results and pictures, or (None) as failed."""
        if metrics is None and self._run is None:
            return
        with self._sparing_the_run():
            if metrics is not None and not self._is_closed:
                run = self._started()
                run.summary.update({**metrics, "status": "finished"})
                self._send_pictures(run)
        with self._sparing_the_run():
            if self._run is not None:
                self._run.finish(exit_code=0 if metrics is not None else 1)
        self._is_closed = True

    def _started(self) -> Any:
        if self._run is None:
            known = self.folder.read("run.json") or {}
            facts = f"{self.folder.path.resolve()} {known.get('config_hash')} {known.get('started')}"
            self._run = start(id=hashlib.sha256(facts.encode()).hexdigest()[:16], **self._options)
            self._run.define_metric("*", step_metric="step")
        return self._run

    def _send_pictures(self, run: Any) -> None:
        import wandb

        listed = self.folder.path / "pictures" / "pictures.json"
        entries: Any = self.folder.read("pictures/pictures.json")
        images = {
            f"pictures/{entry['name']}": wandb.Image(str(listed.with_name(entry["file"])), caption=entry["caption"])
            for entry in entries or []
        }
        if images:
            run.log(images)

    @contextmanager
    def _sparing_the_run(self) -> Iterator[None]:
        """An error of W&B is told once and ends the mirror; training goes on."""
        try:
            yield
        except Exception as error:  # a mirror is never a reason to stop, whatever W&B raises
            if not self._is_closed:
                tell(f"the mirror stops here ({type(error).__name__}: {error}); the run folder has everything")
            self._is_closed = True


def start(**options: Any) -> Any:
    """A W&B run of its own, online where there is a key and the server answers, else offline."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=False,
    )
    mode: Any = wanted_mode()
    if mode == "offline":
        tell("this run is kept offline (no key, or WANDB_MODE=offline); `wandb sync` uploads it later")
        return wandb.init(mode="offline", reinit="create_new", settings=settings, **options)
    try:
        return wandb.init(mode=mode, reinit="create_new", settings=settings, **options)
    except wandb.Error as error:
        tell(f"the server cannot be used ({error}), so this run is kept offline; `wandb sync` uploads it later")
        return wandb.init(mode="offline", reinit="create_new", settings=settings, **options)


def tell(text: str) -> None:
    """A line for the user."""
    print(f"wandb: {text}", file=sys.stderr)


def mirror_verdict(
    verdict: Mapping[str, Any], folder: Path, *, project: str, entity: str | None, tags: Sequence[str]
) -> None:
    """The verdict as the summary run of its group: job type `verdict`, with a table of contrasts.

    A folder has one such run, which a repeated verdict goes on with; it is finished, as failed where sending failed.

    Args:
        verdict: the content of verdict.json.
        folder: `runs/<paper>/<scale>`.
    """
    import wandb

    slug, scale, primary = str(verdict["paper"]), str(verdict["scale"]), verdict["primary"]
    try:
        run = start(
            project=project,
            entity=entity,
            name=f"verdict {slug}/{scale}",
            group=f"{slug}/{scale}",
            job_type="verdict",
            tags=[slug, scale, "verdict", *tags],
            config={"paper": slug, "scale": scale, "statement": verdict["statement"]},
            dir=str(folder),
            id=hashlib.sha256(f"verdict {folder.resolve()}".encode()).hexdigest()[:16],
            resume="allow",
        )
        with _finished(run):
            run.log({"contrasts": wandb.Table(columns=list(CONTRAST_COLUMNS), data=contrast_rows(verdict))})
            low, high = primary["ci"] or (None, None)
            facts = {"verdict": verdict["verdict"], "reason": verdict["reason"], "difference": primary["mean"]}
            run.summary.update({**facts, "ci_low": low, "ci_high": high, "p": primary["p"], "seeds": primary["n"]})
    except Exception as error:  # as for runs: the verdict stands without W&B
        tell(f"the verdict is not mirrored ({type(error).__name__}: {error}); it stands in {folder / 'verdict.json'}")


@contextmanager
def _finished(run: Any) -> Iterator[None]:
    """The W&B run is finished on each way out."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def contrast_rows(verdict: Mapping[str, Any]) -> list[list[Any]]:
    """A row a contrast, as `CONTRAST_COLUMNS` names them."""
    rows = []
    for contrast in [verdict["primary"], *verdict["secondary"]]:
        low, high = contrast["ci"] or (None, None)
        is_more, margin = contrast["direction"] == "higher", contrast["margin"]
        claimed = f"> {margin}" if is_more else f"< {-margin if margin else margin}"
        values = [contrast["name"], claimed, contrast["mean"], low, high, contrast["p"], contrast["n"]]
        rows.append([*values, contrast["verdict"]])
    return rows
