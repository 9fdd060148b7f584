"""`tandem status` and `tandem replicas`: the state of the trainer, its run and its fleet."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from shared.errors import NotFound
from shared.http_client import ROLLOUT_PORT, service_url
from shared.schemas import ReplicaRegistration, ReplicasResponse, RunStatus
from tandem.cli.connect import (
    DEFAULT_TRAINER_URL,
    Json,
    TrainerUrl,
    console,
    print_json,
    replica_at,
    trainer_at,
)
from tandem.cli.display import fleet_summary, replica_table, step_cells

ReplicaName = Annotated[str, typer.Argument(metavar="ID", help="host:port, as in the table.")]


def register(app: typer.Typer) -> None:
    app.command()(status)
    replicas = typer.Typer(help="List the replicas of the fleet; add, drain or remove one.")
    replicas.callback(invoke_without_command=True)(show)
    for command in (add, drain, remove):
        replicas.command()(command)
    app.add_typer(replicas, name="replicas")


def status(url: TrainerUrl = DEFAULT_TRAINER_URL, as_json: Json = False) -> None:
    """Show the trainer, its run and its replicas."""

    async def ask() -> None:
        async with trainer_at(url) as trainer:
            own, fleet = await asyncio.gather(trainer.status(), trainer.replicas())
        if as_json:
            return print_json(
                {"trainer": own.model_dump(mode="json"), **fleet.model_dump(mode="json")}
            )
        out = console()
        detail = f": {own.detail}" if own.detail else ""
        out.print(f"trainer   {trainer.url} {own.state}{detail}")
        out.print(f"model     {own.model}")
        if own.run:
            out.print(_run_text(own.run), soft_wrap=True)
        else:
            out.print("run       none: start one with `tandem run CONFIG`")
        out.print(fleet_summary(fleet.replicas) if not fleet.replicas else "")
        if fleet.replicas:
            out.print(replica_table(fleet.replicas))

    asyncio.run(ask())


def _run_text(run: RunStatus) -> str:
    steps = f"step {run.step}" + (f" of {run.num_steps}" if run.num_steps else "")
    detail = f": {run.detail}" if run.detail else ""
    lines = [
        f"run       {run.run_id} {run.state}{detail}",
        f"          {steps} · policy {run.policy} · {run.run_dir}",
    ]
    if run.last_step:
        cells = step_cells(run.last_step, run.last_eval)
        line = " · ".join(f"{name} {value}" for name, value in cells.items() if name != "step")
        lines.append(f"          {line}")
    return "\n".join(lines)


# --- replicas -----------------------------------------------------------------------------------


def show(
    context: typer.Context, url: TrainerUrl = DEFAULT_TRAINER_URL, as_json: Json = False
) -> None:
    """Without a subcommand: print a table of the replicas."""
    if context.invoked_subcommand is None:
        asyncio.run(_show(url, as_json=as_json))
        return
    sources = (context.get_parameter_source(name) for name in ("url", "as_json"))
    if any(source is not None and source.name == "COMMANDLINE" for source in sources):
        raise ValueError(f"put --url and --json after `{context.invoked_subcommand}`")


async def _show(url: str, *, as_json: bool) -> None:
    async with trainer_at(url) as trainer:
        fleet = await trainer.replicas()
    if as_json:
        print_json(fleet)
    elif fleet.replicas:
        console().print(replica_table(fleet.replicas))
    else:
        console().print("There are no replicas: `tandem replicas add URL` registers one.")


def add(
    replica: Annotated[str, typer.Argument(metavar="REPLICA", help="http://host:port")],
    url: TrainerUrl = DEFAULT_TRAINER_URL,
    as_json: Json = False,
) -> None:
    """Register a replica: it serves once it passes the trainer's conformance check."""

    async def register_it() -> None:
        registration = ReplicaRegistration(url=service_url(replica, port=ROLLOUT_PORT))
        async with trainer_at(url) as trainer:
            answer = await trainer.register(registration)
        if as_json:
            return print_json(answer)
        detail = f": {answer.detail}" if answer.detail else ""
        console().print(
            f"{answer.id} is {answer.state}{detail}; `tandem replicas` shows its state."
        )

    asyncio.run(register_it())


def remove(
    replica: ReplicaName, url: TrainerUrl = DEFAULT_TRAINER_URL, as_json: Json = False
) -> None:
    """Take a replica out of the fleet: it finishes its requests and its process keeps running."""

    async def remove_it() -> None:
        async with trainer_at(url) as trainer:
            await trainer.remove(replica)
            fleet = await trainer.replicas()
        if as_json:
            return print_json(fleet)
        console().print(f"{replica} gets no more requests; `tandem replicas add` adds it again.")

    asyncio.run(remove_it())


def drain(
    replica: Annotated[
        str, typer.Argument(metavar="ID|URL", help="Id as shown in the table, or URL.")
    ],
    url: TrainerUrl = DEFAULT_TRAINER_URL,
    as_json: Json = False,
) -> None:
    """Let a replica finish its running requests, then end its process."""

    async def drain_it() -> None:
        target = replica
        if "://" not in replica:
            async with trainer_at(url) as trainer:
                target = _url_of(replica, await trainer.replicas())
        async with replica_at(target) as client:
            answer = await client.drain()
        if as_json:
            return print_json(answer)
        console().print(f"{replica} is {answer.state}: it exits once its requests finish.")

    asyncio.run(drain_it())


def _url_of(replica: str, fleet: ReplicasResponse) -> str:
    urls = {status.id: status.url for status in fleet.replicas}
    if replica not in urls:
        known = ", ".join(urls) or "none"
        raise NotFound(
            f"there is no replica {replica!r}: the fleet has {known}; pass one of its ids, or a URL"
        )
    return urls[replica]
