"""From a run config to a Run, as of its last checkpoint if it has one.

config ─▶ folder ─▶ checkpoint ─▶ data ─▶ rewards ─▶ learner ─▶ probe ─▶ Run
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from services.trainer.data.datasets import load_pairs, load_prompts
from services.trainer.data.rows import Consumed, Prompt, RowStream
from services.trainer.durable import new_folder
from services.trainer.fleet.conformance import Probe
from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.probe import make_probe
from services.trainer.learner.learner import Learner
from services.trainer.policy.adapter import write_adapter
from services.trainer.policy.policy import Policy
from services.trainer.rewards.scorer import Scorer
from services.trainer.run.checkpoints import Checkpoint, Checkpoints
from services.trainer.run.folder import RunFolder, dataset_digest
from services.trainer.run.log import RunLog
from services.trainer.run.run import Run
from services.trainer.run.tracking import TrackedRun, check_tracking
from services.trainer.run_config import PreferenceDataset, RunConfig
from shared.errors import InvalidRequest
from shared.metrics import TrainerMetrics
from shared.schemas import PolicyId, PreferencePair, StateRecord


@dataclass(frozen=True, slots=True)
class PreparedRun:
    run: Run
    folder: RunFolder
    probe: Probe


async def prepare(
    config: RunConfig, learner: Learner, fleet: Fleet, *, runs_dir: Path, metrics: TrainerMetrics
) -> PreparedRun:
    """Everything the run needs; the learner's policy is the version to continue from.

    Raises InvalidRequest for a config that cannot run, and Conflict for a run with that id that
    cannot be resumed. The caller closes the run's scorer and log, and the folder.
    """
    assert config.run_id
    path, policy = runs_dir / config.run_id, learner.policy
    with _mistakes_refused(), ExitStack() as on_failure:
        await asyncio.to_thread(check_tracking, config.tracking)
        folder = await asyncio.to_thread(_reopened, path, config, policy)
        if folder:
            on_failure.callback(folder.close)
        checkpoints = Checkpoints(path, config.checkpoint, source=policy.source, metrics=metrics)
        saved = await asyncio.to_thread(_newest, checkpoints, config)
        data = await asyncio.to_thread(_load_data, config, policy)
        digest = await asyncio.to_thread(dataset_digest, (*data.prompts, *data.pairs))
        if folder:
            folder.refuse_other_dataset(config, digest)
        scorer = Scorer(config.rewards, policy.encoder)
        on_failure.callback(scorer.close)
        await scorer.check(data.prompts_by_field)
        incarnation = folder.life.incarnation + 1 if folder else 1
        begin = PolicyId(run_id=config.run_id, incarnation=incarnation, version=0)
        probe = await asyncio.to_thread(_start, learner, begin, config, data)
        if folder:
            await asyncio.to_thread(folder.begin_life, config)
        else:
            identity = policy.identity
            folder = await asyncio.to_thread(
                RunFolder.create, path, config, identity, dataset=digest
            )
            on_failure.callback(folder.close)
        if saved:
            restored = begin.model_copy(update={"version": saved.state.policy.version})
            await asyncio.to_thread(learner.restore, restored, saved.snapshot)
        run = Run(
            config=config,
            learner=learner,
            fleet=fleet,
            log=_open_log(path, config, saved, metrics, is_new=incarnation == 1),
            prompts=RowStream(data.prompts, seed=config.seed),
            pairs=RowStream(data.pairs, seed=config.seed),
            consumed=Consumed(saved.state.consumed) if saved else Consumed(),
            checkpoints=checkpoints,
            first_step=saved.state.step if saved else 0,
            scorer=scorer,
            held_out=data.held_out,
            stop=asyncio.Event(),
        )
        scorer.on_stall = partial(_say_stalled, run, metrics)
        on_failure.pop_all()
    return PreparedRun(run, folder, probe)


@contextmanager
def _mistakes_refused() -> Iterator[None]:
    """Inside, a ValueError is a mistake in the config: InvalidRequest."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _reopened(path: Path, config: RunConfig, policy: Policy) -> RunFolder | None:
    """The folder of an existing run."""
    return RunFolder.reopen(path, config, policy.identity) if path.exists() else None


def _newest(checkpoints: Checkpoints, config: RunConfig) -> Checkpoint | None:
    saved = checkpoints.load()
    if saved and config.num_steps and config.num_steps < saved.state.step:
        raise InvalidRequest(
            f"num_steps is {config.num_steps}, run {config.run_id!r} has taken {saved.state.step} "
            "already: set it to more"
        )
    return saved


def _start(learner: Learner, begin: PolicyId, config: RunConfig, data: _Data) -> Probe:
    """Start version 0; returns the probe of the run."""
    policy = learner.policy
    learner.start(
        begin, config.lora, config.optimizer, seed=config.seed, algorithm=config.algorithm
    )
    probe = make_probe(policy, data.prompt_token_ids, config.conformance, seed=config.seed)
    policy.set_probe(probe.sequences)
    return probe


def _open_log(
    path: Path,
    config: RunConfig,
    saved: Checkpoint | None,
    metrics: TrainerMetrics,
    *,
    is_new: bool,
) -> RunLog:
    assert config.run_id
    return RunLog(
        path,
        metrics,
        positions=saved.state.log_positions if saved else {},
        first_step=saved.state.step if saved else 0,
        tracked=TrackedRun(
            trackers=config.tracking,
            run_id=config.run_id,
            is_new=is_new,
            folder=path,
            settings=config.public_settings(),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Data:
    prompts: Sequence[Prompt] = ()
    pairs: Sequence[PreferencePair] = ()
    held_out: Sequence[Prompt] = ()

    @property
    def prompt_token_ids(self) -> list[tuple[int, ...]]:
        prompts = [prompt.token_ids for prompt in (*self.prompts, *self.held_out)]
        return [*(pair.prompt_token_ids for pair in self.pairs), *prompts]

    @property
    def prompts_by_field(self) -> dict[str, Sequence[Prompt]]:
        """The prompts that rewards will see, by the field of the config that names them."""
        fields = {"dataset": self.prompts, "eval.dataset": self.held_out}
        return {name: prompts for name, prompts in fields.items() if prompts}


def _load_data(config: RunConfig, policy: Policy) -> _Data:
    data = _Data()
    if isinstance(config.dataset, PreferenceDataset):
        pairs = load_pairs(config.dataset, policy.encoder, max_positions=policy.max_positions)
        data = replace(data, pairs=pairs)
    elif config.dataset:
        prompts = load_prompts(config.dataset, policy.encoder, seed=config.seed)
        data = replace(data, prompts=prompts)
    if config.eval:
        held_out = load_prompts(
            config.eval.dataset, policy.encoder, seed=config.seed, held_out=True
        )
        data = replace(data, held_out=held_out[: config.eval.num_prompts])
    return data


async def _say_stalled(run: Run, metrics: TrainerMetrics, why: str) -> None:
    """Show followers of the run which rewards it waits for; "" once they are back."""
    metrics.record_reward_outage(bool(why))
    # Several batches may wait for the same reward.
    if run.log.state == "running" and run.log.detail != why:
        await run.log.emit(StateRecord(state="running", detail=why))


def save_adapter(run: Run) -> None:
    """Write the current adapter in PEFT's format to `<run_dir>/adapter`; nothing for version 0."""
    if run.policy.id.is_base:
        return
    adapter = run.policy.publish()
    with new_folder(run.log.run_dir / "adapter", replace=True) as folder:
        write_adapter(folder, adapter.content, adapter.manifest, run.policy.source)
