"""`tandem demo`, `trainer`, `rollout`: this process becomes the service. `plan`: what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from services.boot import one_line
from shared.schemas import ServingMode

ROOT = Path(__file__).parents[2]
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_ENVIRONMENT = "Every other setting is an environment variable, named in docs/settings.md."


Device = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def register(app: typer.Typer) -> None:
    app.command(context_settings=_PASS_ON)(demo)
    app.command(epilog=_ENVIRONMENT)(trainer)
    app.command(epilog=_ENVIRONMENT)(rollout)
    app.command(context_settings=_PASS_ON)(plan)


def demo(context: typer.Context) -> None:
    """Train a small policy on this machine, from nothing: two services, two minutes, no GPU.

    `tandem demo --help` has the options: --steps, --seed, --replicas, --chaos, --keep, --min-rise.
    """
    if not (ROOT / "examples/demo").is_dir():
        raise ValueError(f"the demo is in the source tree, which {ROOT} is not: clone it")
    os.chdir(ROOT)
    _become("examples.demo", {}, context.args)


def trainer(
    model: Annotated[
        str,
        typer.Option(envvar="TRAINER_MODEL", help="Checkpoint folder or hub id.", metavar="MODEL"),
    ],
    rollout_urls: Annotated[
        str | None,
        typer.Option(metavar="URLS", help="Replicas, separated by commas: http://host:port."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="To listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="[default: 8080]")] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="A folder for the folders of runs. [default: runs]")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="[default: auto]")] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(help="A 4-bit base (QLoRA), or the 16-bit one. [default: load-in-4bit]"),
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs that an update is spread over. [default: 1]")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="[default: INFO]")] = None,
) -> None:
    """Run the trainer service: it holds the policy, executes runs and serves the page.

    An option sets the TRAINER_ variable of its name; without one the variable counts.
    """
    _become("services.trainer", _environment("TRAINER_", locals()))


def rollout(
    model: Annotated[
        str,
        typer.Option(
            envvar="ROLLOUT_MODEL", help="The checkpoint that the trainer has.", metavar="MODEL"
        ),
    ],
    trainer_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The trainer to register with.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="To listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="[default: 8000]")] = None,
    base: Annotated[
        Literal["nf4-exact", "original"] | None,
        typer.Option(
            help="The 4-bit weights that are trained, or the 16-bit. [default: nf4-exact]"
        ),
    ] = None,
    serving_mode: Annotated[
        ServingMode | None, typer.Option(help="Adapters beside the weights, or in. [default: lora]")
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="[default: 32]")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt + completion tokens. [default: the model's]")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="vLLM's share of the GPU. [default: 0.85]")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="[default: fp8 on a GPU that has it, else auto]")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs of this replica. [default: 1]")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="[default: auto]")] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="[default: INFO]")] = None,
) -> None:
    """Run a rollout service: vLLM samples what the newest policy says.

    An option sets the ROLLOUT_ variable of its name; without one the variable counts.
    """
    _become("services.rollout", _environment("ROLLOUT_", locals()))


def plan(context: typer.Context) -> int:
    """Plan the memory before a GPU is rented: what fits, and the settings to use.

    `tandem plan --help` has the options. Exit code 1 says that it does not fit.
    """
    from services.trainer.plan.cli import answer

    try:
        return answer(context.args, prog="tandem plan")
    except OSError as error:  # of the model; 1 says that it does not fit
        raise ValueError(one_line(error)) from error


def _environment(prefix: str, options: Mapping[str, object]) -> dict[str, str]:
    named = {name: value for name, value in options.items() if value is not None}
    return {f"{prefix}{name.upper()}": str(value) for name, value in named.items()}


def _become(module: str, settings: Mapping[str, str], arguments: list[str] = []) -> NoReturn:
    """Replace this process by `python -m module`.

    It and its children find Tandem's packages first, wherever this is: a folder of the user's may
    be named `services` too. The current folder comes last, for reward functions in it.
    """
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    environment = {
        **os.environ,
        **settings,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
