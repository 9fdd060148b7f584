"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and IPO (Azar et al.
2023, arXiv:2310.12036); online, the pair is sampled (Guo et al. 2024, arXiv:2402.04792).

    h = (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)    of whole completions
    sigmoid: -log σ(β h)          ipo: (h - 1 / (2β))²

What differs: a pair is the best and the worst of a group of any size, and equal rewards make none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never

from torch import Tensor
from torch.nn import functional as F


def ranked_pairs(rewards: Sequence[Sequence[float]]) -> list[tuple[int, int] | None]:
    """Per group the places of its (first best, first worst) completion; None if all are equal."""
    return [
        (group.index(max(group)), group.index(min(group))) if len(set(group)) > 1 else None
        for group in rewards
    ]


class PreferenceLoss(NamedTuple):
    loss: Tensor  # [P] float32, with gradient
    margin: Tensor  # [P] float32: β h, the implicit reward of chosen over rejected; no gradient


def preference_loss(
    policy_sums: Tensor,
    reference_sums: Tensor,
    *,
    loss: Literal["sigmoid", "ipo"],
    beta: float,
) -> PreferenceLoss:
    """The loss of every pair, from logprobs summed over the tokens of completions.

    Both tensors are [2·P]: row 2k is the chosen and row 2k + 1 the rejected completion of pair k.
    """
    log_ratios = (policy_sums - reference_sums).view(-1, 2)  # [P, 2]
    difference = log_ratios[:, 0] - log_ratios[:, 1]
    margin = beta * difference
    match loss:
        case "sigmoid":
            return PreferenceLoss(-F.logsigmoid(margin), margin.detach())
        case "ipo":
            return PreferenceLoss((difference - 1 / (2 * beta)).square(), margin.detach())
        case _:
            assert_never(loss)
