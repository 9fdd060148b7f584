"""Every adapter that must be refused, on the real engine over real HTTP.

After each refusal the policy that served before still serves, with the same logprobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from shared.adapters import MANIFEST_KEY, content_digest, manifest_metadata
from shared.errors import (
    MEDIA_TYPE,
    TYPE_PREFIX,
    InvalidAdapter,
    NoFreeSlot,
    RunConflict,
    StaleVersion,
)
from shared.rollout_client import RolloutClient
from shared.schemas import AdapterManifest, GenerateResponse, PolicyId
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.publisher import PROBE, Publisher
from tests.replica_process import ReplicaProcess, until

pytestmark = pytest.mark.anyio

SERVING_VERSION = 5
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"  # 128 -> 128


@dataclass(frozen=True, slots=True)
class Upload:
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)  # over the right Content-Digest
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An upload, made from a publisher whose version 5 serves, and what is said about it."""

    name: str
    upload: Callable[[Publisher], Upload]
    status: int
    error: str
    says: str


def next_manifest(publisher: Publisher, **fields: Any) -> AdapterManifest:
    return make_manifest(publisher.base, publisher.policy(SERVING_VERSION + 1), **fields)


def of_manifest(publisher: Publisher, manifest: AdapterManifest) -> Upload:
    """Valid tensors under a manifest that may not be."""
    return Upload(adapter_file(manifest, make_tensors(manifest, publisher.shapes, seed=0)))


def with_tensors(**changes: torch.Tensor | None) -> Callable[[Publisher], Upload]:
    """The next version with tensors of layer 0's q_proj changed; None takes one away."""

    def upload(publisher: Publisher) -> Upload:
        manifest = next_manifest(publisher)
        tensors = make_tensors(manifest, publisher.shapes, seed=0)
        for name, tensor in changes.items():
            tensors.pop(f"{Q_PROJ}.{name}.weight", None)
            if tensor is not None:
                tensors[f"{Q_PROJ}.{name}.weight"] = tensor
        return Upload(adapter_file(manifest, tensors))

    return upload


def with_extra_tensor(name: str, *shape: int) -> Callable[[Publisher], Upload]:
    def upload(publisher: Publisher) -> Upload:
        manifest = next_manifest(publisher)
        tensors = make_tensors(manifest, publisher.shapes, seed=0)
        return Upload(adapter_file(manifest, tensors | {name: torch.ones(shape)}))

    return upload


def with_manifest_field(name: str, value: object) -> Callable[[Publisher], Upload]:
    """The next version, its manifest edited behind the schema's back."""

    def upload(publisher: Publisher) -> Upload:
        manifest = next_manifest(publisher)
        fields = manifest.model_dump(mode="json") | {name: value}
        tensors = make_tensors(manifest, publisher.shapes, seed=0)
        return Upload(save(tensors, metadata={MANIFEST_KEY: json.dumps(fields)}))

    return upload


def with_value(value: float, where: str = "lora_B") -> Callable[[Publisher], Upload]:
    def upload(publisher: Publisher) -> Upload:
        manifest = next_manifest(publisher)
        tensors = make_tensors(manifest, publisher.shapes, seed=0)
        tensors[f"{Q_PROJ}.{where}.weight"][3, 1] = value
        return Upload(adapter_file(manifest, tensors))

    return upload


def with_header(edit: Callable[[bytes], bytes]) -> Callable[[Publisher], Upload]:
    """The next version with the JSON header of the file edited as text."""

    def upload(publisher: Publisher) -> Upload:
        content = publisher.adapter(publisher.policy(SERVING_VERSION + 1))
        (size,) = struct.unpack("<Q", content[:8])
        header = edit(content[8 : 8 + size])
        assert header != content[8 : 8 + size]
        header += b" " * (-len(header) % 8)
        return Upload(struct.pack("<Q", len(header)) + header + content[8 + size :])

    return upload


def valid(publisher: Publisher) -> bytes:
    return publisher.adapter(publisher.policy(SERVING_VERSION + 1))


def with_digest(header: str | None) -> Callable[[Publisher], Upload]:
    headers = {} if header is None else {"Content-Digest": header}
    return lambda publisher: Upload(valid(publisher), headers={"Content-Digest": "", **headers})


def truncated(publisher: Publisher) -> Upload:
    whole = valid(publisher)
    digest = content_digest(hashlib.sha256(whole).digest())
    return Upload(whole[: len(whole) // 2], headers={"Content-Digest": digest})


def of_another_base(publisher: Publisher) -> Upload:
    other = publisher.base.model_copy(update={"weights": "ab" * 32})
    return of_manifest(publisher, make_manifest(other, publisher.policy(SERVING_VERSION + 1)))


def of_another_tokenizer(publisher: Publisher) -> Upload:
    other = publisher.base.model_copy(update={"tokenizer": "cd" * 32})
    return of_manifest(publisher, make_manifest(other, publisher.policy(SERVING_VERSION + 1)))


def of_the_original_base(publisher: Publisher) -> Upload:
    other = publisher.base.model_copy(update={"recipe": None})
    return of_manifest(publisher, make_manifest(other, publisher.policy(SERVING_VERSION + 1)))


def of_version(
    version: int, *, incarnation: int = 1, seed: int = 99
) -> Callable[[Publisher], Upload]:
    return lambda publisher: Upload(
        publisher.adapter(publisher.policy(version, incarnation), seed=seed)
    )


def of_another_run(publisher: Publisher) -> Upload:
    policy = PolicyId(run_id=f"other-{publisher.run_id}", version=1)
    return Upload(publisher.adapter(policy))


def of_a_module_without_adapter(publisher: Publisher) -> Upload:
    manifest = next_manifest(publisher)
    tensors = make_tensors(manifest, publisher.shapes, seed=0)
    edited = manifest.model_copy(update={"target_modules": (*manifest.target_modules, "lm_head")})
    return Upload(save(tensors, metadata=manifest_metadata(edited)))


INVALID = "InvalidAdapter"
REFUSALS = [
    Refusal(
        "a body that is not safetensors",
        lambda _: Upload(b"\x10\0\0\0\0\0\0\0this is no json!"),
        422,
        INVALID,
        "not a safetensors file",
    ),
    Refusal("an empty body", lambda _: Upload(b""), 422, INVALID, "a body of 0 bytes"),
    Refusal(
        "a header over 1 MiB",
        lambda _: Upload(struct.pack("<Q", (1 << 20) + 1) + b"{}"),
        422,
        INVALID,
        "1048577 bytes, but the limit is 1048576",
    ),
    Refusal(
        "a header longer than the file",
        lambda _: Upload(struct.pack("<Q", 1000) + b"{}" + b" " * 10),
        422,
        INVALID,
        "the safetensors metadata has no 'tandem_manifest'",
    ),
    Refusal(
        "a header that is a list",
        lambda _: Upload(struct.pack("<Q", 2) + b"[]"),
        422,
        INVALID,
        "its header is not an object",
    ),
    Refusal(
        "a header with a number of 5000 digits",
        lambda _: Upload(struct.pack("<Q", 5006) + b'{"a":' + b"1" * 5000 + b"}"),
        422,
        INVALID,
        "not a safetensors file",
    ),
    Refusal(
        "a header nested 100000 deep",
        lambda _: Upload(struct.pack("<Q", 100_000) + b"[" * 100_000),
        422,
        INVALID,
        "more than 30000 objects and lists",
    ),
    Refusal(
        "duplicate header keys",
        with_header(lambda header: header.replace(b"layers.1.self_attn", b"layers.0.self_attn")),
        422,
        INVALID,
        "twice",
    ),
    Refusal(
        "an infinite size in the header",
        with_header(lambda header: header.replace(b"[8,128]", b"[Infinity,128]", 1)),
        422,
        INVALID,
        "malformed",
    ),
    Refusal(
        "overlapping tensors",
        with_header(lambda header: header.replace(b"[6144,8192]", b"[0,2048]", 1)),
        422,
        INVALID,
        "not a safetensors file",
    ),
    Refusal(
        "no manifest",
        lambda _: Upload(save({"x": torch.ones(1)})),
        422,
        INVALID,
        "the safetensors metadata has no 'tandem_manifest'",
    ),
    Refusal(
        "a digest of other bytes",
        with_digest(content_digest(bytes(32))),
        422,
        "DigestMismatch",
        "Content-Digest announced " + "00" * 32,
    ),
    Refusal("no Content-Digest", with_digest(None), 422, "InvalidRequest", "Content-Digest is"),
    Refusal(
        "a Content-Digest of md5",
        with_digest("md5=:AAAAAAAAAAAAAAAAAAAAAA==:"),
        422,
        "InvalidRequest",
        "md5=:AAAAAAAAAAAAAAAAAAAAAA==:",
    ),
    Refusal(
        "a Content-Digest that is not base64",
        with_digest("sha-256=:abcde:"),
        422,
        "InvalidRequest",
        "sha-256=:abcde:",
    ),
    Refusal("a truncated upload", truncated, 422, "DigestMismatch", "truncated or altered"),
    Refusal(
        "a body announced over the limit",
        lambda _: Upload(bytes((8 << 20) + 1)),
        413,
        "BodyTooLarge",
        "8388609 bytes is over the limit of 8388608",
    ),
    Refusal(
        "a wrong tensor name",
        with_header(lambda header: header.replace(b"layers.3.mlp.up", b"layers.4.mlp.up")),
        422,
        INVALID,
        "has no tensor 'base_model.model.model.layers.3.mlp.up_proj.lora_A.weight'",
    ),
    Refusal(
        "names without PEFT's prefix",
        with_header(lambda header: header.replace(b"base_model.model.model", b"model")),
        422,
        INVALID,
        "(and 55 more)",
    ),
    Refusal(
        "a missing tensor",
        with_tensors(lora_B=None),
        422,
        INVALID,
        f"has no tensor '{Q_PROJ}.lora_B.weight'",
    ),
    Refusal(
        "an extra tensor",
        with_extra_tensor("base_model.model.lm_head.lora_A.weight", 8, 128),
        422,
        INVALID,
        "has an unexpected tensor 'base_model.model.lm_head.lora_A.weight'",
    ),
    Refusal(
        "a wrong shape",
        with_tensors(lora_B=torch.ones(64, 8)),
        422,
        INVALID,
        "has shape [64, 8], but this base and rank 8 need [128, 8]",
    ),
    Refusal(
        "tensors of another rank than the manifest's",
        with_tensors(lora_A=torch.ones(4, 128), lora_B=torch.ones(128, 4)),
        422,
        INVALID,
        "has shape [4, 128], but this base and rank 8 need [8, 128]",
    ),
    Refusal(
        "a dtype F64",
        with_tensors(lora_A=torch.ones(8, 128, dtype=torch.float64)),
        422,
        INVALID,
        "has dtype F64: write it as one of BF16, F16, F32",
    ),
    Refusal(
        "a dtype I8",
        with_tensors(lora_A=torch.ones(8, 128, dtype=torch.int8)),
        422,
        INVALID,
        "has dtype I8",
    ),
    Refusal(
        "a dtype that does not exist",
        with_header(lambda header: header.replace(b'"BF16"', b'"BF17"', 1)),
        422,
        INVALID,
        "has dtype BF17",
    ),
    Refusal(
        "a NaN", with_value(float("nan")), 422, INVALID, f"'{Q_PROJ}.lora_B.weight' has NaN or Inf"
    ),
    Refusal(
        "an Inf",
        with_value(float("-inf"), "lora_A"),
        422,
        INVALID,
        f"'{Q_PROJ}.lora_A.weight' has NaN or Inf",
    ),
    Refusal(
        "finite weights that overflow",
        with_tensors(lora_A=torch.ones(8, 128), lora_B=torch.full((128, 8), 1e30)),
        422,
        INVALID,
        f"the adapter of '{Q_PROJ}' may change a weight by 1.6e+31, the limit is 1000",
    ),
    Refusal(
        "large weights behind zeros",
        with_tensors(lora_A=torch.full((8, 128), 2e3), lora_B=torch.zeros(128, 8)),
        422,
        INVALID,
        f"the adapter of '{Q_PROJ}' may change a weight by 2e+03, the limit is 1000",
    ),
    Refusal(
        "a rank above the maximum",
        lambda publisher: of_manifest(publisher, next_manifest(publisher, rank=17)),
        422,
        INVALID,
        "rank 17 is over this replica's maximum of 16",
    ),
    Refusal("rank 0", with_manifest_field("rank", 0), 422, INVALID, "'rank' is 0"),
    Refusal(
        "a negative scaling",
        with_manifest_field("scaling", -1.0),
        422,
        INVALID,
        "'scaling' is -1.0",
    ),
    Refusal(
        "a scaling of 1e308",
        with_manifest_field("scaling", 1e308),
        422,
        INVALID,
        "'scaling' is 1e+308",
    ),
    Refusal(
        "a scaling of NaN",
        with_manifest_field("scaling", float("nan")),
        422,
        INVALID,
        "'scaling' is nan",
    ),
    Refusal(
        "a module that cannot be adapted",
        of_a_module_without_adapter,
        422,
        INVALID,
        "target module 'lm_head' cannot be served",
    ),
    *(
        Refusal(
            f"a manifest with {name}",
            with_manifest_field(name, value),
            422,
            INVALID,
            f"the manifest has the unsupported field '{name}'",
        )
        for name, value in {
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 4},
            "use_dora": True,
            "bias": "all",
            "modules_to_save": ["lm_head"],
        }.items()
    ),
    Refusal(
        "a DoRA tensor",
        with_extra_tensor(f"{Q_PROJ}.lora_magnitude_vector", 128),
        422,
        INVALID,
        f"has an unexpected tensor '{Q_PROJ}.lora_magnitude_vector'",
    ),
    Refusal(
        "a bias tensor",
        with_extra_tensor(f"{Q_PROJ}.bias", 128),
        422,
        INVALID,
        f"has an unexpected tensor '{Q_PROJ}.bias'",
    ),
    Refusal(
        "version 0",
        with_manifest_field("policy", {"run_id": "r", "incarnation": 1, "version": 0}),
        422,
        INVALID,
        "version 0 is the base and has no adapter",
    ),
    Refusal("another base", of_another_base, 409, "BaseMismatch", "abababababab on the trainer"),
    Refusal("another tokenizer", of_another_tokenizer, 409, "BaseMismatch", "tokenizer"),
    Refusal("the base without quantization", of_the_original_base, 409, "BaseMismatch", "recipe"),
    Refusal(
        "an older version", of_version(SERVING_VERSION - 1), 409, "StaleVersion", "is older than"
    ),
    Refusal(
        "the same version with another digest",
        of_version(SERVING_VERSION),
        409,
        "StaleVersion",
        "a version never changes",
    ),
    Refusal("another run", of_another_run, 409, "RunConflict", "this replica serves run 'run-"),
    Refusal(
        "an unknown option",
        lambda publisher: Upload(valid(publisher), params={"in_flight": "abort"}),
        422,
        "InvalidRequest",
        "query.in_flight is 'abort'",
    ),
]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a client sees of the serving policy."""

    newest: PolicyId
    scored: tuple[float, ...]
    greedy_token_ids: tuple[int, ...]
    greedy_logprobs: tuple[float, ...]


async def observe(publisher: Publisher) -> Behaviour:
    answer = await publisher.generate(PROBE, temperature=0, max_tokens=8, ignore_eos=True)
    greedy = answer.groups[0].completions[0]
    assert greedy.segments[0].policy == (await publisher.client.policies()).newest
    return Behaviour(
        greedy.segments[0].policy, await publisher.score(), greedy.token_ids, greedy.logprobs
    )


async def assert_unchanged(publisher: Publisher, before: Behaviour) -> None:
    after = await observe(publisher)
    assert after.newest == before.newest
    assert after.greedy_token_ids == before.greedy_token_ids
    assert after.scored == pytest.approx(before.scored, abs=1e-4)
    assert after.greedy_logprobs == pytest.approx(before.greedy_logprobs, abs=1e-4)


async def post(replica: ReplicaProcess, upload: Upload) -> httpx.Response:
    digest = content_digest(hashlib.sha256(upload.content).digest())
    headers = {"Content-Digest": digest, **upload.headers}
    async with httpx.AsyncClient(base_url=replica.url, timeout=30, trust_env=False) as http:
        return await http.post(
            "/sync_weights",
            content=upload.content,
            params=dict(upload.params),
            headers={name: value for name, value in headers.items() if value},
        )


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
async def test_a_bad_adapter_is_refused_and_changes_nothing(
    row: Refusal, replica: ReplicaProcess, publisher: Publisher
) -> None:
    await publisher.publish(SERVING_VERSION)
    before = await observe(publisher)
    num_files = len(replica.adapter_files())

    response = await post(replica, row.upload(publisher))

    assert response.status_code == row.status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert (problem["type"], problem["title"]) == (TYPE_PREFIX + row.error, row.error)
    assert row.says in problem["detail"]
    assert len(replica.adapter_files()) == num_files
    await assert_unchanged(publisher, before)
    assert (await publisher.publish(SERVING_VERSION + 1)).version == SERVING_VERSION + 1


async def test_another_runs_adapter_names_the_current_policy(publisher: Publisher) -> None:
    current = await publisher.publish(1)
    with pytest.raises(RunConflict, match=publisher.run_id) as refused:
        await publisher.client.sync_weights(of_another_run(publisher).content)
    assert PolicyId.model_validate(refused.value.extra["current"]) == current


async def test_replace_run_retires_the_other_runs_versions(publisher: Publisher) -> None:
    first = await publisher.publish(7)
    other = PolicyId(run_id=f"other-{publisher.run_id}", version=1)
    receipt = await publisher.client.sync_weights(publisher.adapter(other), replace_run=True)
    assert (receipt.outcome, receipt.newest) == ("loaded", other)
    assert first in receipt.retired
    assert [item.policy for item in (await publisher.client.policies()).resident] == [other]


async def test_a_resumed_run_publishes_lower_versions_and_its_old_life_is_refused(
    publisher: Publisher,
) -> None:
    await publisher.publish(47)
    resumed = publisher.policy(41, incarnation=2)
    receipt = await publisher.client.sync_weights(publisher.adapter(resumed))
    assert receipt.newest == resumed
    before = await observe(publisher)
    old_life = publisher.adapter(publisher.policy(48, incarnation=1))
    with pytest.raises(StaleVersion, match=r"\.1@48 is older than .*\.2@41"):
        await publisher.client.sync_weights(old_life)
    await assert_unchanged(publisher, before)


async def test_the_same_adapter_again_is_already_resident(publisher: Publisher) -> None:
    policy = publisher.policy(3)
    adapter = publisher.adapter(policy)
    await publisher.client.sync_weights(adapter, replace_run=True)
    receipt = await publisher.client.sync_weights(adapter)
    assert (receipt.outcome, receipt.policy, receipt.newest) == ("already_resident", policy, policy)
    assert [item.policy for item in (await publisher.client.policies()).resident] == [policy]


async def test_two_syncs_at_once_both_become_resident(publisher: Publisher) -> None:
    await publisher.publish(1)
    second, third = publisher.policy(2), publisher.policy(3)
    # Whichever wins, the older one may find itself superseded: activate=false takes that away.
    receipts = await asyncio.gather(
        publisher.client.sync_weights(publisher.adapter(second), activate=False),
        publisher.client.sync_weights(publisher.adapter(third)),
    )
    assert [receipt.outcome for receipt in receipts] == ["loaded", "loaded"]
    policies = await publisher.client.policies()
    assert policies.newest == third
    assert {item.policy for item in policies.resident} == {second, third}


async def test_the_same_adapter_sent_twice_at_once_is_loaded_once(publisher: Publisher) -> None:
    await publisher.publish(1)
    adapter = publisher.adapter(publisher.policy(2))
    receipts = await asyncio.gather(*(publisher.client.sync_weights(adapter) for _ in range(3)))
    outcomes = sorted(receipt.outcome for receipt in receipts)
    assert outcomes == ["already_resident", "already_resident", "loaded"]


async def test_an_older_version_is_installed_without_becoming_newest(publisher: Publisher) -> None:
    """A joiner catches up on versions that are still in use."""
    for version in (8, 9):
        await publisher.publish(version)
    older = publisher.policy(4)
    receipt = await publisher.client.sync_weights(publisher.adapter(older), activate=False)
    assert (receipt.outcome, receipt.newest) == ("loaded", publisher.policy(9))
    assert await publisher.score(policy=older) != await publisher.score()


async def test_a_body_that_outgrows_the_limit_is_refused_while_it_streams(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    await publisher.publish(SERVING_VERSION)
    before = await observe(publisher)
    num_files = len(replica.adapter_files())
    head, sent = await _stream_until_answered(replica, chunk=bytes(64 << 10))
    assert head.startswith("HTTP/1.1 413")
    assert sent < 64 << 20  # it would have gone on for ever
    assert len(replica.adapter_files()) == num_files
    await assert_unchanged(publisher, before)


async def _stream_until_answered(replica: ReplicaProcess, *, chunk: bytes) -> tuple[str, int]:
    """Send chunks without an announced length until the service answers: (status line, bytes)."""
    reader, writer = await _open(replica)
    writer.write(_head("Transfer-Encoding: chunked"))
    answer = asyncio.ensure_future(reader.readline())
    sent = 0
    try:
        async with asyncio.timeout(30):
            while not answer.done():
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                sent += len(chunk)
                await writer.drain()
                await asyncio.sleep(0)
            return (await answer).decode(), sent
    finally:
        writer.close()


async def test_a_client_that_leaves_during_the_upload_leaves_nothing_behind(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    await publisher.publish(SERVING_VERSION)
    before = await observe(publisher)
    num_files = len(replica.adapter_files())
    content = valid(publisher)
    _, writer = await _open(replica)
    writer.write(_head(f"Content-Length: {len(content)}") + content[: len(content) // 2])
    await writer.drain()
    await until(lambda: len(replica.adapter_files()) > num_files)
    writer.transport.abort()
    await until(lambda: len(replica.adapter_files()) == num_files)
    await assert_unchanged(publisher, before)
    receipt = await publisher.client.sync_weights(content)
    assert receipt.outcome == "loaded"


async def _open(replica: ReplicaProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = httpx.URL(replica.url)
    return await asyncio.open_connection(url.host, url.port)


def _head(framing: str) -> bytes:
    digest = content_digest(hashlib.sha256(b"").digest())
    lines = [
        "POST /sync_weights HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Digest: {digest}",
        framing,
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


async def test_a_policy_that_is_leased_is_not_unloaded_by_a_sync_that_finds_no_slot(
    replica: ReplicaProcess, client: RolloutClient, publisher: Publisher
) -> None:
    """Three versions run, all slots are taken: the fourth is refused after ROLLOUT_SYNC_WAIT_S."""

    async def run(version: int) -> asyncio.Task[GenerateResponse]:
        policy = await publisher.publish(version)
        task = asyncio.ensure_future(
            publisher.generate(PROBE, policy=policy, n=3, max_tokens=460, ignore_eos=True)
        )
        await until(lambda: replica.num_leases(policy) > 0)
        return task

    running = [await run(version) for version in (1, 2, 3)]
    with pytest.raises(NoFreeSlot, match="all 3 adapter slots are in use after 1 s") as refused:
        await client.sync_weights(publisher.adapter(publisher.policy(4)))
    assert refused.value.retry_after_s == 1.0
    assert (await client.policies()).newest == publisher.policy(3)
    for version, task in enumerate(running, start=1):
        (group,) = (await task).groups
        for completion in group.completions:
            assert len(completion.token_ids) == 460
            assert [s.policy for s in completion.segments] == [publisher.policy(version)]
    receipt = await client.sync_weights(publisher.adapter(publisher.policy(4)))
    assert receipt.newest == publisher.policy(4)


async def test_an_error_answer_raises_its_class_in_the_client(publisher: Publisher) -> None:
    await publisher.publish(1)
    with pytest.raises(InvalidAdapter, match="not a safetensors file"):
        await publisher.client.sync_weights(b"\x04\0\0\0\0\0\0\0nope")


async def chunks(content: bytes, size: int = 4096) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_an_adapter_may_come_without_an_announced_length(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    await publisher.publish(1)
    content = publisher.adapter(publisher.policy(2))
    digest = content_digest(hashlib.sha256(content).digest())
    async with httpx.AsyncClient(base_url=replica.url, timeout=30, trust_env=False) as http:
        response = await http.post(
            "/sync_weights", content=chunks(content), headers={"Content-Digest": digest}
        )
    assert response.status_code == 200
    assert response.json()["num_bytes"] == len(content)
