"""`python -m services.rollout`: settings -> base -> engine -> app -> uvicorn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from services.rollout.app import create_app
from services.rollout.registration import Registration
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings, prepare_environment
from services.server import Server, read_settings
from shared.auth import check_bind
from shared.logs import configure_logging
from shared.trainer_client import TrainerClient


def main() -> int:
    settings = read_settings(RolloutSettings)
    configure_logging("rollout", settings.log_level)
    try:
        check_bind(settings.host, settings.api_key)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    prepare_environment(settings)
    replica = Replica(
        settings,
        registration=_registration(settings),
        on_exit=lambda code: server.exit(code),
        abandon_boot=lambda: _leave(server.exit_code),
    )
    server = Server(
        create_app(replica), host=settings.host, port=settings.port, on_stop=replica.drain
    )
    return server.run_until_exit()


def _registration(settings: RolloutSettings) -> Registration | None:
    if settings.trainer_url is None:
        return None
    return Registration(
        TrainerClient(settings.trainer_url, api_key=settings.api_key),
        host=settings.host,
        port=settings.port,
        advertise_url=settings.advertise_url,
        lease_s=settings.lease_s,
    )


def _leave(code: int) -> None:
    """End the process though threads of it load the engine, and end what they started."""
    for engine in multiprocessing.active_children():
        engine.kill()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has ended by itself.
            for pid in (task / "children").read_text().split():
                os.kill(int(pid), signal.SIGTERM)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
