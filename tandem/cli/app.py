"""`tandem`: arguments -> a command -> an exit code.

0   success; a followed run completed, or was stopped on request
1   failure: a service is unavailable or refuses, a run failed, a plan does not fit
2   bad input
130 Ctrl-C

Results go to stdout. An error is one sentence on stderr, or an RFC 9457 problem with --json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from services.boot import one_line
from shared.errors import InvalidAdapter, InvalidRequest, NotFound, ServiceError, Unauthorized
from tandem.cli import fleet, generate, runs, services, weights
from tandem.cli.connect import harmless

_BAD_INPUT = (InvalidRequest, InvalidAdapter, Unauthorized, NotFound)

app = typer.Typer(
    name="tandem",
    help="Train language models by reinforcement learning with two services: a trainer, and "
    "rollout replicas.",
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (services, runs, fleet, generate, weights):
    commands.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return app(arguments, prog_name="tandem", standalone_mode=False) or 0
    except typer.TyperException as error:  # Typer rejected an option or argument
        command = getattr(getattr(error, "ctx", None), "command_path", "tandem")
        sentence = error.format_message().rstrip(".")
        failure: ServiceError = InvalidRequest(f"{sentence}: see `{command} --help`")
    except ServiceError as error:
        failure = error
    except ValueError as error:
        failure = InvalidRequest(one_line(error))
    except (OSError, MemoryError) as error:
        failure = ServiceError(one_line(error))
    as_json = "--json" in arguments
    sentence = harmless(" ".join(failure.detail.split()), sys.stderr)
    print(json.dumps(failure.to_problem()) if as_json else sentence, file=sys.stderr)
    return 2 if isinstance(failure, _BAD_INPUT) else 1
