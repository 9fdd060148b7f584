"""Typed client of the rollout service (services/rollout/app.py)."""

from __future__ import annotations

import hashlib
from typing import Literal

from shared.adapters import content_digest
from shared.http_client import ServiceClient
from shared.schemas import (
    GenerateRequest,
    GenerateResponse,
    PoliciesResponse,
    RolloutStatus,
    ScoreRequest,
    ScoreResponse,
    SyncReceipt,
)


class RolloutClient(ServiceClient):
    async def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerateResponse:
        return await self._call(
            GenerateResponse, "POST", "/generate", body=request, timeout_s=timeout_s
        )

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        return await self._call(ScoreResponse, "POST", "/score", body=request)

    async def sync_weights(
        self,
        adapter: bytes,
        *,
        activate: bool = True,
        replace_run: bool = False,
        in_flight: Literal["finish", "continue"] = "finish",
        digest: str | None = None,
        timeout_s: float | None = None,
    ) -> SyncReceipt:
        """Upload one adapter file (shared/adapters.py). `digest`: its Content-Digest, if known."""
        return await self._call(
            SyncReceipt,
            "POST",
            "/sync_weights",
            content=adapter,
            params={
                "activate": str(activate).lower(),
                "replace_run": str(replace_run).lower(),
                "in_flight": in_flight,
            },
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Digest": digest or content_digest(hashlib.sha256(adapter).digest()),
            },
            timeout_s=timeout_s,
        )

    async def policies(self) -> PoliciesResponse:
        return await self._call(PoliciesResponse, "GET", "/policies", timeout_s=10)

    async def adapter(self, version: int) -> bytes:
        """The adapter file of a resident version, as the replica received it."""
        return await self._request("GET", f"/policies/{version}")

    async def status(self) -> RolloutStatus:
        return await self._call(RolloutStatus, "GET", "/status", timeout_s=10)

    async def drain(self) -> RolloutStatus:
        return await self._call(RolloutStatus, "POST", "/drain", timeout_s=10)
