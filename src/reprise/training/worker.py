"""One rank of a run: `torchrun ... -m reprise.training.worker runs/.../config.yaml`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from reprise.errors import RepriseError
from reprise.training.ownership import end_with
from reprise.training.run import read_config, train

LAUNCHER_VARIABLE = "REPRISE_LAUNCHER"  # the process that started the ranks, and that they shall not outlive


def main() -> int:
    """Train as one rank; the launching process reports the errors that the ranks leave in the run folder."""
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        end_with(int(launcher))
    cfg = read_config(Path(sys.argv[1]))
    try:
        train(cfg, show_progress=False, is_checked=True)
    except RepriseError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
