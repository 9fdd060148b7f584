"""What the real engine samples and scores, against transformers and PEFT computed apart from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import mean

import pytest

from shared.schemas import (
    ChatMessage,
    Completion,
    GenerateRequest,
    GenerateResponse,
    PolicyId,
    SamplingParams,
)
from tests.publisher import PROBE, Publisher
from tests.reference_model import ReferenceModel
from tests.replica_process import ReplicaProcess, until

pytestmark = pytest.mark.anyio

KERNEL_NOISE = 0.05  # bf16 in another order of summation; adapters here move logprobs by 0.4
EOS = 2


@pytest.fixture(scope="session")
def base_model(replica: ReplicaProcess) -> ReferenceModel:
    return ReferenceModel(replica.base_dir())


def completions(answer: GenerateResponse) -> tuple[Completion, ...]:
    (group,) = answer.groups
    return group.completions


def gap(ours: list[float] | tuple[float, ...], theirs: list[float] | tuple[float, ...]) -> float:
    """The mean |Δlogprob|."""
    return mean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


# --- logprobs -----------------------------------------------------------------------------------


async def test_score_agrees_with_transformers_on_the_exact_base(
    publisher: Publisher, base_model: ReferenceModel
) -> None:
    scored = await publisher.score(policy=publisher.policy(0))
    assert scored == pytest.approx(base_model.of_tokens(PROBE), abs=KERNEL_NOISE)


async def test_the_exact_base_is_not_the_source_checkpoint(
    publisher: Publisher, tiny_checkpoint: Path, base_model: ReferenceModel
) -> None:
    scored = await publisher.score(policy=publisher.policy(0))
    to_source = gap(scored, ReferenceModel(tiny_checkpoint).of_tokens(PROBE))
    assert to_source > 3 * gap(scored, base_model.of_tokens(PROBE))


async def test_sampler_logprobs_are_of_the_tempered_distribution(
    publisher: Publisher, base_model: ReferenceModel
) -> None:
    answer = await publisher.generate(
        PROBE,
        policy=publisher.policy(0),
        n=4,
        temperature=0.7,
        max_tokens=40,
        seed=1,
        ignore_eos=True,
    )
    for completion in completions(answer):
        ids = (*PROBE, *completion.token_ids)
        tempered = base_model.of_tokens(ids, temperature=0.7)[len(PROBE) - 1 :]
        untempered = await publisher.score(ids, policy=publisher.policy(0))
        assert completion.logprobs == pytest.approx(tempered, abs=KERNEL_NOISE)
        assert gap(completion.logprobs, untempered[len(PROBE) - 1 :]) > 0.1


async def test_score_equals_the_sampler_logprobs_at_temperature_1(publisher: Publisher) -> None:
    policy = await publisher.publish(1)
    answer = await publisher.generate(PROBE, n=4, max_tokens=40, seed=2, ignore_eos=True)
    for completion in completions(answer):
        scored = await publisher.score((*PROBE, *completion.token_ids), policy=policy)
        assert completion.logprobs == pytest.approx(scored[len(PROBE) - 1 :], abs=KERNEL_NOISE)


async def test_an_adapter_moves_the_logprobs_as_peft_says(
    replica: ReplicaProcess, publisher: Publisher, base_model: ReferenceModel, tmp_path: Path
) -> None:
    adapter = publisher.adapter(publisher.policy(1), rank=4, scaling=4.0)
    await publisher.client.sync_weights(adapter, replace_run=True)
    scored = await publisher.score()
    moved = ReferenceModel(replica.base_dir(), adapter, tmp_path).of_tokens(PROBE)
    assert gap(moved, base_model.of_tokens(PROBE)) > 5 * KERNEL_NOISE
    assert scored == pytest.approx(moved, abs=KERNEL_NOISE)


async def test_an_adapter_of_some_modules_leaves_the_others_alone(
    replica: ReplicaProcess, publisher: Publisher, tmp_path: Path
) -> None:
    adapter = publisher.adapter(
        publisher.policy(1), rank=16, scaling=1.0, target_modules=("v_proj", "down_proj")
    )
    await publisher.client.sync_weights(adapter, replace_run=True)
    moved = ReferenceModel(replica.base_dir(), adapter, tmp_path).of_tokens(PROBE)
    assert await publisher.score() == pytest.approx(moved, abs=KERNEL_NOISE)


# --- sampling -----------------------------------------------------------------------------------


async def test_a_seed_reproduces_its_completion_and_another_does_not(publisher: Publisher) -> None:
    await publisher.publish(1)
    first, again, other = [
        completions(await publisher.generate(PROBE, max_tokens=40, seed=seed, ignore_eos=True))[0]
        for seed in (5, 5, 6)
    ]
    assert (first.token_ids, first.logprobs) == (again.token_ids, again.logprobs)
    assert first.token_ids != other.token_ids


async def test_completion_k_uses_seed_plus_k_across_prompts(publisher: Publisher) -> None:
    await publisher.publish(1)
    prompts = ([1, 3, 4], [1, 5, 6])
    together = await publisher.generate(*prompts, n=2, max_tokens=12, seed=100)
    assert [group.sampling.seed for group in together.groups] == [100, 102]
    for i, group in enumerate(together.groups):
        for k, completion in enumerate(group.completions):
            seed = 100 + 2 * i + k
            alone = await publisher.generate(prompts[i], max_tokens=12, seed=seed)
            assert completions(alone)[0].token_ids == completion.token_ids


async def test_greedy_takes_the_most_likely_token(
    publisher: Publisher, base_model: ReferenceModel
) -> None:
    answer = await publisher.generate(
        PROBE, policy=publisher.policy(0), temperature=0, max_tokens=1, ignore_eos=True
    )
    best = int(base_model.logprobs(PROBE)[-1].argmax())
    assert completions(answer)[0].token_ids == (best,)


async def test_token_ids_include_the_stop_token_and_nothing_after_it(publisher: Publisher) -> None:
    await publisher.publish(1)
    answer = await publisher.generate([1, 3, 4], n=64, max_tokens=100, seed=3)
    reasons = {completion.finish_reason for completion in completions(answer)}
    assert "stop" in reasons
    for completion in completions(answer):
        ends_with_eos = completion.token_ids[-1] == EOS
        assert ends_with_eos == (completion.finish_reason == "stop")
        assert EOS not in completion.token_ids[:-1]


async def test_a_stop_token_of_the_request_is_included(publisher: Publisher) -> None:
    await publisher.publish(1)
    answer = await publisher.generate(
        PROBE, max_tokens=400, seed=4, ignore_eos=True, stop_token_ids=(7,)
    )
    (completion,) = completions(answer)
    assert completion.finish_reason == "stop"
    assert completion.token_ids.index(7) == len(completion.token_ids) - 1


async def test_max_tokens_defaults_to_the_context(publisher: Publisher) -> None:
    answer = await publisher.generate([1] * 500, policy=publisher.policy(0), ignore_eos=True)
    (completion,) = completions(answer)
    assert (len(completion.token_ids), completion.finish_reason) == (12, "length")
    assert answer.groups[0].sampling.max_tokens == 12


async def test_text_chat_and_ids_are_the_same_prompt(publisher: Publisher) -> None:
    """The template renders `<bos>` and the contents, then `=` for the answer: "12+3="."""
    request = GenerateRequest(
        prompts=("12+3=", (ChatMessage(role="user", content="12+3"),), (1, 4, 5, 13, 6, 14)),
        sampling=SamplingParams(temperature=0, max_tokens=5),
    )
    text, chat, ids = (await publisher.client.generate(request)).groups
    assert text.prompt_token_ids == chat.prompt_token_ids == ids.prompt_token_ids
    assert ids.prompt_token_ids == (1, 4, 5, 13, 6, 14)
    assert text.completions[0].text == ids.completions[0].text is not None


async def test_text_is_left_out_on_request(publisher: Publisher) -> None:
    answer = await publisher.generate([1, 3], max_tokens=3, detokenize=False)
    assert completions(answer)[0].text is None


# --- versions -----------------------------------------------------------------------------------


async def test_the_newest_version_answers_and_every_token_knows_it(publisher: Publisher) -> None:
    first, second = await publisher.publish(1), await publisher.publish(2)
    for pinned, served in ((None, second), (first, first), (publisher.policy(0),) * 2):
        answer = await publisher.generate([1, 3], policy=pinned, max_tokens=5, ignore_eos=True)
        (segment,) = completions(answer)[0].segments
        assert (segment.policy, segment.num_tokens) == (served, 5)


async def test_the_prefix_cache_never_crosses_versions(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    """A prompt of three cache blocks: what one version cached must not answer for another."""
    prompt = PROBE * 10  # 410 tokens, blocks have 128
    first, second = await publisher.publish(1), await publisher.publish(2)
    base = publisher.policy(0)

    async def greedy(policy: PolicyId) -> tuple[float, ...]:
        answer = await publisher.generate(
            prompt, policy=policy, temperature=0, max_tokens=8, ignore_eos=True
        )
        return completions(answer)[0].logprobs

    uncached = {policy: await greedy(policy) for policy in (first, second, base)}
    assert gap(uncached[first], uncached[second]) > 1e-2
    assert gap(uncached[first], uncached[base]) > 1e-2
    assert gap(uncached[second], uncached[base]) > 1e-2
    hits = replica.metric("vllm:prefix_cache_hits_total")
    for policy in (first, second, base):
        assert await greedy(policy) == pytest.approx(uncached[policy], abs=1e-3)
    await until(lambda: replica.metric("vllm:prefix_cache_hits_total") - hits == 3 * 384)


async def test_scores_of_one_batch_do_not_mix_versions(publisher: Publisher) -> None:
    policies = await fill_every_slot(publisher)
    alone = {policy: await publisher.score(policy=policy) for policy in policies}
    together = await asyncio.gather(*(publisher.score(policy=p) for p in policies * 4))
    for policy, scored in zip(policies * 4, together, strict=True):
        assert scored == pytest.approx(alone[policy], abs=KERNEL_NOISE)


async def test_completions_of_one_batch_do_not_mix_versions(publisher: Publisher) -> None:
    policies = await fill_every_slot(publisher)
    sampled = await asyncio.gather(
        *(
            publisher.generate(PROBE, policy=policy, n=2, max_tokens=30, seed=1, ignore_eos=True)
            for policy in policies
        )
    )
    for policy, answer in zip(policies, sampled, strict=True):
        for completion in completions(answer):
            ids = (*PROBE, *completion.token_ids)
            scored = (await publisher.score(ids, policy=policy))[len(PROBE) - 1 :]
            assert completion.logprobs == pytest.approx(scored, abs=KERNEL_NOISE)


async def fill_every_slot(publisher: Publisher) -> list[PolicyId]:
    """The policies that can be asked for after slots were used and freed a few times."""
    for version in (1, 2, 3, 4, 5):
        await publisher.publish(version)
    return [publisher.policy(version) for version in (0, 4, 5)]


async def test_running_completions_keep_their_version_when_a_sync_arrives(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    first = await publisher.publish(1)
    running = await start_long(replica, publisher)
    second = await publisher.publish(2)
    short = await publisher.generate([1, 3], max_tokens=2, ignore_eos=True)
    assert completions(short)[0].segments[0].policy == second
    assert not running.done()
    assert replica.num_leases(first) == 1
    for completion in completions(await running):
        assert (len(completion.token_ids), completion.finish_reason) == (400, "length")
        assert [segment.policy for segment in completion.segments] == [first]
        scored = await publisher.score((*PROBE, *completion.token_ids), policy=first)
        assert completion.logprobs == pytest.approx(scored[len(PROBE) - 1 :], abs=3 * KERNEL_NOISE)


async def test_an_interrupted_completion_goes_on_under_the_new_version(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    first = await publisher.publish(1)
    running = await start_long(replica, publisher)
    second = await publisher.publish(2, in_flight="continue")
    for completion in completions(await running):
        assert completion.finish_reason == "interrupted"
        assert 0 < len(completion.token_ids) < 400
        assert len(completion.token_ids) == len(completion.logprobs)
        assert [segment.policy for segment in completion.segments] == [first]
    part = completions(await running)[0]
    rest = completions(
        await publisher.generate(
            PROBE, completion_prefix=part.token_ids, max_tokens=20, seed=1, ignore_eos=True
        )
    )[0]
    assert [(s.policy, s.num_tokens) for s in rest.segments] == [(second, 20)]
    whole = (*PROBE, *part.token_ids, *rest.token_ids)
    scored = await publisher.score(whole, policy=second)
    assert rest.logprobs == pytest.approx(scored[-20:], abs=KERNEL_NOISE)


async def start_long(
    replica: ReplicaProcess, publisher: Publisher
) -> asyncio.Task[GenerateResponse]:
    """Four completions of 400 tokens under the newest version; returns once they run."""
    tokens = replica.metric("vllm:generation_tokens_total")
    task = asyncio.ensure_future(
        publisher.generate(PROBE, n=4, max_tokens=400, seed=9, ignore_eos=True)
    )
    await until(lambda: replica.metric("vllm:generation_tokens_total") > tokens)
    return task


async def test_a_short_request_overtakes_the_long_ones_that_already_run(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    """Continuous batching: it joins the running batch instead of waiting for its end."""
    await publisher.publish(1)
    running = await start_long(replica, publisher)
    await publisher.generate([1, 3], max_tokens=4, ignore_eos=True)
    assert not running.done()
    await running


async def test_more_requests_than_run_at_once_wait_and_all_finish(publisher: Publisher) -> None:
    """ROLLOUT_MAX_NUM_SEQS is 8 here."""
    await publisher.publish(1)
    answer = await publisher.generate([1, 3], n=40, max_tokens=10, ignore_eos=True, seed=0)
    assert [len(completion.token_ids) for completion in completions(answer)] == [10] * 40


async def test_the_adapter_file_of_a_version_is_the_one_that_was_pushed(
    publisher: Publisher,
) -> None:
    policy = publisher.policy(3)
    adapter = publisher.adapter(policy)
    receipt = await publisher.client.sync_weights(adapter, replace_run=True)
    assert await publisher.client.adapter(3) == adapter
    (resident,) = (await publisher.client.policies()).resident
    assert (resident.policy, resident.digest, resident.num_bytes) == (
        policy,
        receipt.digest,
        len(adapter),
    )


async def test_status_names_base_limits_and_versions(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    policy = await publisher.publish(2)
    status = await publisher.client.status()
    assert (status.state, status.kv_cache_dtype, status.serving_mode) == ("ready", "auto", "lora")
    assert status.model == str(replica.checkpoint)
    assert (status.limits.max_model_len, status.limits.max_num_seqs) == (512, 8)
    assert (status.newest, [item.policy for item in status.resident]) == (policy, [policy])
    assert status.num_outstanding_completions == 0
    assert replica.metric("tandem_rollout_policy_version") == 2


async def test_seeded_prompts_that_are_too_many_for_one_prefill_are_all_served(
    publisher: Publisher,
) -> None:
    """vLLM's CPU runner dies when it cuts the prefill of a seeded request in parts."""
    prompts = [[1, *(3 + (7 * i + j) % 12 for j in range(150))] for i in range(8)]
    answer = await publisher.generate(*prompts, max_tokens=4, seed=1, ignore_eos=True)
    assert [len(group.completions[0].token_ids) for group in answer.groups] == [4] * 8


async def test_adapters_are_loaded_beside_the_engine_s_work(
    publisher: Publisher, replica: ReplicaProcess
) -> None:
    """vLLM's own way, for which the engine pauses, is the one that nothing else tells apart."""
    await publisher.publish(1)
    assert "cannot be loaded beside" not in replica.log.read_text()
