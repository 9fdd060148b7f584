"""What the rollout service needs of an inference engine; vllm_engine.py is the real one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from shared.schemas import SamplingParams


@dataclass(frozen=True, slots=True)
class Adapter:
    """A resident adapter as the engine knows it. `slot_id` and `name` are never used twice."""

    slot_id: int
    name: str
    path: Path  # Folder with adapter_model.safetensors and adapter_config.json.


FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class SampledDelta:
    """The next tokens of one sequence. Its last delta, and no other, has a finish reason."""

    index: int  # Index of the sequence, below `sampling.n`.
    token_ids: Sequence[int]
    logprobs: Sequence[float]  # Natural logarithms, of the distribution that was sampled.
    finish_reason: FinishReason | None
    text: str | None  # Text of these tokens.


class Engine(Protocol):
    """Raises EngineDead from every call once it is dead, and InvalidRequest for a bad one."""

    @property
    def max_model_len(self) -> int: ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
        *,
        stream: bool,
    ) -> AsyncGenerator[SampledDelta]:
        """`sampling.n` sequences of one prompt: with `stream` as their tokens come, without it one
        delta each, at the end. Closing the generator stops the work."""

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        """log p(token_ids[t + 1] | token_ids[: t + 1]) at temperature 1, for every t."""

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        """End these `generate` calls now: they yield what they have, as `interrupted`."""

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make the adapter servable, or leave nothing behind and raise InvalidAdapter."""

    async def unload_adapter(self, adapter: Adapter) -> None: ...

    def death(self) -> str | None:
        """Why the engine is dead, or None while it lives."""

    def num_unfinished(self) -> int:
        """Requests that the engine still has to work on, whoever reads what it made."""

    def num_tokens_processed(self) -> int:
        """Grows while the engine works; a watchdog compares two readings."""

    def shutdown(self) -> None: ...
