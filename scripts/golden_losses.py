#!/usr/bin/env python
"""Record the first losses of papers (all, or those named): python scripts/golden_losses.py [SLUG ...]"""

from __future__ import annotations

import os
import sys
import tempfile

from reprise import discovery
from reprise.training.golden_losses import record

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as runs:
        os.environ["REPRISE_RUNS"] = runs
        for slug in sys.argv[1:] or discovery.papers():
            print(record(slug))
