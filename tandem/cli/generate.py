"""`tandem generate`: send a prompt to a replica and print its completions as they arrive.

prompt ─▶ GenerateRequest ─▶ POST /generate ─▶ StreamStart, StreamTokens ─▶ CompletionPrinter
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated

import typer
from rich.text import Text

from shared.errors import ServiceError, Unavailable
from shared.rollout_client import RolloutClient
from shared.schemas import (
    ChatMessage,
    GenerateRequest,
    PolicyId,
    PromptInput,
    SamplingParams,
    StreamStart,
    StreamTokens,
)
from tandem.cli.connect import (
    Json,
    RolloutUrls,
    console,
    harmless,
    plain_table,
    print_json,
    replica_at,
    rollout_urls,
)

_FULL_POLICY = re.compile(r"(?P<run>[A-Za-z0-9_-]+)\.(?P<life>\d+)@(?P<version>\d+)")


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt text, or - to read stdin.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Completions to sample.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens with this total probability.")
    ] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Token limit per completion. [default: as many as fit]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; completion k uses seed + k.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="base, a version such as 17, or run.incarnation@version. [default: newest]"
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user message, through the chat template."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print token ids and their logprobs.")
    ] = False,
    url: RolloutUrls = None,
    as_json: Json = False,
) -> int:
    """Sample from a replica and print the text as it arrives.

    With several URLs, the first replica that answers gets the request. --json prints the whole
    response at once: token ids, logprobs and the policy version of every token.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [("system", system)] if system else []
    messages.append(("user", text))
    as_prompt: PromptInput = text
    if chat or system:
        as_prompt = tuple(ChatMessage(role=role, content=content) for role, content in messages)
    request = GenerateRequest(
        prompts=(as_prompt,),
        sampling=SamplingParams(
            n=n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            seed=seed,
        ),
    )

    async def ask(client: RolloutClient) -> int:
        pinned = request.model_copy(update={"policy": await _policy(client, policy)})
        if as_json:
            print_json(await client.generate(pinned))
            return 0
        return await _show(client.stream(pinned), n, logprobs=logprobs)

    async def ask_the_first_that_answers() -> int:
        urls = rollout_urls(url)
        for other in urls[:-1]:
            async with replica_at(other) as client:
                try:
                    await client.status()
                except Unavailable:
                    continue
                return await ask(client)
        async with replica_at(urls[-1]) as client:
            return await ask(client)

    return asyncio.run(ask_the_first_that_answers())


async def _policy(client: RolloutClient, name: str | None) -> PolicyId | None:
    """Parse `base`, `17`, `policy@17` or `run.1@17`; None stands for the newest policy."""
    if name is None or name == "policy":
        return None
    if match := _FULL_POLICY.fullmatch(name):
        return PolicyId(
            run_id=match["run"], incarnation=int(match["life"]), version=int(match["version"])
        )
    version = "0" if name == "base" else name.removeprefix("policy@")
    if not version.isdecimal():
        raise ValueError(
            f"--policy {name}: use base, a version such as 17, or run.incarnation@version"
        )
    newest = (await client.policies()).newest
    return newest.model_copy(update={"version": int(version)})


# --- show ---------------------------------------------------------------------------------------


async def _show(
    records: AsyncIterator[StreamStart | StreamTokens], n: int, *, logprobs: bool
) -> int:
    """Print completions in order; each streams once the previous ones have ended."""
    out = CompletionPrinter(n, logprobs=logprobs)
    start: StreamStart | None = None
    async with aclosing(records) as stream:  # type: ignore[type-var]
        async for record in stream:
            if isinstance(record, StreamStart):
                start = record
            else:
                out.add(record)
    assert start, "a stream begins with its StreamStart"
    console(stderr=True).print(Text(out.summary(start), style="dim"), end="")
    if "interrupted" in out.reasons:
        raise ServiceError(
            "the replica interrupted a completion, because it received a new policy version or is "
            "draining: send the prompt again"
        )
    return 0


class CompletionPrinter:
    """Prints the text of a stream to stdout, one completion after another."""

    def __init__(self, n: int, *, logprobs: bool) -> None:
        self.reasons: list[str | None] = [None] * n
        self._records: list[list[StreamTokens]] = [[] for _ in range(n)]
        self._num_shown = [0] * n  # printed records per completion
        self._current = 0
        self._logprobs = logprobs

    def add(self, record: StreamTokens) -> None:
        self._records[record.completion].append(record)
        if record.finish_reason:
            self.reasons[record.completion] = record.finish_reason
        while self._current < len(self._records):
            self._print_new(self._current)
            if self.reasons[self._current] is None:
                return
            self._end(self._current)
            self._current += 1

    def _print_new(self, index: int) -> None:
        records = self._records[index]
        if records and not self._num_shown[index] and len(self._records) > 1:
            print(f"[{index + 1}] ", end="")
        new = "".join(record.text or "" for record in records[self._num_shown[index] :])
        print(harmless(new, sys.stdout), end="", flush=True)
        self._num_shown[index] = len(records)

    def _end(self, index: int) -> None:
        print()
        if self._logprobs:
            table = plain_table("token", "logprob", "probability")
            for token, logprob in self._tokens(self._records[index]):
                table.add_row(str(token), f"{logprob:.4f}", f"{math.exp(logprob):.4f}")
            console().print(table)

    def _tokens(self, records: Sequence[StreamTokens]) -> list[tuple[int, float]]:
        return [
            pair
            for record in records
            for pair in zip(record.token_ids, record.logprobs, strict=True)
        ]

    def summary(self, start: StreamStart) -> str:
        num_tokens = sum(len(record.token_ids) for own in self._records for record in own)
        reasons = ", ".join(dict.fromkeys(reason or "cut" for reason in self.reasons))
        return f"policy {start.policy} · {num_tokens} tokens · {reasons}\n"
