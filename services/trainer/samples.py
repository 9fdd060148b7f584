"""From scored groups to the tensors one optimizer step consumes.

    ScoredGroup ─advantages─▶ Sample (lists) ─micro_batches─▶ list[Sample] ─collate─▶ TokenBatch

A micro-batch is padded on the right; everything per token is flat over the completion tokens of all
its rows, so nothing downstream sees padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from shared.schemas import PolicyId, ScoredGroup


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the trainer sees it."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    staleness: tuple[int, ...]  # per token: trainer version minus the version that sampled it
    temperature: float
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A padded micro-batch of B rows and T positions with N completion tokens in all."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    predicts: Tensor  # [B, T] bool: this position predicts a completion token
    labels: Tensor  # [N] int64: the completion tokens, row by row
    sampler_logprobs: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    temperatures: Tensor  # [N] float32
    is_fresh: Tensor  # [N] bool: sampled by the version that trains

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def make_samples(
    groups: Sequence[ScoredGroup],
    advantages: Sequence[Sequence[float]],
    policy: PolicyId,
) -> list[Sample]:
    """One sample per completion, in order. `policy` is the version about to be updated."""
    return [
        Sample(
            prompt_token_ids=group.prompt_token_ids,
            token_ids=scored.completion.token_ids,
            sampler_logprobs=scored.completion.logprobs,
            staleness=tuple(
                chain.from_iterable(
                    [policy.version - segment.policy.version] * segment.num_tokens
                    for segment in scored.completion.segments
                )
            ),
            temperature=group.sampling.temperature,
            advantage=advantage,
        )
        for group, group_advantages in zip(groups, advantages, strict=True)
        for scored, advantage in zip(group.completions, group_advantages, strict=True)
    ]


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """Cut samples into padded batches of at most `max_tokens` positions, longest first.

    A sample longer than that makes a batch of its own. The gradient does not depend on the cut.
    """
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: sample.length, reverse=True):
        if batch and (len(batch) + 1) * batch[0].length > max_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def collate(samples: Sequence[Sample]) -> TokenBatch:
    """The tensors of one micro-batch, on the CPU."""
    num_rows, num_positions = len(samples), max(sample.length for sample in samples)
    input_ids = torch.zeros(num_rows, num_positions, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        input_ids[row, : sample.length] = torch.tensor(sample.prompt_token_ids + sample.token_ids)
        attention_mask[row, : sample.length] = 1
        predicts[row, len(sample.prompt_token_ids) - 1 : sample.length - 1] = True

    def flat(values: Iterator[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32)

    def per_token(name: str) -> Tensor:
        return flat(getattr(s, name) for s in samples for _ in s.token_ids)

    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        predicts=predicts,
        labels=torch.tensor([token for s in samples for token in s.token_ids]),
        sampler_logprobs=flat(logprob for s in samples for logprob in s.sampler_logprobs),
        advantages=per_token("advantage"),
        temperatures=per_token("temperature"),
        is_fresh=torch.tensor([lag == 0 for s in samples for lag in s.staleness]),
    )
