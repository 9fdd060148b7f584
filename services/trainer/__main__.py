"""`python -m services.trainer`: settings -> policy -> fleet -> app -> uvicorn.

With TRAINER_DATA_PARALLEL_SIZE above 1 it starts followers, which hold the policy and nothing else.
`python -m services.trainer plan` is the memory planner instead, which imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys


def main() -> int:
    if sys.argv[1:2] == ["plan"]:
        from services.trainer.plan.cli import main as plan

        return plan(sys.argv[2:])
    return _serve()


def _serve() -> int:
    from services.server import Server, read_settings
    from services.trainer.app import create_app
    from services.trainer.followers import follow, followers, num_processes, own_rank
    from services.trainer.learner.learner import load_learner
    from services.trainer.settings import TrainerSettings
    from services.trainer.trainer import Trainer
    from shared.auth import check_bind
    from shared.logs import configure_logging

    settings = read_settings(TrainerSettings)
    rank = own_rank()
    configure_logging(f"trainer-{rank}" if rank else "trainer", settings.log_level)
    # Silence its warning that optional kernels could not be fetched from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        check_bind(settings.host, settings.api_key)
        size = num_processes(settings.data_parallel_size, settings.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if rank:
        return follow(lambda: load_learner(settings))
    processes = contextlib.ExitStack()
    trainer = Trainer(
        settings,
        on_exit=lambda code: server.exit(code),
        on_stuck=lambda: os._exit(1),  # Followers end with this process.
        abandon_boot=lambda: _leave(server.exit_code, processes),
    )
    server = Server(
        create_app(trainer), host=settings.host, port=settings.port, on_stop=trainer.shut_down
    )
    with processes:
        processes.enter_context(followers(size))
        return server.run_until_exit()


def _leave(code: int, followers: contextlib.ExitStack) -> None:
    """End the process though a thread of it boots, and its followers first.

    Once all have met, the thread may be in a call with them, and they end with this process.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        followers.close()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
