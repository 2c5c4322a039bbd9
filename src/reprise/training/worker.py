"""One rank of a run: `torchrun ... -m reprise.training.worker runs/.../config.yaml`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from reprise.errors import RepriseError
from reprise.training.run import read_config, train


def main() -> int:
    """Train as one rank; the launching process reports the error that rank 0 leaves in run.json."""
    cfg = read_config(Path(sys.argv[1]))
    try:
        train(cfg, show_progress=os.environ.get("RANK") == "0")
    except RepriseError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
