"""`python -m services.rollout`: settings -> base -> engine -> app -> uvicorn."""

from __future__ import annotations

import sys

from services.rollout.app import create_app
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings, prepare_environment
from services.server import Server, read_settings
from shared.auth import check_bind
from shared.logs import configure_logging


def main() -> int:
    settings = read_settings(RolloutSettings)
    configure_logging("rollout", settings.log_level)
    try:
        check_bind(settings.host, settings.api_key)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    prepare_environment(settings)
    replica = Replica(settings, on_exit=lambda code: server.exit(code))
    server = Server(
        create_app(replica), host=settings.host, port=settings.port, on_stop=replica.drain
    )
    return server.run_until_exit()


if __name__ == "__main__":
    sys.exit(main())
