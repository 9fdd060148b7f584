"""POST /train: updates from groups or pairs that somebody else made, each exactly once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence

from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import make_samples, pair_samples
from services.trainer.run.run import Run
from services.trainer.run.step import Clock, Meter, learn, step_record
from services.trainer.run_config import RunConfig
from shared.errors import (
    IdempotencyConflict,
    InvalidRequest,
    RunConflict,
    ServiceError,
    UnexpectedPolicy,
    UnsuitableForTraining,
)
from shared.schemas import PreferencePair, ScoredGroup, SyncReceipt, TrainRequest, TrainResponse

log = logging.getLogger(__name__)
_KEPT_ANSWERS = 64


class ExternalUpdates:
    """The updates of one external run, counted from its checkpoint.

    Answers live in memory: a crash loses the answers and updates since the last checkpoint. The
    next request then gets UnexpectedPolicy, which names the policy to continue from.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.lock = asyncio.Lock()  # Held while the policy changes.
        # Key -> digest of the request, answer.
        self._answers: dict[str, tuple[str, TrainResponse]] = {}

    async def train(self, request: TrainRequest, ready: asyncio.Event) -> TrainResponse:
        """One update, once a replica is `ready`. A repeated key gets the first answer."""
        digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        async with self.lock:
            if answer := self._earlier_answer(request.idempotency_key, digest):
                return answer
            await ready.wait()
            self._check(request)
            return await self._update(request, digest)

    async def _update(self, request: TrainRequest, digest: str) -> TrainResponse:
        run = self._run
        step = run.policy.id.version + 1  # Every update of a run makes one version.
        clock, meter = Clock(), Meter(run.fleet)
        run.recent.add(step, request.groups)
        try:
            samples = pair_samples(request.pairs) or make_samples(request.groups, run.policy.id)
            learned = await learn(run, samples, step=step, clock=clock)
        except UnsuitableForTraining as error:  # Nothing was applied, so the run continues.
            log.error("%s", error.detail)
            raise
        receipts: tuple[SyncReceipt, ...] = ()
        with clock.measure("sync_s"):
            try:
                receipts = await run.fleet.sync(
                    learned.adapter, timeout_s=run.config.sync_timeout_s
                )
            except ServiceError as error:  # The update stands; replicas get it when they return.
                log.error("no replica has policy %s yet: %s", run.policy.id, error.detail)
        record = step_record(run.config, learned, clock, meter)
        answer = TrainResponse(
            policy=run.policy.id, step=record, receipts=receipts, replicas=run.fleet.status()
        )
        # Keep the answer even if logging or saving fails.
        self._keep(request.idempotency_key, digest, answer)
        await run.log.emit(record)
        await run.save_if_due(step)
        return answer

    def _keep(self, key: str, digest: str, answer: TrainResponse) -> None:
        self._answers[key] = digest, answer
        for old in list(self._answers)[:-_KEPT_ANSWERS]:
            del self._answers[old]

    def _earlier_answer(self, key: str, digest: str) -> TrainResponse | None:
        if key not in self._answers:
            return None
        first, answer = self._answers[key]
        if first != digest:
            raise IdempotencyConflict(
                f"idempotency_key {key!r} was used for another request: use a new key for every "
                "update"
            )
        return answer

    def _check(self, request: TrainRequest) -> None:
        run = self._run
        if run.log.state != "external" or run.stop.is_set():
            state = f"{run.log.state} {run.log.detail}".rstrip()
            raise RunConflict(
                f"run {run.config.run_id!r} is {state}: POST /train needs a run that was "
                'started with {"managed": false} and has not ended'
            )
        if request.expected_policy != run.policy.id:
            raise UnexpectedPolicy(
                f"expected_policy is {request.expected_policy}, the policy is {run.policy.id}: "
                "sample from it and send new groups",
                extra={"current": run.policy.id.model_dump()},
            )
        if run.config.algorithm.learns_from_pairs != bool(request.pairs):
            wanted, sent = ("pairs", "groups") if request.groups else ("groups", "pairs")
            raise UnsuitableForTraining(
                f"algorithm {run.config.algorithm.name} learns from {wanted}, the request has "
                f"{sent}: send {wanted}, or start a run with another algorithm"
            )
        for index, pair in enumerate(request.pairs):
            _check_pair(index, pair, run.policy)
        _check_rewards(request.groups)
        for index, group in enumerate(request.groups):
            _check_group(index, group, run.config, run.policy)


def _check_pair(index: int, pair: PreferencePair, policy: Policy) -> None:
    for ids in (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids):
        policy.encoder.check_vocabulary(ids)
    if pair.num_positions > policy.max_positions:
        raise InvalidRequest(
            f"pair {index} has {pair.num_positions} tokens with its longer answer, the model has "
            f"{policy.max_positions} positions"
        )


def _check_rewards(groups: Sequence[ScoredGroup]) -> None:
    counts = {len(scored.rewards or (1,)) for group in groups for scored in group.completions}
    if len(counts) > 1:
        raise UnsuitableForTraining(
            f"completions have {' or '.join(map(str, sorted(counts)))} rewards: give each as many"
        )


def _check_group(index: int, group: ScoredGroup, config: RunConfig, policy: Policy) -> None:
    """Refuse a group that a gradient cannot use."""
    if config.algorithm.compares_within_groups and len(group.completions) < 2:
        raise UnsuitableForTraining(
            f"group {index} has 1 completion, and algorithm {config.algorithm.name} compares "
            "the completions of a group: send 2 or more"
        )
    if obstacles := group.sampling.gradient_obstacles():
        raise UnsuitableForTraining(
            f"group {index} was sampled with {', '.join(obstacles)}: sample with purpose 'train'"
        )
    policy.encoder.check_vocabulary(group.prompt_token_ids)
    for number, scored in enumerate(group.completions):
        completion, where = scored.completion, f"completion {number} of group {index}"
        if completion.finish_reason == "interrupted" or not completion.token_ids:
            raise UnsuitableForTraining(f"{where} is unfinished: continue it, then send it")
        policy.encoder.check_vocabulary(completion.token_ids)
        num_tokens = len(group.prompt_token_ids) + len(completion.token_ids)
        if num_tokens > policy.max_positions:
            raise InvalidRequest(
                f"{where} has {num_tokens} tokens with its prompt, the model has "
                f"{policy.max_positions} positions"
            )
        for segment in completion.segments:
            theirs = segment.policy
            if not theirs.is_base and (
                theirs.life != policy.id.life or theirs.version > policy.id.version
            ):
                raise UnexpectedPolicy(
                    f"{where} was sampled by {theirs}, the policy that trains is {policy.id}"
                )
