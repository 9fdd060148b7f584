"""From samples to the tensors that one forward pass consumes.

    Sample (lists) ─make_trees─▶ Tree ─micro_batches─▶ list[Tree] ─collate─▶ TokenBatch (tensors)

A tree is a prompt with the completions that are computed together, so that the prompt is computed
once: P + ΣR tokens instead of Σ(P + R). Each completion attends to the prompt and to itself, at the
positions that it has alone, so the numbers equal those of the completion alone. (The idea: Prefix
Grouper, Liu et al. 2025, arXiv:2506.05433.) A tree of one is a plain sequence.

Everything per token is flat over the completion tokens of all trees: nothing downstream sees
padding, packing or sharing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from services.trainer.policy.samples import Sample

# How trees become one batch.
#   padded   a row is one sequence, padded on the right: any architecture
#   masked   a row is one tree with a mask of its own: full attention, any device
#   packed   all trees are one row, cut by sequence lengths: full attention, CUDA, no padding
Layout = Literal["padded", "masked", "packed"]


# FLOPs of the linears per token over those of attention per pair of tokens, per hidden size and
# layer: 2·(4 + 3·3)·H² over 4·H for a gated MLP of three times the hidden size.
_LINEAR_COST = 6


@dataclass(frozen=True, slots=True)
class Tree:
    """Samples of one prompt, by their index in the batch."""

    indices: tuple[int, ...]
    num_positions: int  # The last token of a completion predicts nothing and is not computed.


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """Which keys the queries of a packed row see: segment i has queries [cu_q[i], cu_q[i + 1]) and
    the keys kv_index[cu_k[i] : cu_k[i + 1]], causal from the end of both."""

    kv_index: Tensor | None  # [K] int64, positions; None: all in their order, none shared
    cu_q: Tensor  # [S + 1] int32
    cu_k: Tensor  # [S + 1] int32
    max_q: int
    max_k: int

    def to(self, device: torch.device) -> PackedAttention:
        return replace(self, **_tensors_on(device, self))


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A micro-batch of B rows and T positions with N completion tokens in all."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64
    attention: Tensor | PackedAttention  # [B, T] int64 padded, [B, 1, T, T] bool masked, or packed
    predicts: Tensor  # [N] int64: the position, of B·T, that predicts a completion token
    labels: Tensor  # [N] int64: the completion tokens, completion by completion
    temperatures: Tensor  # [N] float32
    sampler_logprobs: Tensor  # [N] float32, NaN where nobody sampled
    staleness: Tensor  # [N] int64
    rows: Tensor  # [N] int64: the completion that a token belongs to
    num_rows: int

    def to(self, device: torch.device) -> TokenBatch:
        moved = {"attention": self.attention.to(device), **_tensors_on(device, self)}
        return replace(self, **moved)


def _tensors_on(device: torch.device, record: PackedAttention | TokenBatch) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in record.__slots__}
    return {name: t.to(device) for name, t in fields.items() if isinstance(t, Tensor)}


def make_trees(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    layout: Layout,
    max_tokens: int,
    hidden_size: int,
) -> list[Tree]:
    """The trees of some samples of one prompt.

    One tree of all where sharing the prompt pays and fits in `max_tokens` positions, otherwise
    smaller ones.
    """
    if not indices:
        return []
    num_prompt = len(samples[indices[0]].prompt_token_ids)
    num_own = [samples[i].num_tokens - 1 for i in indices]
    shared = Tree(tuple(indices), num_prompt + sum(num_own))
    alone = [Tree((i,), num_prompt + n) for i, n in zip(indices, num_own, strict=True)]
    if len(indices) == 1 or layout == "padded":
        return alone
    if shared.num_positions > max_tokens:
        half = len(indices) // 2
        return [
            tree
            for part in (indices[:half], indices[half:])
            for tree in make_trees(
                samples, part, layout=layout, max_tokens=max_tokens, hidden_size=hidden_size
            )
        ]
    if layout == "masked" and _cost(shared, hidden_size) >= sum(
        _cost(tree, hidden_size) for tree in alone
    ):
        return alone
    return [shared]


def _cost(tree: Tree, hidden_size: int) -> int:
    """The cost of a tree as a masked row, in which every pair of positions is computed."""
    return tree.num_positions * (_LINEAR_COST * hidden_size + tree.num_positions)


def micro_batches(
    units: Sequence[Sequence[Tree]], *, layout: Layout, max_tokens: int
) -> Iterator[list[Tree]]:
    """Cut trees into batches of at most `max_tokens` positions, longest first.

    The trees of a unit stay together, and a larger unit makes a batch by itself. The gradient does
    not depend on the cut.
    """
    batch: list[Tree] = []
    for unit in sorted(units, key=lambda unit: max(t.num_positions for t in unit), reverse=True):
        if batch and _num_positions([*batch, *unit], layout) > max_tokens:
            yield batch
            batch = []
        batch.extend(unit)
    if batch:
        yield batch


def _num_positions(trees: Sequence[Tree], layout: Layout) -> int:
    lengths = [tree.num_positions for tree in trees]
    return sum(lengths) if layout == "packed" else max(lengths) * len(lengths)


@dataclass(slots=True)
class _Row:
    """The positions of one tree, or of all when packed, as lists."""

    token_ids: list[int]
    positions: list[int]
    segments: list[int]  # 0: a prompt, k: the k-th completion
    predicts: list[int]
    # Query positions, and the earlier prompt positions that they see as well.
    spans: list[tuple[range, range]]


def collate(samples: Sequence[Sample], trees: Sequence[Tree], *, layout: Layout) -> TokenBatch:
    """The tensors of one micro-batch, on the CPU; completions in the order of the trees."""
    ordered = [samples[i] for tree in trees for i in tree.indices]
    rows = [_Row([], [], [], [], []) for _ in (trees[:1] if layout == "packed" else trees)]
    for number, tree in enumerate(trees):
        _append(rows[0 if layout == "packed" else number], [samples[i] for i in tree.indices])
    num_positions = max(len(row.token_ids) for row in rows)

    def padded(lists: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([[*items, *[filler] * (num_positions - len(items))] for items in lists])

    attention: Tensor | PackedAttention
    if layout == "packed":
        attention = _packed_attention(rows[0].spans)
    elif layout == "masked":
        attention = _mask(padded([row.segments for row in rows], -1))
    else:
        attention = padded([[1] * len(row.token_ids) for row in rows], 0)

    def flat(values: Iterator[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32)

    return TokenBatch(
        input_ids=padded([row.token_ids for row in rows], 0),
        position_ids=padded([row.positions for row in rows], 0),
        attention=attention,
        predicts=torch.tensor(
            [
                b * num_positions + position
                for b, row in enumerate(rows)
                for position in row.predicts
            ]
        ),
        labels=torch.tensor([token for s in ordered for token in s.token_ids]),
        temperatures=flat(s.temperature for s in ordered for _ in s.token_ids),
        sampler_logprobs=flat(
            logprob for s in ordered for logprob in s.sampler_logprobs or [torch.nan] * s.num_tokens
        ),
        staleness=torch.tensor([lag for s in ordered for lag in s.staleness]),
        rows=torch.tensor([row for row, s in enumerate(ordered) for _ in s.token_ids]),
        num_rows=len(ordered),
    )


def _append(row: _Row, samples: Sequence[Sample]) -> None:
    """Add a tree: its prompt, then the completions without their last tokens."""
    prompt, start = samples[0].prompt_token_ids, len(row.token_ids)
    num_prompt = len(prompt)
    prompt_range = range(start, start + num_prompt)
    row.token_ids += prompt
    row.positions += range(num_prompt)
    row.segments += [0] * num_prompt
    alone = len(samples) == 1
    if not alone:
        row.spans.append((prompt_range, range(0)))
    for number, sample in enumerate(samples, start=1):
        own = sample.token_ids[:-1]
        begin = len(row.token_ids)
        row.token_ids += own
        row.positions += range(num_prompt, num_prompt + len(own))
        row.segments += [number] * len(own)
        own_range = range(begin, begin + len(own))
        row.predicts += [prompt_range[-1], *own_range]
        if alone:  # One causal sequence: no other completion sees its prompt.
            row.spans.append((range(start, own_range.stop), range(0)))
        elif own:
            row.spans.append((own_range, prompt_range))


def _mask(segments: Tensor) -> Tensor:
    """[B, T] segments -> [B, 1, T, T] bool: a position sees the prompt and its own completion."""
    num_positions = segments.shape[1]
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    return (causal & ((keys == 0) | (keys == queries)))[:, None]


def _packed_attention(spans: Sequence[tuple[range, range]]) -> PackedAttention:
    num_q = [len(queries) for queries, _ in spans]
    num_k = [len(queries) + len(prompt) for queries, prompt in spans]

    def cumulative(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    is_shared = any(len(prompt) > 0 for _, prompt in spans)
    return PackedAttention(
        kv_index=torch.tensor([k for queries, prompt in spans for k in (*prompt, *queries)])
        if is_shared
        else None,
        cu_q=cumulative(num_q),
        cu_k=cumulative(num_k),
        max_q=max(num_q),
        max_k=max(num_k),
    )
