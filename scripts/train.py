#!/usr/bin/env python
"""The same as `reprise train`: python scripts/train.py experiment=vit/small seed=3"""

import sys

from reprise.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
