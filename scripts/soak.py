#!/usr/bin/env python
"""Kill smoke runs of every paper at random moments and see that none is lost: python scripts/soak.py --kills 50"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from reprise import discovery, paths
from reprise.evidence.files import write_text
from reprise.evidence.soak import PaperSoak, closing_line, passed, soak, to_markdown


def tell(paper: PaperSoak) -> None:
    print(closing_line([paper]).replace("1 papers", paper.slug), f"in {paper.seconds:.0f} s", flush=True)
    print(*paper.lost, *paper.mismatches, sep="\n", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--at-once", type=int, default=2, help="papers in parallel")
    parser.add_argument("--out", type=Path, default=paths.root() / "docs" / "soak.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = soak(discovery.papers(), args.kills, args.seed, Path(folder), at_once=args.at_once, tell=tell)
    command = f"python scripts/soak.py --kills {args.kills} --seed {args.seed}"
    print(write_text(args.out, to_markdown(results, command)))
    print(closing_line(results))
    return 0 if passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
