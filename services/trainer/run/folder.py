"""The folder of a run: whose it is now, which life of the run, and the config it began with.

config.json       RunConfig
life.json         Life; of a higher incarnation before anything of that life is published
lock              held by the trainer that executes the run
checkpoints/      checkpoints.py
metrics.jsonl, groups.jsonl, tensorboard/      log.py
wandb/            tracking.py
adapter/          the last adapter, in PEFT's format
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.trainer.algorithms.losses import LOSSES
from services.trainer.data.rows import Prompt
from services.trainer.durable import new_folder, write_file
from services.trainer.run.log import FINAL_STATES, last_state
from services.trainer.run_config import PolicyGradientConfig, RunConfig
from shared.errors import BaseMismatch, Conflict, InvalidRequest, RunConflict
from shared.model_folder import identity_difference
from shared.schemas import BaseIdentity, Digest, PreferencePair

log = logging.getLogger(__name__)
_MAY_CHANGE = frozenset(
    {
        "num_steps",
        "resume",
        "replace_run",
        "eval",
        "checkpoint",
        "tracking",
        "conformance",
        "guards",
        "max_staleness",
        "in_flight",
        "min_ready_replicas",
        "max_tokens_per_micro_batch",
        "generate_timeout_s",
        "max_memory_bytes",
        "sync_timeout_s",
        "timeout_s",  # Of rewards.
    }
)


class Life(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    incarnation: int = Field(ge=1)
    base: BaseIdentity  # The same in every incarnation of the run.
    dataset: Digest | None = None  # Digest of the training prompts; None for an external run.


class RunFolder:
    """Locked by this process until `close`; a lock dies with its process."""

    def __init__(self, path: Path, life: Life, lock: IO[str]) -> None:
        self.path = path
        self.life = life
        self._lock = lock

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, base: BaseIdentity, *, dataset: str | None = None
    ) -> RunFolder:
        """The folder of a new run; see `dataset_digest` for `dataset`."""
        life = Life(incarnation=1, base=base, dataset=dataset)
        with contextlib.ExitStack() as undo:
            with new_folder(path) as folder:
                lock = undo.enter_context(_lock(folder))
                (folder / "config.json").write_text(_json(config))
                (folder / "life.json").write_text(_json(life))
            undo.pop_all()
        return cls(path, life, lock)

    @classmethod
    def reopen(cls, path: Path, config: RunConfig, base: BaseIdentity) -> RunFolder:
        """The folder of an existing run, to resume it with `config`.

        Raises Conflict for a run that cannot be resumed, RunConflict while a trainer executes it,
        InvalidRequest for a config that would make another run of it.
        """
        if config.resume == "never":
            raise Conflict(f"run {path.name!r} exists in {path}: choose another run_id")
        read_config(path)  # Refuses a folder that is no run before it gets a lock.
        try:
            lock = _lock(path)
        except BlockingIOError as error:
            raise RunConflict(
                f"another trainer executes run {path.name!r} in {path}: stop it there first"
            ) from error
        try:
            saved, life = read_config(path), _read_life(path)
            if difference := identity_difference(base, life.base):
                raise BaseMismatch(
                    f"run {path.name!r} trains another base than this trainer has ({difference}): "
                    "start the trainer with the TRAINER_MODEL of the run"
                )
            _refuse_changes(saved, config)
            _refuse_completed(path, saved, config)
        except BaseException:
            lock.close()
            raise
        return cls(path, life, lock)

    def refuse_other_dataset(self, config: RunConfig, digest: str | None) -> None:
        """Raises Conflict for other prompts, because a checkpoint's positions refer to them."""
        if self.life.dataset not in (None, digest):
            assert config.dataset, "it is managed, as it was"
            name = getattr(config.dataset, "path", config.dataset.type)
            raise Conflict(
                f"dataset {name} is not the one that run {self.path.name!r} began with: restore "
                "its rows as they were, or choose another run_id"
            )

    def begin_life(self, config: RunConfig) -> None:
        """The next incarnation, under `config`."""
        self.life = self.life.model_copy(update={"incarnation": self.life.incarnation + 1})
        write_file(self.path / "life.json", _json(self.life).encode())
        write_file(self.path / "config.json", _json(config).encode())

    def close(self) -> None:
        self._lock.close()


def dataset_digest(rows: Sequence[Prompt | PreferencePair]) -> str | None:
    """SHA-256 of tokens and columns in their order; None without rows."""
    if not rows:
        return None
    digest = hashlib.sha256()
    for row in rows:
        content = [row.token_ids, row.columns] if isinstance(row, Prompt) else row.model_dump()
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_config(path: Path) -> RunConfig:
    """The config of the run in the folder `path`. Raises Conflict when it has none."""
    try:
        return RunConfig.model_validate_json((path / "config.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise _unusable(path, "config.json", error) from error


def newest_unfinished(runs_dir: Path) -> Path | None:
    """The run that a starting trainer resumes: the one whose incarnation began last, if it has not
    ended and nobody executes it."""
    lives = list(runs_dir.glob("*/life.json"))
    if not lives:
        return None
    folder = max(lives, key=lambda path: path.stat().st_mtime).parent
    state = last_state(folder)
    if (state is not None and state.state in FINAL_STATES) or not is_unattended(folder):
        return None
    try:
        return folder if read_config(folder).resume == "auto" else None
    except Conflict as error:
        log.error("the newest run is not taken up: %s", error.detail)
        return None


def is_unattended(path: Path) -> bool:
    """True for the folder of a run that no living trainer executes."""
    if not (path / "lock").is_file():
        return False
    try:
        _lock(path).close()
    except BlockingIOError:
        return False
    return True


def _lock(path: Path) -> IO[str]:
    """Raises BlockingIOError while another holds it."""
    lock = (path / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    return lock


def _json(record: BaseModel) -> str:
    return record.model_dump_json(indent=2) + "\n"


def _read_life(path: Path) -> Life:
    try:
        return Life.model_validate_json((path / "life.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise _unusable(path, "life.json", error) from error


def _unusable(path: Path, name: str, error: OSError | ValidationError) -> Conflict:
    problem = error.strerror if isinstance(error, OSError) else _first_problem(error)
    return Conflict(
        f"{path} has no usable {name} ({problem}): this run cannot be resumed; choose another "
        "run_id"
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _refuse_changes(saved: RunConfig, config: RunConfig) -> None:
    for name, before, now in _differences(_resolved(saved), _resolved(config)):
        raise InvalidRequest(
            f"{name} is {now!r}, run {saved.run_id!r} began with {before!r}: leave it, or choose "
            "another run_id"
        )


def _resolved(config: RunConfig) -> dict[str, Any]:
    """The fields of a config, with the clips of its loss filled in."""
    fields = config.model_dump()
    if isinstance(config.algorithm, PolicyGradientConfig):
        loss = LOSSES[config.algorithm.loss]
        for name in ("clip_low", "clip_high"):
            if fields["algorithm"][name] is None:
                fields["algorithm"][name] = getattr(loss, name)
    return fields


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ and must not: dotted name and both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.keys() == now.keys():
        for key in before.keys() - _MAY_CHANGE:
            yield from _differences(before[key], now[key], f"{name}.{key}".lstrip("."))
    elif isinstance(before, tuple) and isinstance(now, tuple) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{name}.{index}")
    elif before != now:
        yield name, before, now


def _refuse_completed(path: Path, saved: RunConfig, config: RunConfig) -> None:
    state = last_state(path)
    if state is None or state.state != "completed":
        return
    if (config.num_steps or 0) <= (saved.num_steps or 0):
        raise Conflict(
            f"run {path.name!r} has completed its {saved.num_steps} steps: set num_steps to more "
            "to resume it, or choose another run_id"
        )
