"""One log format for both services: time, level, service, message."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import BeforeValidator

LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda name: str(name).upper())
]


def configure_logging(service: str, level: str = "INFO") -> None:
    """Log to stderr, one line per event. `level` applies to Tandem; libraries log from WARNING."""
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in ("services", "shared"):
        logging.getLogger(name).setLevel(level)
