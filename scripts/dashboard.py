#!/usr/bin/env python
"""Build the W&B workspace and report of a paper whose runs were mirrored (logger=wandb).

python scripts/dashboard.py vit small --entity ME [--project reprise]
python scripts/dashboard.py vit small --json            # the specification alone, without W&B
"""

from __future__ import annotations

import argparse
import json
import sys

from reprise import discovery, paths
from reprise.errors import RepriseError
from reprise.evidence.dashboard import publish, specification


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper")
    parser.add_argument("scale", nargs="?", default="small")
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument("--project", default="reprise")
    parser.add_argument("--json", action="store_true", help="print the specification and publish nothing")
    args = parser.parse_args()
    try:
        spec = specification(paths.runs_dir(), discovery.check_paper(args.paper), args.scale)
        if args.json:
            print(json.dumps(spec, indent=1))
        elif args.entity is None:
            raise RepriseError("no W&B entity is named", next_step="add --entity USER_OR_TEAM, or --json")
        else:
            print("\n".join(publish(spec, args.project, args.entity)))
    except RepriseError as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
