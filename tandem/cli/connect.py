"""Shared by all commands: options, clients for the services that they name, and output.

TANDEM_TRAINER_URL, TANDEM_ROLLOUT_URLS, TANDEM_API_KEY ──▶ clients        records ──▶ text or JSON
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, TextIO

import httpx
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from shared.errors import Unauthorized, Unavailable
from shared.http_client import ROLLOUT_PORT, TRAINER_PORT, service_url
from shared.rollout_client import RolloutClient
from shared.trainer_client import TrainerClient

_ROLLOUT_VARIABLE = "TANDEM_ROLLOUT_URLS"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters except \t and \n
_PIPED_WIDTH = 240  # columns when output is not a terminal: no table row wraps

TrainerUrl = Annotated[
    str,
    typer.Option("--url", envvar="TANDEM_TRAINER_URL", metavar="URL", help="URL of the trainer."),
]
RolloutUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="URL of a replica; repeat the option to name several. "
        f"[env var: {_ROLLOUT_VARIABLE}, comma-separated; "
        f"default: http://127.0.0.1:{ROLLOUT_PORT}]",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print results as JSON and errors as RFC 9457 problems.")
]
DEFAULT_TRAINER_URL = f"http://127.0.0.1:{TRAINER_PORT}"


def rollout_urls(given: Sequence[str] | None) -> list[str]:
    """Replica URLs from --url, else from TANDEM_ROLLOUT_URLS, else the default; never empty."""
    named = given or os.environ.get(_ROLLOUT_VARIABLE, "").split(",")
    urls = [service_url(text.strip(), port=ROLLOUT_PORT) for text in named if text.strip()]
    return urls or [f"http://127.0.0.1:{ROLLOUT_PORT}"]


@asynccontextmanager
async def trainer_at(url: str) -> AsyncIterator[TrainerClient]:
    """A client for the trainer at `url`.

    An error raised inside says what to do when nothing answers there or the key is refused.
    """
    url = service_url(url, port=TRAINER_PORT)
    start = "start one with `tandem trainer --model …`"
    with _explained(f"no trainer answers at {url}: {start}, or pass another --url", url):
        async with TrainerClient(url, api_key=_api_key()) as client:
            yield client


@asynccontextmanager
async def replica_at(url: str) -> AsyncIterator[RolloutClient]:
    start = "start one with `tandem rollout --model …`"
    with _explained(f"no replica answers at {url}: {start}, or pass another --url", url):
        async with RolloutClient(url, api_key=_api_key()) as client:
            yield client


def _api_key() -> str | None:
    return os.environ.get("TANDEM_API_KEY") or None


@contextmanager
def _explained(absent: str, url: str) -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
            raise Unavailable(absent) from error
        raise
    except Unauthorized as error:
        raise Unauthorized(
            f"{url} refused the API key: set TANDEM_API_KEY to the key of that service"
        ) from error


# --- output -------------------------------------------------------------------------------------


def console(*, stderr: bool = False) -> Console:
    """A console that writes colours and control codes to terminals only; NO_COLOR drops colours."""
    made = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made.width = max(made.width, _PIPED_WIDTH)
    return made


def harmless(text: str, stream: TextIO) -> str:
    """Replace control characters in `text` when `stream` is a terminal, which could obey them.

    Text for a file or a pipe stays unchanged.
    """
    return _CONTROL.sub("\ufffd", text) if stream.isatty() else text


def print_json(document: BaseModel | Mapping[str, Any]) -> None:
    """Print one line, so that a single document is also valid NDJSON."""
    if isinstance(document, BaseModel):
        print(document.model_dump_json(), flush=True)
    else:
        print(json.dumps(document), flush=True)


def plain_table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.0f} ms"
