"""From groups to tensors: every number lands at the token it belongs to."""

from __future__ import annotations

import torch

from services.trainer.policy.samples import Sample, group_indices, make_samples
from services.trainer.policy.token_batch import (
    Layout,
    PackedAttention,
    Tree,
    collate,
    make_trees,
    micro_batches,
)
from shared.schemas import (
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
)
from tests.trainer.conftest import make_sample


def test_staleness_counts_versions_token_by_token() -> None:
    policies = [PolicyId(run_id="r", version=version) for version in (3, 5)]
    completion = Completion(
        token_ids=(4, 5, 6),
        logprobs=(-1.0, -1.0, -1.0),
        segments=tuple(
            Segment(policy=policy, num_tokens=n) for policy, n in zip(policies, (1, 2), strict=True)
        ),
        finish_reason="stop",
    )
    group = ScoredGroup(
        prompt_token_ids=(1,),
        sampling=SamplingParams(temperature=0.7),
        completions=(ScoredCompletion(completion=completion, reward=1.0),),
    )
    (sample,) = make_samples([group], PolicyId(run_id="r", version=5))
    assert sample.staleness == (2, 0, 0)
    assert (sample.temperature, sample.rewards, sample.is_truncated) == (0.7, (1.0,), False)


FIRST = Sample((1, 2), (3, 4, 5), (-0.1, -0.2, -0.3), (0, 0, 1), 1.0, 0, (2.0,), False)
SECOND = Sample((1, 2), (6, 7), (), (0, 0), 0.5, 0, (1.0,), False)
OTHER = Sample((8,), (9,), (-0.4,), (0,), 1.0, 1, (0.0,), False)


def trees(samples: list[Sample], layout: Layout, max_tokens: int = 100) -> list[Tree]:
    return [
        tree
        for group in group_indices(samples)
        for tree in make_trees(
            samples, group, layout=layout, max_tokens=max_tokens, hidden_size=1024
        )
    ]


def test_a_padded_row_is_a_sequence_without_its_last_token() -> None:
    samples = [FIRST, SECOND, OTHER]
    batch = collate(samples, trees(samples, "padded"), layout="padded")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 6, 0], [8, 0, 0, 0]]
    assert isinstance(batch.attention, torch.Tensor)
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.predicts.tolist() == [1, 2, 3, 5, 6, 8]
    assert batch.labels.tolist() == [3, 4, 5, 6, 7, 9]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.num_rows == 3
    assert batch.temperatures.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 1.0]
    assert batch.staleness.tolist() == [0, 0, 1, 0, 0, 0]
    expected = torch.tensor([-0.1, -0.2, -0.3, torch.nan, torch.nan, -0.4])
    torch.testing.assert_close(batch.sampler_logprobs, expected, equal_nan=True)


def test_a_masked_row_has_its_prompt_once_and_completions_that_do_not_see_each_other() -> None:
    samples = [FIRST, SECOND, OTHER]
    batch = collate(samples, trees(samples, "masked"), layout="masked")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6], [8, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]
    assert batch.predicts.tolist() == [1, 2, 3, 1, 4, 5]
    assert isinstance(batch.attention, torch.Tensor)
    assert batch.attention[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_a_packed_row_has_all_trees_and_says_which_keys_a_segment_sees() -> None:
    samples = [FIRST, SECOND, OTHER]
    batch = collate(samples, trees(samples, "packed"), layout="packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert batch.predicts.tolist() == [1, 2, 3, 1, 4, 5]
    packed = batch.attention
    assert isinstance(packed, PackedAttention)
    assert packed.cu_q.tolist() == [0, 2, 4, 5, 6]  # the prompt, its completions, the other one
    assert packed.cu_k.tolist() == [0, 2, 6, 9, 10]
    assert packed.kv_index is not None
    assert packed.kv_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5]
    assert (packed.max_q, packed.max_k) == (2, 4)


def test_keys_of_a_packed_row_are_copied_only_where_a_prompt_is_shared() -> None:
    batch = collate([OTHER, FIRST], [Tree((0,), 1), Tree((1,), 4)], layout="packed")
    packed = batch.attention
    assert isinstance(packed, PackedAttention)
    assert packed.kv_index is None
    assert packed.cu_k.tolist() == packed.cu_q.tolist() == [0, 1, 5]


def test_a_long_completion_shares_no_prompt_under_a_mask_and_does_when_packed() -> None:
    """A mask computes every pair of positions, also of two completions."""
    samples = [make_sample(k, advantage=1.0, num_completion=400, group=0) for k in range(8)]
    few = {"max_tokens": 10_000, "hidden_size": 64}
    assert len(make_trees(samples, range(8), layout="masked", **few)) == 8
    assert len(make_trees(samples, range(8), layout="packed", **few)) == 1


def test_a_tree_over_the_budget_is_split() -> None:
    samples = [make_sample(k, advantage=1.0, num_completion=9, group=0) for k in range(8)]
    found = trees(samples, "packed", max_tokens=40)
    assert [len(tree.indices) for tree in found] == [4, 4]
    assert all(tree.num_positions == 5 + 4 * 8 for tree in found)


def test_micro_batches_hold_every_tree_once_within_the_budget() -> None:
    units = [[Tree((i,), 1 + i % 7)] for i in range(40)]
    for layout in ("padded", "packed"):
        batches = list(micro_batches(units, layout=layout, max_tokens=64))
        assert sorted(tree.indices[0] for batch in batches for tree in batch) == list(range(40))
        for batch in batches:
            lengths = [tree.num_positions for tree in batch]
            assert (sum(lengths) if layout == "packed" else len(lengths) * max(lengths)) <= 64


def test_a_unit_stays_together_and_may_exceed_the_budget() -> None:
    pair = [Tree((0,), 50), Tree((1,), 40)]
    batches = list(micro_batches([pair, [Tree((2,), 5)]], layout="packed", max_tokens=64))
    assert batches == [pair, [Tree((2,), 5)]]
