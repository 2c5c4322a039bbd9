#!/usr/bin/env python
"""The same as `reprise reproduce`: python scripts/reproduce.py experiment=vit/small"""

import sys

from reprise.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
