"""`python -m truing`: the command line, as `truing` starts it."""

from __future__ import annotations

import sys

from truing.cli import main

if __name__ == "__main__":
    sys.exit(main())
