"""`python -m services.trainer`: settings -> policy -> fleet -> app -> uvicorn.

With TRAINER_DATA_PARALLEL_SIZE above 1 it starts followers, which hold the policy and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys

from services.server import Server, read_settings
from services.trainer import parallel
from services.trainer.app import create_app
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.auth import check_bind
from shared.logs import configure_logging


def main() -> int:
    settings = read_settings(TrainerSettings)
    rank = parallel.own_rank()
    configure_logging(f"trainer-{rank}" if rank else "trainer", settings.log_level)
    # It would fetch optional kernels from a hub, and warns at every start that it could not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        check_bind(settings.host, settings.api_key)
        num_processes = parallel.num_processes(settings.data_parallel_size, settings.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if rank:
        return parallel.follow(Trainer(settings).load_policy)
    trainer = Trainer(
        settings,
        on_exit=lambda code: server.exit(code),
        on_stuck=lambda: os._exit(1),  # followers end with this process
        abandon_boot=lambda: os._exit(server.exit_code),
    )
    server = Server(
        create_app(trainer), host=settings.host, port=settings.port, on_stop=trainer.shut_down
    )
    with parallel.followers(num_processes):
        return server.run_until_exit()


if __name__ == "__main__":
    sys.exit(main())
