"""`python -m examples.online_dpo`: see README.md."""

from __future__ import annotations

import sys

from examples.runner import Example, main

EXAMPLE = Example(
    name="online_dpo",
    title="Sorting five digits: online DPO from a judge's preferences",
    unit="share as good as the answer",
    min_rise_points=25.0,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
