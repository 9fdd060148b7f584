"""Checkpoints: what a run needs to resume after kill -9, one folder per saved step.

    <run_dir>/checkpoints/step-000040/
        adapter_model.safetensors   the float32 master weights, as PEFT loads them
        adapter_config.json
        optimizer.pt                the optimizer's state, torch's RNG states, PPO's critic
        state.json                  CheckpointState, with the digests of the other files

A folder has its name only once it is whole and on disk. The newest one that is undamaged counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.trainer.data.rows import Consumed, ConsumedState
from services.trainer.durable import new_folder, remove_unfinished
from services.trainer.learner.learner import Learner, PolicySnapshot
from services.trainer.policy.adapter import write_adapter, write_digested
from services.trainer.run.log import RunLog
from services.trainer.run_config import CheckpointConfig
from shared.adapters import ADAPTER_WEIGHTS, manifest_metadata, read_header
from shared.metrics import TrainerMetrics
from shared.schemas import Digest, PolicyId

log = logging.getLogger(__name__)
_STATE = "state.json"
_DAMAGED = ".damaged"
_OPTIMIZER = "optimizer.pt"
_PACKAGES = ("torch", "peft", "transformers", "bitsandbytes")


class CheckpointState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyId
    step: int = Field(ge=1)
    num_updates: int = Field(ge=0)  # Updates that the learning rate schedule has seen.
    consumed: ConsumedState
    log_positions: dict[str, int]  # File of the run log -> its length in bytes at this step.
    digests: dict[str, Digest]  # File of the folder -> its SHA-256.
    versions: dict[str, str]  # Versions of the packages that wrote it.


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    state: CheckpointState
    snapshot: PolicySnapshot


class Checkpoints:
    """The checkpoints of one run, whose folder this process has locked."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, *, source: str, metrics: TrainerMetrics
    ) -> None:
        """`source`: the base model as `adapter_config.json` names it."""
        self.dir = run_dir / "checkpoints"
        self._config = config
        self._source = source
        self._metrics = metrics
        self._newest_step = 0

    # --- save -----------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the config names this step."""
        return step % self._config.every_steps == 0

    async def save(self, step: int, learner: Learner, run_log: RunLog, consumed: Consumed) -> None:
        """Keep the state after `step`, unless it is kept already or no step was taken.

        A full disk does not end the run: the failure is logged and counted, and the previous
        checkpoint stays the newest.
        """
        if step == self._newest_step:
            return
        state = consumed.state

        def write() -> None:
            run_log.sync()
            self._write(step, snapshot, state, positions)

        try:
            run_log.write_waiting()  # A resumed run must have every line up to its step.
            positions = run_log.positions
            snapshot = await asyncio.to_thread(learner.snapshot)
            await asyncio.to_thread(write)
        except OSError as error:
            self._metrics.checkpoints.labels("failed").inc()
            log.error(
                "step %d could not be saved in %s: %s; the run continues, and after a crash would "
                "resume from %s: free space there before the next checkpoint is due",
                step,
                self.dir,
                error.strerror or error,
                f"step {self._newest_step}" if self._newest_step else "its beginning",
            )
            return
        self._newest_step = step
        self._metrics.checkpoints.labels("saved").inc()
        try:
            await asyncio.to_thread(self._remove_old)
        except OSError as error:
            log.error(
                "old checkpoints in %s could not be removed: %s; the next one that is saved tries "
                "again: look whether the folder is writable",
                self.dir,
                error,
            )

    def _write(
        self,
        step: int,
        snapshot: PolicySnapshot,
        consumed: ConsumedState,
        positions: Mapping[str, int],
    ) -> None:
        from safetensors.torch import save

        with new_folder(self._folder(step), replace=True) as folder:
            weights = save(dict(snapshot.lora), manifest_metadata(snapshot.manifest))
            digests = write_adapter(folder, weights, snapshot.manifest, self._source)
            # A full disk then raises OSError instead of an error of torch.
            optimizer = io.BytesIO()
            others = {"optimizer": snapshot.optimizer, "rng": snapshot.rng}
            torch.save({**others, "critic": dict(snapshot.critic)}, optimizer)
            digests[_OPTIMIZER] = write_digested(folder / _OPTIMIZER, optimizer.getvalue())
            state = CheckpointState(
                policy=snapshot.manifest.policy,
                step=step,
                num_updates=snapshot.num_updates,
                consumed=consumed,
                log_positions=dict(positions),
                digests=digests,
                versions={name: version(name) for name in _PACKAGES},
            )
            write_digested(folder / _STATE, state.model_dump_json(indent=2).encode())

    def _remove_old(self) -> None:
        """Damaged checkpoints are removed along with whole ones of their age."""
        oldest = _step(self._folders()[: self._config.keep][-1])
        for folder in (*self._folders(), *self._folders(_DAMAGED)):
            if _step(folder) < oldest:
                shutil.rmtree(folder)

    def _folder(self, step: int) -> Path:
        return self.dir / f"step-{step:06d}"

    def _folders(self, suffix: str = "") -> list[Path]:
        """Newest first."""
        found = [p for p in self.dir.glob(f"step-*{suffix}") if _digits(p, suffix).isdigit()]
        return sorted(found, key=_step, reverse=True)

    # --- load -----------------------------------------------------------------------------------

    def load(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None when none was ever written.

        Leftovers of a killed writer are removed, and damaged checkpoints are renamed to `.damaged`.
        Raises ValueError when all are damaged: a run that has learned something does not start over
        unasked.
        """
        remove_unfinished(self.dir)
        damaged: dict[Path, ValueError] = {}
        for folder in self._folders():
            try:
                checkpoint = _read(folder)
            except ValueError as error:
                log.error("%s: the one before it is tried", error)
                damaged[folder] = error
                continue
            for bad in damaged:
                aside = bad.with_name(bad.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
            self._newest_step = checkpoint.state.step
            return checkpoint
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.dir} can be used ({next(iter(damaged.values()))}): "
                "restore one from a copy, or start a run with another run_id"
            )
        return None


def _digits(folder: Path, suffix: str) -> str:
    return folder.name.removeprefix("step-").removesuffix(suffix)


def _step(folder: Path) -> int:
    return int(_digits(folder, _DAMAGED))


def saved_adapter(folder: Path) -> bytes:
    """The adapter file of a checkpoint. Raises ValueError for a damaged one."""
    return _read_file(folder / ADAPTER_WEIGHTS, _read_state(folder).digests[ADAPTER_WEIGHTS])


def _read(folder: Path) -> Checkpoint:
    """Raises ValueError, naming the folder and the problem, for a checkpoint that has changed."""
    from safetensors.torch import load

    state = _read_state(folder)
    contents = {name: _read_file(folder / name, digest) for name, digest in state.digests.items()}
    try:
        saved: Any = torch.load(io.BytesIO(contents[_OPTIMIZER]), weights_only=True)
        snapshot = PolicySnapshot(
            manifest=read_header(folder / ADAPTER_WEIGHTS).manifest,
            lora=load(contents[ADAPTER_WEIGHTS]),
            optimizer=saved["optimizer"],
            num_updates=state.num_updates,
            rng=saved["rng"],
            critic=saved.get("critic", {}),  # Checkpoints of older versions have none.
        )
    except (KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {folder} is incomplete: {error}") from error
    return Checkpoint(folder, state, snapshot)


def _read_state(folder: Path) -> CheckpointState:
    try:
        return CheckpointState.model_validate_json((folder / _STATE).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} is damaged: it has no {_STATE}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ValueError(f"checkpoint {folder} is damaged: {_STATE}: {problem}") from error


def _read_file(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path.parent} is damaged: it has no {path.name}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"checkpoint {path.parent} is damaged: the {len(content)} bytes of {path.name} are not "
            "those that were saved"
        )
    return content
