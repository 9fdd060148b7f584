"""`python -m services.trainer`: settings -> policy -> fleet -> app -> uvicorn."""

from __future__ import annotations

import logging
import os
import sys

from services.server import Server, read_settings
from services.trainer.app import create_app
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.auth import check_bind
from shared.logs import configure_logging


def main() -> int:
    settings = read_settings(TrainerSettings)
    configure_logging("trainer", settings.log_level)
    # It would fetch optional kernels from a hub, and warns at every start that it could not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        check_bind(settings.host, settings.api_key)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    trainer = Trainer(
        settings, on_exit=lambda code: server.exit(code), on_stuck=lambda: os._exit(1)
    )
    server = Server(
        create_app(trainer), host=settings.host, port=settings.port, on_stop=trainer.shut_down
    )
    return server.run_until_exit()


if __name__ == "__main__":
    sys.exit(main())
