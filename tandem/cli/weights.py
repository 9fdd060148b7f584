"""`tandem sync`: an adapter file to replicas. `tandem export`: a policy to files.

adapter file, PEFT folder ─▶ POST /sync_weights      run folder, GET /policy ─▶ adapter, checkpoint
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.adapters import ADAPTER_WEIGHTS, from_peft, read_header
from shared.errors import InvalidAdapter, ServiceError
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId, SyncReceipt
from tandem.cli.connect import (
    DEFAULT_TRAINER_URL,
    Json,
    RolloutUrls,
    TrainerUrl,
    console,
    milliseconds,
    plain_table,
    print_json,
    replica_at,
    rollout_urls,
    trainer_at,
)

if TYPE_CHECKING:
    from tandem.export import TrainedPolicy


def register(app: typer.Typer) -> None:
    app.command()(sync)
    app.command()(export)


# --- sync ---------------------------------------------------------------------------------------


def sync(
    adapter: Annotated[
        Path, typer.Argument(help="An adapter file of Tandem's, or a folder as PEFT saves it.")
    ],
    replace_run: Annotated[
        bool, typer.Option("--replace-run", help="End the run that the replica serves.")
    ] = False,
    in_flight: Annotated[
        Literal["finish", "continue"],
        typer.Option(help="Running completions end under their version, or go on under this one."),
    ] = "finish",
    activate: Annotated[
        bool, typer.Option(help="Make it the newest version, or only install it.")
    ] = True,
    run_id: Annotated[
        str | None, typer.Option(help="Of a PEFT adapter. [default: from its content]")
    ] = None,
    version: Annotated[int, typer.Option(help="Of a PEFT adapter.", min=1)] = 1,
    url: RolloutUrls = None,
    as_json: Json = False,
) -> None:
    """Push an adapter to replicas, which serve it from then on; show the receipts.

    An adapter of PEFT becomes one of the base that the replica has.
    """
    if not adapter.exists():
        raise ValueError(f"{adapter}: no such file or folder; name an adapter")

    async def push(target: str) -> _Pushed | ServiceError:
        try:
            async with replica_at(target) as replica:
                base = (await replica.status()).base
                content = await asyncio.to_thread(_adapter_file, adapter, run_id, version, base)
                started = time.perf_counter()
                receipt = await replica.sync_weights(
                    content, activate=activate, replace_run=replace_run, in_flight=in_flight
                )
        except ServiceError as error:  # the other replicas still get theirs
            if target not in error.detail:
                error.detail = f"{target}: {error.detail}"
            return error
        return _Pushed(target, receipt, time.perf_counter() - started)

    async def push_all() -> list[_Pushed | ServiceError]:
        return await asyncio.gather(*map(push, rollout_urls(url)))

    results = asyncio.run(push_all())
    pushed = [result for result in results if isinstance(result, _Pushed)]
    failures = [result for result in results if isinstance(result, ServiceError)]
    if as_json and pushed:
        print_json(
            {"receipts": [{"url": p.url} | p.receipt.model_dump(mode="json") for p in pushed]}
        )
    elif pushed:
        _print_receipts(pushed)
    if failures:
        failures[0].detail = "; ".join(failure.detail for failure in failures)
        raise failures[0]


@dataclass(frozen=True, slots=True)
class _Pushed:
    url: str
    receipt: SyncReceipt
    total_s: float


def _print_receipts(pushed: list[_Pushed]) -> None:
    table = plain_table(
        "replica", "policy", "outcome", "bytes", "receive", "verify", "wait", "load", "in all"
    )
    for item in pushed:
        receipt = item.receipt
        parts = (receipt.receive_s, receipt.verify_s, receipt.wait_s, receipt.load_s, item.total_s)
        table.add_row(
            item.url,
            str(receipt.policy),
            receipt.outcome.replace("_", " "),
            f"{receipt.num_bytes:,}",
            *map(milliseconds, parts),
        )
    console().print(table)


def _adapter_file(path: Path, run_id: str | None, version: int, base: BaseIdentity | None) -> bytes:
    """What to push: our own file as it is, PEFT's under a manifest for `base`."""
    weights = path / ADAPTER_WEIGHTS if path.is_dir() else path
    if not path.is_dir() or _is_ours(weights):
        if run_id is not None:
            raise ValueError(f"--run-id: {path} names its policy itself; leave it out")
        try:
            read_header(weights)
        except InvalidAdapter as error:
            raise InvalidAdapter(f"{weights}: {error.detail}") from error
        return weights.read_bytes()
    if base is None:
        raise ServiceError(
            "the replica is starting and has no base yet: try again when it is ready"
        )
    try:
        run_id = run_id or f"peft-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise InvalidAdapter(
            f"{path} has no readable {ADAPTER_WEIGHTS}: save the adapter there with "
            "save_pretrained()"
        ) from error
    return from_peft(path, PolicyId(run_id=run_id, version=version), base)


def _is_ours(weights: Path) -> bool:
    try:
        read_header(weights)
    except (InvalidAdapter, OSError):
        return False
    return True


# --- export -------------------------------------------------------------------------------------


def export(
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Of a run, as runs/<run_id>, or of its checkpoint. [default: ask the trainer]",
        ),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="One that the trainer keeps. [default: the current one]")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="A 16-bit checkpoint instead of an adapter.")
    ] = False,
    base: Annotated[
        Literal["exact", "original"],
        typer.Option(help="Merge into the weights that were trained, or those before 4 bits."),
    ] = "exact",
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that was trained. [default: as recorded]")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where 4-bit weights are made.")
    ] = "cpu",
    url: TrainerUrl = DEFAULT_TRAINER_URL,
    as_json: Json = False,
) -> None:
    """Write the policy: an adapter for PEFT, or with --merged a checkpoint that loads anywhere.

    A merged checkpoint brings tokenizer, chat template and generation config. `exact` is the model
    that was trained and sampled from: the 4-bit weights in bf16, plus the adapter.
    """
    if run is not None and version is not None:
        raise ValueError(
            "--version is of the trainer's policy: name a checkpoint of the run with --run"
        )
    if base == "original" and not merged:
        raise ValueError("--base is what --merged merges into: add that, or leave it out")
    from tandem.export import read_policy, refuse_existing, write_merged, write_peft

    refuse_existing(output)
    policy = read_policy(run) if run else asyncio.run(_trainers_policy(url, version))
    if model is not None:
        policy = dataclasses.replace(policy, model=model)
    if merged:
        _quiet()
        write_merged(policy, output, base=base, device=device)
    else:
        write_peft(policy, output)
    kind = f"merged, {base} base" if merged else "adapter"
    if as_json:
        print_json(
            {
                "output": str(output),
                "kind": "merged" if merged else "adapter",
                "base": base if merged else None,
                "policy": policy.manifest.policy.model_dump(mode="json"),
                "model": policy.model,
            }
        )
    else:
        console().print(f"Wrote policy {policy.manifest.policy} ({kind}) to {output}.")


def _quiet() -> None:
    """No bars of the libraries where no terminal shows them, nor a warning of every start."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


async def _trainers_policy(url: str, version: int | None) -> TrainedPolicy:
    from tandem.export import TrainedPolicy

    async with trainer_at(url) as trainer:
        model, status = (await trainer.status()).model, await trainer.policy()
        wanted = status.policy.version if version is None else version
        if wanted == 0:
            raise ServiceError(
                f"policy {status.policy} is the base, which has no adapter: train a step first"
            )
        manifest = AdapterManifest(
            policy=status.policy.model_copy(update={"version": wanted}),
            base=status.base,
            rank=status.rank,
            scaling=status.scaling,
            target_modules=status.target_modules,
        )
        return TrainedPolicy(manifest, await trainer.adapter(wanted), model)
