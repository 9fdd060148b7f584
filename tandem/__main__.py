"""`python -m tandem`: the same command line as the script `tandem`."""

from __future__ import annotations

import sys

from tandem.cli import main

if __name__ == "__main__":
    sys.exit(main())
