"""`tandem sync` pushes an adapter file to replicas; `tandem export` writes a policy to files.

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
        Path, typer.Argument(help="Adapter file written by Tandem, or a folder saved by PEFT.")
    ],
    replace_run: Annotated[
        bool,
        typer.Option("--replace-run", help="Replace the run that the replica currently serves."),
    ] = False,
    in_flight: Annotated[
        Literal["finish", "continue"],
        typer.Option(
            help="Let running completions finish on their version, or continue them on this one."
        ),
    ] = "finish",
    activate: Annotated[
        bool, typer.Option(help="Make this the newest version, or only install it.")
    ] = True,
    run_id: Annotated[
        str | None,
        typer.Option(help="Run id to give a PEFT adapter. [default: a hash of its content]"),
    ] = None,
    version: Annotated[int, typer.Option(help="Policy version to give a PEFT adapter.", min=1)] = 1,
    url: RolloutUrls = None,
    as_json: Json = False,
) -> None:
    """Push an adapter to replicas, which then serve it, and print their receipts.

    A PEFT adapter does not record its base; it is taken to belong to the replica's base.
    """
    if not adapter.exists():
        raise ValueError(f"{adapter} does not exist: pass an adapter file or folder")

    async def push(target: str) -> _Pushed | ServiceError:
        try:
            async with replica_at(target) as replica:
                base = (await replica.status()).base
                content = await asyncio.to_thread(_adapter_file, adapter, run_id, version, base)
                started = time.perf_counter()
                receipt = await replica.sync_weights(
                    content, activate=activate, replace_run=replace_run, in_flight=in_flight
                )
        except ServiceError as error:  # one failure must not stop the push to other replicas
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
    """The bytes to push: Tandem's own file unchanged, a PEFT adapter with a manifest for `base`.

    Raises ValueError when `run_id` is given for Tandem's own file, InvalidAdapter for an unreadable
    adapter, and ServiceError while the replica has no base.
    """
    weights = path / ADAPTER_WEIGHTS if path.is_dir() else path
    if not path.is_dir() or _is_ours(weights):
        if run_id is not None:
            raise ValueError(f"{path} already records its policy: remove --run-id")
        try:
            read_header(weights)
        except InvalidAdapter as error:
            raise InvalidAdapter(f"{weights}: {error.detail}") from error
        return weights.read_bytes()
    if base is None:
        raise ServiceError(
            "the replica is still starting and has not loaded its base: try again when it is ready"
        )
    try:
        run_id = run_id or f"peft-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise InvalidAdapter(
            f"{path} has no readable {ADAPTER_WEIGHTS}: save the adapter to this folder with "
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
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run folder (runs/<run_id>) or checkpoint folder to read. "
            "[default: ask the trainer]",
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(help="Policy version that the trainer keeps. [default: the current one]"),
    ] = None,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Write a merged 16-bit checkpoint instead of an adapter."),
    ] = False,
    base: Annotated[
        Literal["exact", "original"],
        typer.Option(
            help="Merge into the weights that were trained (exact), or into the checkpoint before "
            "quantization (original)."
        ),
    ] = "exact",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint that was trained. [default: the one that was recorded]"),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Device that computes the 4-bit weights.")
    ] = "cpu",
    url: TrainerUrl = DEFAULT_TRAINER_URL,
    as_json: Json = False,
) -> None:
    """Write the policy: a PEFT adapter, or with --merged a checkpoint that loads anywhere.

    A merged checkpoint includes tokenizer, chat template and generation config. `--base exact`
    gives the model that was trained and sampled from: the 4-bit weights in bf16, plus the adapter.
    """
    if run is not None and version is not None:
        raise ValueError(
            "--version selects a policy of the trainer: with --run, pass the folder of a "
            "checkpoint instead"
        )
    if base == "original" and not merged:
        raise ValueError("--base only applies to --merged: add --merged, or remove --base")
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
    """Hide the libraries' progress bars unless on a terminal, and a warning that always appears."""
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
                f"version 0 of {status.policy.run_id} is the base, which has no adapter: train at "
                "least one step first"
            )
        manifest = AdapterManifest(
            policy=status.policy.model_copy(update={"version": wanted}),
            base=status.base,
            rank=status.rank,
            scaling=status.scaling,
            target_modules=status.target_modules,
        )
        return TrainedPolicy(manifest, await trainer.adapter(wanted), model)
