"""`python -m tandem`: the command line, as the script `tandem` runs it."""

from __future__ import annotations

import sys

from tandem.cli import main

if __name__ == "__main__":
    sys.exit(main())
