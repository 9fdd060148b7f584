"""From the body of POST /sync_weights to a resident version: receive, verify, admit.

Nothing reaches the engine before the whole file is proven: digest, header, manifest, base, tensor
table, finite values. Whatever fails on the way leaves no trace and no change.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from services.http import too_large
from services.rollout.adapter_values import ValueScan, check_values
from services.rollout.base import Base
from services.rollout.policies import PolicyStore, VerifiedAdapter
from shared.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterHeader,
    check_digest,
    check_tensors,
    parse_content_digest,
    peft_config,
    read_header,
)
from shared.errors import BaseMismatch, InvalidAdapter, Unavailable
from shared.metrics import RolloutMetrics
from shared.model_folder import identity_difference
from shared.schemas import RolloutLimits, SyncReceipt

log = logging.getLogger(__name__)
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """The query of POST /sync_weights."""

    activate: bool = True
    replace_run: bool = False
    in_flight: Literal["finish", "continue"] = "finish"
    probe: bool = False


@dataclass(frozen=True, slots=True)
class _Upload:
    """A body that has arrived whole, with the digest that was announced."""

    folder: Path  # Holds the adapter file only.
    digest: str
    num_bytes: int
    scan: ValueScan
    receive_s: float


class AdapterReceiver:
    def __init__(
        self,
        *,
        policies: PolicyStore,
        base: Base,
        limits: RolloutLimits,
        adapter_dir: Path,
        boot_id: str,
        metrics: RolloutMetrics,
    ) -> None:
        self._policies = policies
        self._base = base
        self._limits = limits
        self._boot_id = boot_id
        self._metrics = metrics
        self._dir, self._lock = _private_dir(adapter_dir)

    def close(self) -> None:
        shutil.rmtree(self._dir)
        self._lock.close()

    async def receive(
        self, body: AsyncIterator[bytes], content_digest: str | None, options: SyncOptions
    ) -> SyncReceipt:
        """Take one adapter in. Raises the errors of shared/errors.py; then nothing has changed."""
        announced = parse_content_digest(content_digest)
        with self._full_disk():
            path = Path(tempfile.mkdtemp(dir=self._dir))
        started = time.perf_counter()
        try:
            num_bytes, scan = await self._store(body, path / ADAPTER_WEIGHTS, announced)
        except BaseException:
            shutil.rmtree(path)
            raise
        upload = _Upload(path, announced, num_bytes, scan, time.perf_counter() - started)
        # From here on the client may disconnect, but an adapter is never left half loaded.
        return await asyncio.shield(self._admit(upload, options))

    async def _admit(self, upload: _Upload, options: SyncOptions) -> SyncReceipt:
        try:
            started = time.perf_counter()
            adapter = await asyncio.to_thread(self._verify, upload, options)
            verify_s = time.perf_counter() - started
            admission = await self._policies.admit(
                adapter,
                activate=options.activate,
                replace_run=options.replace_run,
                in_flight=options.in_flight,
                probe=options.probe,
            )
        finally:
            if not self._policies.holds(upload.folder):
                shutil.rmtree(upload.folder)
        receipt = SyncReceipt(
            policy=adapter.manifest.policy,
            digest=upload.digest,
            outcome=admission.outcome,
            newest=self._policies.newest,
            retired=admission.retired,
            num_bytes=upload.num_bytes,
            receive_s=upload.receive_s,
            verify_s=verify_s,
            wait_s=admission.wait_s,
            load_s=admission.load_s,
            boot_id=self._boot_id,
        )
        self._metrics.record_sync(receipt)
        log.info(
            "policy %s %s: %d bytes, receive %.3f s, verify %.3f s, wait %.3f s, load %.3f s",
            receipt.policy,
            receipt.outcome,
            receipt.num_bytes,
            receipt.receive_s,
            receipt.verify_s,
            receipt.wait_s,
            receipt.load_s,
        )
        return receipt

    async def _store(
        self, body: AsyncIterator[bytes], path: Path, announced: str
    ) -> tuple[int, ValueScan]:
        """Write the body to `path` as it comes, hashing and scanning it; the number of bytes.

        A piece at a time, each of both in a thread, while the next piece comes.
        """
        sha256, num_bytes = hashlib.sha256(), 0
        piece: list[bytes] = []
        piece_bytes = 0

        def digest(chunks: list[bytes]) -> None:
            for chunk in chunks:
                sha256.update(chunk)

        def write(chunks: list[bytes]) -> None:
            file.writelines(chunks)
            file.flush()
            scan.read_on()

        def keep() -> asyncio.Future[tuple[None, None]]:
            return asyncio.gather(asyncio.to_thread(digest, piece), asyncio.to_thread(write, piece))

        with self._full_disk(), path.open("xb") as file, ValueScan(path) as scan:
            keeping: asyncio.Future[tuple[None, None]] | None = None
            try:
                async for chunk in body:
                    num_bytes += len(chunk)
                    piece_bytes += len(chunk)
                    if num_bytes > self._limits.max_adapter_bytes:
                        raise too_large(self._limits.max_adapter_bytes)
                    piece.append(chunk)
                    if piece_bytes >= _PIECE_BYTES:
                        if keeping:
                            await asyncio.shield(keeping)
                        keeping = keep()
                        piece, piece_bytes = [], 0
                if keeping:
                    await asyncio.shield(keeping)
                keeping = keep()
                await asyncio.shield(keeping)
            finally:
                if keeping:  # Threads still use the file.
                    await asyncio.gather(keeping, return_exceptions=True)
        check_digest(announced=announced, received=sha256.hexdigest(), num_bytes=num_bytes)
        return num_bytes, scan

    def _verify(self, upload: _Upload, options: SyncOptions) -> VerifiedAdapter:
        file = upload.folder / ADAPTER_WEIGHTS
        header = read_header(file)
        self._check_base_and_rank(header)
        adapter = VerifiedAdapter(header.manifest, upload.digest, upload.folder, upload.num_bytes)
        if not self._policies.is_resident(adapter, probe=options.probe):
            if not options.probe:
                self._policies.check_order(
                    adapter, activate=options.activate, replace_run=options.replace_run
                )
            check_tensors(header, self._base.linear_shapes)
            check_values(file, header, upload.scan)
        config = peft_config(header.manifest, str(self._base.path))
        with self._full_disk():
            (upload.folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        return adapter

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Inside, a disk that takes no more is an Unavailable: there may be space later."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unavailable(
                f"no space for the adapter in {self._dir}: give it more (shm_size of the "
                "container), or set ROLLOUT_ADAPTER_DIR"
            ) from error

    def _check_base_and_rank(self, header: AdapterHeader) -> None:
        manifest = header.manifest
        if difference := identity_difference(self._base.identity, manifest.base):
            raise BaseMismatch(
                f"the adapter was trained on another base ({difference}): start the replica with "
                "the trainer's model and ROLLOUT_BASE",
                extra={"base": self._base.identity.model_dump()},
            )
        if manifest.rank > self._limits.max_lora_rank:
            raise InvalidAdapter(
                f"rank {manifest.rank} is over this replica's maximum of "
                f"{self._limits.max_lora_rank}: lower it, or raise ROLLOUT_MAX_LORA_RANK"
            )


def _private_dir(root: Path) -> tuple[Path, IO[str]]:
    """A folder of this process alone, and the lock that says it is in use.

    Folders whose lock nobody holds were left by a process that was killed: they are removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    for lock_path in root.glob("tandem-adapters-*/lock"):
        # Gone: another starting replica was faster. Blocked: its replica is alive.
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock_path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent)
    new = Path(tempfile.mkdtemp(prefix="tandem-starting-", dir=root))
    lock = (new / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return new.rename(root / f"tandem-adapters-{new.name.rpartition('-')[2]}"), lock
