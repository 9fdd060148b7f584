"""`tandem demo`, `trainer`, `rollout`: replace this process with the program. `plan`: its memory.

options ─▶ TRAINER_*, ROLLOUT_* variables ─▶ execve(python -m module)
"""

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
_ENVIRONMENT = "All other settings are environment variables; docs/settings.md lists them."


Device = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def register(app: typer.Typer) -> None:
    app.command(context_settings=_PASS_ON)(demo)
    app.command(epilog=_ENVIRONMENT)(trainer)
    app.command(epilog=_ENVIRONMENT)(rollout)
    app.command(context_settings=_PASS_ON)(plan)


def demo(context: typer.Context) -> None:
    """Train a small policy from scratch on this machine: two services, two minutes, no GPU.

    Options, described by `tandem demo --help`: --steps, --seed, --replicas, --chaos, --keep,
    --min-rise.
    """
    if not (ROOT / "examples/demo").is_dir():
        raise ValueError(
            f"{ROOT} has no examples/demo: clone the source repository and run the demo there"
        )
    os.chdir(ROOT)
    _become("examples.demo", {}, context.args)


def trainer(
    model: Annotated[
        str,
        typer.Option(
            envvar="TRAINER_MODEL", help="Checkpoint folder or Hugging Face id.", metavar="MODEL"
        ),
    ],
    rollout_urls: Annotated[
        str | None,
        typer.Option(metavar="URLS", help="Comma-separated replicas, each http://host:port."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8080]")] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Parent folder of all run folders. [default: runs]")
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Where to train; auto picks a GPU if there is one. [default: auto]"),
    ] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(help="Use a 4-bit base (QLoRA) or a 16-bit one. [default: load-in-4bit]"),
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs that share each policy update. [default: 1]")
    ] = None,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Lowest level that is logged. [default: INFO]")
    ] = None,
) -> None:
    """Run the trainer service: it holds the policy, executes runs and serves the web page.

    Each option overrides the environment variable of the same name with the prefix TRAINER_.
    """
    _become("services.trainer", _environment("TRAINER_", locals()))


def rollout(
    model: Annotated[
        str,
        typer.Option(
            envvar="ROLLOUT_MODEL",
            help="The trainer's checkpoint: folder or Hugging Face id.",
            metavar="MODEL",
        ),
    ],
    trainer_url: Annotated[
        str | None, typer.Option(metavar="URL", help="URL of the trainer to register with.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8000]")] = None,
    base: Annotated[
        Literal["nf4-exact", "original"] | None,
        typer.Option(
            help="Serve the 4-bit weights that the trainer trains, or the original 16-bit weights. "
            "[default: nf4-exact]"
        ),
    ] = None,
    serving_mode: Annotated[
        ServingMode | None,
        typer.Option(
            help="Apply adapters separately (lora) or merge them into the base (merged). "
            "[default: lora]"
        ),
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Highest adapter rank that is accepted. [default: 32]")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of prompt and completion together. [default: the model's]"),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Fraction of GPU memory that vLLM may use. [default: 0.85]"),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(help="Type of the KV cache. [default: fp8 on a GPU that has it, else auto]"),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs that this replica runs on. [default: 1]")
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Where to sample; auto picks a GPU if there is one. [default: auto]"),
    ] = None,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Lowest level that is logged. [default: INFO]")
    ] = None,
) -> None:
    """Run a rollout service: vLLM samples from the newest policy.

    Each option overrides the environment variable of the same name with the prefix ROLLOUT_.
    """
    _become("services.rollout", _environment("ROLLOUT_", locals()))


def plan(context: typer.Context) -> int:
    """Plan GPU memory before you rent one: what fits, and which settings to use.

    `tandem plan --help` describes the options. The exit code is 1 when the plan does not fit.
    """
    from services.trainer.plan.cli import answer

    try:
        return answer(context.args, prog="tandem plan")
    except OSError as error:  # an unreadable model is bad input; exit code 1 means "does not fit"
        raise ValueError(one_line(error)) from error


def _environment(prefix: str, options: Mapping[str, object]) -> dict[str, str]:
    named = {name: value for name, value in options.items() if value is not None}
    return {f"{prefix}{name.upper()}": str(value) for name, value in named.items()}


def _become(module: str, settings: Mapping[str, str], arguments: list[str] = []) -> NoReturn:
    """Replace this process with `python -m module`.

    Tandem's packages come first on the module path, because the user's folder may also contain a
    `services`. The current folder comes last, so that reward functions in it can be imported.
    """
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    environment = {
        **os.environ,
        **settings,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
