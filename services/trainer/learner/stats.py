"""What an update says of itself, and when it is refused for that.

    micro-batches ─add─▶ TokenRecords ─columns─▶ Columns ─join, over ranks─▶ Columns
                  ─update_stats─▶ UpdateStats ─check_guards─▶ the optimizer step, or UpdateRefused

With policy p before the update, sampler q and d = log p - log q of a sampled token:

    KL(q || p) = mean of e^d - 1 - d       (k3: Schulman 2020, "Approximating KL Divergence")
    ESS        = (Σ w)² / (n Σ w²)         (Kish 1965) of w = e^d, of a token or of a completion

These are of the weights before any truncation; log ratios are kept within ±MAX_LOG_RATIO. What
compares the two processes uses tokens of staleness 0, for older ones differ by the updates, too.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.trainer.algorithms.ratios import MAX_LOG_RATIO
from services.trainer.run_config import GuardsConfig
from shared.schemas import LagKl, UpdateStats

MIN_FRESH_TOKENS = 256  # Fewest tokens that guards judge; see num_telling_tokens.


@dataclass(frozen=True, slots=True)
class Columns:
    """What is known of N tokens of `num_rows` completions, in no order."""

    policy_logprobs: Tensor  # [N] float32, before the update
    sampler_logprobs: Tensor  # [N] float32, NaN: nobody sampled it
    staleness: Tensor  # [N] int64, versions
    entropy: Tensor  # [N] float32, nats
    weights: Tensor  # [N] float32, importance weights as applied
    is_truncated: Tensor  # [N] bool: the weight was bounded
    is_masked: Tensor  # [N] bool: the weight was made 0
    is_clipped: Tensor  # [N] bool: the clip took the gradient
    rows: Tensor  # [N] int64, the completion: 0..num_rows-1
    num_rows: int


def join(parts: Sequence[Columns]) -> Columns:
    """The tokens of all parts, whose rows are made unique."""
    if not parts:
        empty = torch.zeros(0)
        whole, no = empty.long(), empty.bool()
        return Columns(empty, empty, whole, empty, empty, no, no, no, whole, 0)
    rows, num_rows = [], 0
    for part in parts:
        rows.append(part.rows + num_rows)
        num_rows += part.num_rows

    tensors: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in Columns.__slots__
        if name not in ("rows", "num_rows")
    }
    return Columns(**tensors, rows=torch.cat(rows), num_rows=num_rows)


@dataclass(slots=True)
class TokenRecords:
    """The tokens of one update as its micro-batches come; they stay on their device until all have.

    A micro-batch holds whole completions, and no completion is added twice.
    """

    _parts: list[Columns] = field(default_factory=list)

    def add(
        self,
        *,
        policy_logprobs: Tensor,
        sampler_logprobs: Tensor,
        staleness: Tensor,
        entropy: Tensor,
        weights: Tensor,
        is_truncated: Tensor,
        is_masked: Tensor,
        is_clipped: Tensor,
        rows: Tensor,
        num_rows: int,
    ) -> None:
        """All tensors are [N] (see Columns); what has a gradient is detached."""
        part = Columns(
            policy_logprobs.detach(),
            sampler_logprobs,
            staleness,
            entropy.detach(),
            weights.detach(),
            is_truncated,
            is_masked,
            is_clipped,
            rows,
            num_rows,
        )
        self._parts.append(part)

    def columns(self) -> Columns:
        """All tokens so far, on the CPU."""
        on_device = join(self._parts)
        tensors: dict[str, Any] = {
            name: getattr(on_device, name).cpu() for name in Columns.__slots__ if name != "num_rows"
        }
        return Columns(**tensors, num_rows=on_device.num_rows)


def update_stats(columns: Columns, *, weighs_tokens: bool, **measured: float | None) -> UpdateStats:
    """The numbers of the update whose tokens are `columns`, and `measured` as they are.

    `weighs_tokens`: the objective clips, and weighs tokens by importance. Tokens without a finite
    log ratio count in none of the numbers that compare policy and sampler.
    """
    log_ratios = columns.policy_logprobs.double() - columns.sampler_logprobs.double()
    is_known = log_ratios.isfinite()
    is_fresh = is_known & (columns.staleness == 0)
    gaps = log_ratios[is_fresh].abs()
    sequences, is_fresh_sequence = _sequence_log_ratios(columns, log_ratios, is_known)
    weighing: dict[str, float | None] = {}
    if weighs_tokens:
        weighing = {
            "clip_fraction": _mean(columns.is_clipped),
            "importance_weight_mean": _mean(columns.weights),
            "importance_truncated_fraction": _mean(columns.is_truncated),
            "importance_masked_fraction": _mean(columns.is_masked),
            "fresh_masked_fraction": _mean(columns.is_masked[is_fresh]),
        }
    return UpdateStats(
        entropy=_mean(columns.entropy),
        logprob_gap=_mean(gaps),
        logprob_gap_p99=_quantile(gaps, 0.99),
        logprob_gap_max=_quantile(gaps, 1.0),
        probability_factor=_mean(gaps.clamp(max=MAX_LOG_RATIO).exp()),
        sampler_kl=mean_kl(log_ratios[is_fresh]),
        kl_by_lag=tuple(
            LagKl(lag=lag, kl=mean_kl(log_ratios[of_lag]), num_tokens=int(of_lag.sum()))
            for lag in columns.staleness[is_known].unique().tolist()
            for of_lag in [is_known & (columns.staleness == lag)]
        ),
        token_ess=effective_sample_size(log_ratios[is_known]),
        sequence_ess=effective_sample_size(sequences),
        num_fresh_tokens=len(gaps),
        fresh_sequence_ess=effective_sample_size(sequences[is_fresh_sequence]),
        **weighing,
        **measured,
    )


def mean_kl(log_ratios: Tensor) -> float | None:
    """KL(sampler ‖ policy) per token, nats, from log policy - log sampler [N]; None of no token."""
    bounded = log_ratios.double().clamp(max=MAX_LOG_RATIO)
    return _mean(bounded.expm1() - bounded)


def effective_sample_size(log_ratios: Tensor) -> float | None:
    """The share, in (0, 1], of equally weighted samples that tell as much; None of no sample."""
    if not len(log_ratios):
        return None
    weights = log_ratios.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def _sequence_log_ratios(
    columns: Columns, log_ratios: Tensor, is_known: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums [S] over the tokens of each completion that somebody sampled; [S] bool: no token of it
    is older than the policy."""
    rows, num_rows = columns.rows[is_known], columns.num_rows
    bounded = log_ratios[is_known].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    sums = torch.zeros(num_rows, dtype=torch.float64).index_add_(0, rows, bounded)
    is_sampled = rows.bincount(minlength=num_rows) > 0
    num_stale = columns.rows[columns.staleness != 0].bincount(minlength=num_rows)
    return sums[is_sampled], (num_stale == 0)[is_sampled]


def _mean(values: Tensor) -> float | None:
    values = values.double()
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) else None


def _quantile(values: Tensor, share: float) -> float | None:
    """The smallest value that `share` of all are not above; torch.quantile takes no long inputs."""
    return float(values.kthvalue(math.ceil(share * len(values))).values) if len(values) else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held so far: of tensors on a GPU, or else of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- guards -------------------------------------------------------------------------------------


class UpdateRefused(ValueError):
    """The update must not be applied. `reason` has the number and its bound, `remedy` what to do;
    together they are the sentence."""

    def __init__(self, reason: str, remedy: str, stats: UpdateStats) -> None:
        super().__init__(reason, remedy, stats)  # The arguments that pickle rebuilds it from.
        self.reason = reason
        self.remedy = remedy
        self.stats = stats

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def num_telling_tokens(bound: float) -> int:
    """The tokens over which one that policy and sampler see 2 nats apart is no KL above `bound`."""
    return math.ceil((math.exp(2) - 3) / bound)


def check_guards(stats: UpdateStats, guards: GuardsConfig) -> None:
    """Raises UpdateRefused when a number of the update is out of its bound.

    A loss or gradient that is not finite always is. The others take MIN_FRESH_TOKENS.
    """
    for name, value in (("loss", stats.loss), ("grad_norm", stats.grad_norm)):
        if not math.isfinite(value):
            raise UpdateRefused(f"{name} is {value}", "lower optimizer.learning_rate", stats)
    if stats.num_fresh_tokens < MIN_FRESH_TOKENS:
        return
    at_most = (
        ("sampler_kl", stats.sampler_kl, "max_sampler_kl"),
        ("fresh_masked_fraction", stats.fresh_masked_fraction, "max_masked_fraction"),
    )
    for name, measured, guard in at_most:
        bound = getattr(guards, guard)
        if bound is not None and measured is not None and measured > bound:
            raise _mismatch(
                f"{name} is {measured:.3g}, above guards.{guard} {bound:g}", guard, stats
            )
    least, ess = guards.min_sequence_ess, stats.fresh_sequence_ess
    if least is not None and ess is not None and ess < least:
        reason = f"fresh_sequence_ess is {ess:.3g}, below guards.min_sequence_ess {least:g}"
        raise _mismatch(reason, "min_sequence_ess", stats)


def _mismatch(reason: str, guard: str, stats: UpdateStats) -> UpdateRefused:
    remedy = (
        "the samples come from another model than the one that trains; serve the trainer's base "
        f"(ROLLOUT_BASE=nf4-exact for a 4-bit one, no FP8 KV cache), or change guards.{guard}"
    )
    return UpdateRefused(reason, remedy, stats)
