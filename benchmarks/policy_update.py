"""One update of Tandem's policy against one step of TRL's GRPOTrainer on the same batch.

Both load the same 4-bit checkpoint with random weights, start from the same random LoRA and train
on the same tokens and advantages; the gradient norms of their first steps must agree. Tandem runs
`Policy.update(samples, GrpoConfig())`; benchmarks/trl_update.py describes the peer. All rewards
differ, because Tandem would skip a completion with zero advantage. All completions have the same
length, so that TRL computes no padding and attends without a mask. TRL is spared the extra forward
pass with which it corrects for sampling by vLLM; Tandem needs no such pass. Another peer is the
recipe of benchmarks/recipe_update.py.

Tokens per second count prompt + completion for every completion on both sides, as without sharing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.checkpoints import FIRST_ORDINARY_TOKEN, SHAPES, work_folder, write_checkpoint
from benchmarks.fixed_batch import FixedBatch
from benchmarks.report import Report
from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample
from services.trainer.run_config import GrpoConfig, LoraConfig, OptimizerConfig, ReinforceConfig
from shared.adapters import LINEAR_MODULES
from shared.schemas import PolicyId, QuantizationRecipe

# Turns a batch into a part of the report's file name.
_NAME = str.maketrans({"×": "x", "+": "-", " ": None, "(": None, ")": None})
_LEARNING_RATE = 1e-6  # TRL's default; small enough that the batch stays on-policy
_RANK = 32
_MAX_NORM_DIFFERENCE = 0.1  # TRL's LoRA gradients are bfloat16, Tandem's float32
_CONTEXTS = (1024, 4096, 8192, 16384, 32768)
_GROUP_SIZES = (4, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Batch:
    """The shape of one update."""

    groups: int
    group_size: int
    prompt: int
    completion: int

    @property
    def num_rows(self) -> int:
        return self.groups * self.group_size

    @property
    def row(self) -> int:
        return self.prompt + self.completion

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, with the prompt counted in every row."""
        return self.num_rows * self.row

    def __str__(self) -> str:
        return f"{self.groups} × {self.group_size} × ({self.prompt} + {self.completion})"


@dataclass(frozen=True, slots=True)
class Side:
    """An implementation of the update, with its settings."""

    name: str
    kind: Literal["tandem", "trl", "recipe"]
    dtype: str = ""  # dtype of TRL's unquantized weights; unused by the other kinds
    liger: bool = False  # whether TRL uses Liger's kernels
    recomputes: bool = True  # TRAINER_GRADIENT_CHECKPOINTING of Tandem
    offloads: bool = False  # TRAINER_OFFLOAD_ACTIVATIONS of Tandem
    max_tokens: int | None = None  # tokens per micro-batch of Tandem; None: the benchmark's setting

    @property
    def is_tandem(self) -> bool:
        return self.kind == "tandem"


TANDEM = Side("Tandem", "tandem")
RECIPE = Side("the usual recipe", "recipe")


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: tuple[float, ...]  # duration of each update after the first
    loss: float  # loss of the first update
    grad_norm: float  # gradient norm of the first update, before clipping
    num_positions: int  # positions computed by the forward passes of one update
    peak_bytes: int  # CUDA peak after the first update, including base and optimizer

    @property
    def update_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The settings that all compared updates share."""

    checkpoint: Path
    vocabulary: int
    device: str
    max_tokens: int
    rounds: int

    def of(self, side: Side, *batches: Batch) -> list[Outcome | None]:
        """Measure in a separate process, because replaced kernels affect all models of a process.

        From the first batch that does not fit in the device's memory on, outcomes are None.
        """
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            return alone.submit(self.here, side, batches).result()

    def here(self, side: Side, batches: Sequence[Batch]) -> list[Outcome | None]:
        outcomes: list[Outcome | None] = [None] * len(batches)
        with contextlib.suppress(torch.OutOfMemoryError):
            for number, batch in enumerate(batches):
                measure = {"tandem": self._tandem, "trl": self._trl, "recipe": self._recipe}
                outcome = measure[side.kind](side, batch)
                print(f"{side.name}, {batch}: {outcome}", file=sys.stderr, flush=True)
                outcomes[number] = outcome
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
        return outcomes

    def _tandem(self, side: Side, batch: Batch) -> Outcome:
        meter = _Meter(self.device)
        policy = Policy.load(
            str(self.checkpoint),
            device=self.device,
            gradient_checkpointing=side.recomputes,
            offload_activations=side.offloads,
        )
        learner = Learner(policy)
        learner.start(
            PolicyId(run_id="benchmark", version=0),
            LoraConfig(rank=_RANK, alpha=_RANK),
            OptimizerConfig(learning_rate=_LEARNING_RATE, warmup_steps=0),
            seed=0,
        )
        _randomize_lora(policy.model)
        samples = _samples(batch, self.vocabulary, policy)
        algorithm = _algorithm(batch)
        meter.attach(policy.model)
        seconds, updates = [], []
        for number in range(1 + self.rounds):
            started = meter.now()
            updates.append(
                learner.update(
                    samples,
                    algorithm,
                    max_tokens_per_micro_batch=side.max_tokens or self.max_tokens,
                )
            )
            seconds.append(meter.now() - started)
            meter.after_update(number + 1)
        return meter.outcome(seconds, updates[0].loss, updates[0].grad_norm)

    def _fixed(self, batch: Batch) -> FixedBatch:
        prompts, completions = _tokens(batch, self.vocabulary)
        return FixedBatch(
            torch.tensor([prompt for prompt in prompts for _ in range(batch.group_size)]),
            torch.tensor(completions),
            torch.tensor(_advantages(batch)),
            batch.group_size,
        )

    def _recipe(self, _: Side, batch: Batch) -> Outcome:
        """Measure the recipe, with smaller and smaller micro-batches until one fits."""
        from benchmarks.recipe_update import recipe_steps

        for rows in _fewer_and_fewer(batch, _rows_per_micro_batch(batch, self.max_tokens)):
            meter = _Meter(self.device)

            def prepare(model: Any, meter: _Meter = meter) -> None:
                _randomize_lora(model)
                meter.attach(model)

            with contextlib.suppress(torch.OutOfMemoryError):
                steps = recipe_steps(
                    self.checkpoint,
                    self._fixed(batch),
                    device=self.device,
                    rank=_RANK,
                    target_modules=LINEAR_MODULES,
                    learning_rate=_LEARNING_RATE,
                    rows_per_micro_batch=rows,
                    num_steps=1 + self.rounds,
                    on_model=prepare,
                    on_step=meter.after_update,
                )
                return meter.outcome([s.seconds for s in steps], steps[0].loss, steps[0].grad_norm)
            print(f"the usual recipe: {rows} rows do not fit", file=sys.stderr, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        raise torch.OutOfMemoryError("not even one row fits in memory")

    def _trl(self, side: Side, batch: Batch) -> Outcome:
        from benchmarks.trl_update import trl_steps

        meter = _Meter(self.device)

        def prepare(model: Any) -> None:
            _randomize_lora(model)
            meter.attach(model)

        steps = trl_steps(
            self.checkpoint,
            self._fixed(batch),
            device=self.device,
            dtype=side.dtype,
            liger=side.liger,
            rank=_RANK,
            target_modules=LINEAR_MODULES,
            learning_rate=_LEARNING_RATE,
            rows_per_micro_batch=_rows_per_micro_batch(batch, self.max_tokens),
            num_steps=1 + self.rounds,
            on_model=prepare,
            on_step=meter.after_update,
        )
        return meter.outcome([s.seconds for s in steps], steps[0].loss, steps[0].grad_norm)


class _Meter:
    """Counts positions computed and memory used by updates, beyond what was already allocated."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._allocated_before = torch.cuda.memory_allocated() if self._is_cuda else 0
        self._num_positions = 0
        self._num_positions_of_first = 0

    def attach(self, model: Any) -> None:
        embeddings = model.get_base_model().get_input_embeddings()
        embeddings.register_forward_hook(self._count)

    def _count(self, _module: Any, arguments: tuple[torch.Tensor], _output: Any) -> None:
        self._num_positions += arguments[0].numel()

    def now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def after_update(self, number: int) -> None:
        if number > 1:
            return
        self._num_positions_of_first = self._num_positions
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def outcome(self, seconds: Sequence[float], loss: float, grad_norm: float) -> Outcome:
        """Build the outcome from the `seconds` of all updates, the first of which is a warm-up."""
        peak = torch.cuda.max_memory_allocated() if self._is_cuda else 0
        return Outcome(
            seconds=tuple(seconds[1:]),
            loss=loss,
            grad_norm=grad_norm,
            num_positions=self._num_positions_of_first,
            peak_bytes=peak - self._allocated_before,
        )


# --- the batch ----------------------------------------------------------------------------------


def _tokens(batch: Batch, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts, one per group, and completions, one per row."""
    rng = random.Random(1)

    def draw(length: int) -> list[int]:
        return [rng.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(length)]

    prompts = [draw(batch.prompt) for _ in range(batch.groups)]
    return prompts, [draw(batch.completion) for _ in range(batch.num_rows)]


def _rewards(batch: Batch) -> list[float]:
    rng = random.Random(2)
    return [rng.gauss(0, 1) for _ in range(batch.num_rows)]


def _advantages(batch: Batch) -> list[float]:
    """The advantages that `_algorithm` computes from the rewards."""
    rewards = _rewards(batch)
    if batch.group_size == 1:  # REINFORCE whitens over all tokens
        tokens = [reward for reward in rewards for _ in range(batch.completion)]
        mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens)
        return [(reward - mean) / deviation for reward in rewards]
    advantages = []
    for start in range(0, len(rewards), batch.group_size):
        group = rewards[start : start + batch.group_size]
        mean, deviation = statistics.fmean(group), statistics.stdev(group)
        advantages += [(reward - mean) / (deviation + 1e-4) for reward in group]
    return advantages


def _algorithm(batch: Batch) -> GrpoConfig | ReinforceConfig:
    """GRPO, or for groups of one, where its advantages are 0, a baseline over the whole batch."""
    return GrpoConfig() if batch.group_size > 1 else ReinforceConfig(loss="dapo")


def _samples(batch: Batch, vocabulary: int, policy: Policy) -> list[Sample]:
    """Samples with the logprobs of `policy`, so that importance weights are 1, as TRL assumes."""
    prompts, completions = _tokens(batch, vocabulary)
    samples = [
        Sample(
            prompt_token_ids=tuple(prompts[row // batch.group_size]),
            token_ids=tuple(token_ids),
            sampler_logprobs=(),
            staleness=(0,) * batch.completion,
            temperature=1.0,
            group=row // batch.group_size,
            rewards=(reward,),
            is_truncated=False,
        )
        for row, (token_ids, reward) in enumerate(zip(completions, _rewards(batch), strict=True))
    ]
    logprobs = policy.sample_logprobs(samples)
    return [
        replace(sample, sampler_logprobs=tuple(row))
        for sample, row in zip(samples, logprobs, strict=True)
    ]


def _rows_per_micro_batch(batch: Batch, max_tokens: int) -> int:
    """The largest divisor of the batch's rows that fits in Tandem's micro-batches of tokens."""
    most = max(1, min(batch.num_rows, max_tokens // batch.row))
    return next(rows for rows in range(most, 0, -1) if batch.num_rows % rows == 0)


def _fewer_and_fewer(batch: Batch, most: int) -> list[int]:
    """Divisors of the batch's rows: `most`, then each at most half of the previous, down to 1."""
    sizes = [most]
    while sizes[-1] > 1:
        half = sizes[-1] // 2
        sizes.append(next(rows for rows in range(half, 0, -1) if batch.num_rows % rows == 0))
    return sizes


# --- the start ----------------------------------------------------------------------------------


def _randomize_lora(model: Any) -> None:
    """Set the LoRA to the same random values on each side; B is not 0, so that A gets gradients."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                spread = 0.02 if "lora_A" in name else 0.01
                values = torch.randn(parameter.shape, generator=generator) * spread
                parameter.copy_(values.to(torch.bfloat16))


# --- the report ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument(
        "--rows-no-sharing",
        action="store_true",
        help="use 16 groups of one completion, 512 + 512 tokens each",
    )
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument(
        "--peer",
        nargs="+",
        choices=("trl", "recipe"),
        default=["trl"],
        help="sides to compare with; recipe is benchmarks/recipe_update.py",
    )
    parser.add_argument(
        "--peer-dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32"],
        help="dtypes of TRL's unquantized weights; float32 is its default",
    )
    parser.add_argument(
        "--liger", action="store_true", help="also measure TRL with use_liger_kernel (CUDA)"
    )
    parser.add_argument(
        "--offload",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="also measure Tandem with TRAINER_OFFLOAD_ACTIVATIONS and micro-batches of TOKENS "
        "(CUDA)",
    )
    parser.add_argument(
        "--no-recomputing",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="also measure Tandem without TRAINER_GRADIENT_CHECKPOINTING, with micro-batches of "
        "TOKENS",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure only memory against context and group size (CUDA)",
    )
    parser.add_argument("--turns", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--rounds", type=int, default=3, help="updates per turn after a warm-up")
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    for option in ("liger", "offload", "scaling"):
        if getattr(arguments, option) and arguments.device != "cuda":
            parser.error(f"--{option} needs --device cuda")
    sides = _sides(arguments)
    with work_folder() as folder:
        measurement = Measurement(
            checkpoint=folder / "base",
            vocabulary=SHAPES[arguments.shape].vocabulary,
            device=arguments.device,
            max_tokens=arguments.max_tokens,
            rounds=arguments.rounds,
        )
        write_checkpoint(
            arguments.shape,
            measurement.checkpoint,
            device=arguments.device,
            recipe=QuantizationRecipe(),
        )
        report = (_scaling if arguments.scaling else _update)(arguments, measurement, sides)
    report.publish(keep=arguments.report)


def _sides(arguments: argparse.Namespace) -> list[Side]:
    sides = [TANDEM]
    sides += [
        Side(f"Tandem, offloaded, {tokens:,}", "tandem", offloads=True, max_tokens=tokens)
        for tokens in arguments.offload
    ]
    sides += [
        Side(
            f"Tandem, nothing recomputed, {tokens:,}", "tandem", recomputes=False, max_tokens=tokens
        )
        for tokens in arguments.no_recomputing
    ]
    if "trl" in arguments.peer:
        sides += [Side(f"TRL, {dtype}", "trl", dtype) for dtype in arguments.peer_dtype]
        if arguments.liger:
            dtype = arguments.peer_dtype[-1]
            sides.append(Side(f"TRL, {dtype}, Liger", "trl", dtype, True))
    if "recipe" in arguments.peer:
        sides.append(RECIPE)
    return sides


def _update(
    arguments: argparse.Namespace, measurement: Measurement, sides: Sequence[Side]
) -> Report:
    batch = Batch(arguments.groups, arguments.group_size, arguments.prompt, arguments.completion)
    if arguments.rows_no_sharing:
        batch = Batch(groups=16, group_size=1, prompt=512, completion=512)
    outcomes: dict[Side, Outcome | None] = {}
    for _ in range(arguments.turns):  # taking turns evens out other load on the machine
        for side in sides:
            (outcome,) = measurement.of(side, batch)
            outcomes[side] = _joined(outcomes.get(side), outcome)
    tandem = outcomes[TANDEM]
    assert tandem, f"Tandem runs out of memory at {batch}"
    rows = []
    for side, outcome in outcomes.items():
        if outcome is None:
            rows.append((side.name, *["out of memory"] * 7))
            continue
        difference = outcome.grad_norm / tandem.grad_norm - 1
        assert abs(difference) < _MAX_NORM_DIFFERENCE, (side, outcome, tandem)
        rows.append(
            (
                side.name,
                f"{outcome.update_s:.3f} s",
                f"{batch.num_tokens / outcome.update_s:,.0f}",
                f"{outcome.num_positions:,}",
                f"{outcome.peak_bytes / 2**30:.1f} GiB" if outcome.peak_bytes else "–",
                f"{outcome.loss:+.1e}",
                f"{outcome.grad_norm:.5f}",
                f"{difference:+.2%}",
            )
        )
    return Report(
        name="policy_update",
        variant=(
            f"{arguments.device}-{str(batch).translate(_NAME)}"
            f"{'-recipe' if RECIPE in outcomes else ''}"
        ),
        title="One policy update against TRL's",
        setting=(
            f"{_where(arguments)}; batch of {batch} (groups × completions × (prompt + completion)) "
            f"tokens, at most {arguments.max_tokens:,} at once; {_algorithm(batch).name} with "
            f"dapo's loss, LoRA of rank {_RANK} on all linears. Each side takes {arguments.turns} "
            f"turn(s) of {arguments.rounds} updates after a warm-up; medians. "
            f"{_OF_THE_SETTINGS if arguments.offload or arguments.no_recomputing else ''}"
            f"{_SAMENESS}"
            f"{_OF_THE_RECIPE if RECIPE in outcomes else ''}"
        ),
        header=(
            "update",
            "time",
            "tokens/s",
            "positions computed",
            "peak memory",
            "loss",
            "gradient norm",
            "difference",
        ),
        rows=rows,
        conclusion="\n".join(
            _against_peers(side, outcome, outcomes)
            for side, outcome in outcomes.items()
            if side.is_tandem and outcome
        )
        + (f" {_TARGETS}" if arguments.device == "cuda" else ""),
    )


def _against_peers(side: Side, outcome: Outcome, outcomes: Mapping[Side, Outcome | None]) -> str:
    """A sentence about the speed of `side` and, on CUDA, where peaks are known, its memory."""
    peers = {peer: o for peer, o in outcomes.items() if o and not peer.is_tandem}
    if not peers:
        return f"{side.name}: every peer ran out of memory."
    speed = [f"{o.update_s / outcome.update_s:.2f} × {peer.name}" for peer, o in peers.items()]
    text = f"{side.name}: tokens per second {', '.join(speed)}"
    if outcome.peak_bytes:
        memory = [f"{outcome.peak_bytes / o.peak_bytes:.2f} of {p.name}" for p, o in peers.items()]
        text += f"; peak memory {', '.join(memory)}"
    return f"{text}."


def _joined(earlier: Outcome | None, outcome: Outcome | None) -> Outcome | None:
    if earlier is None or outcome is None:
        return outcome
    return replace(outcome, seconds=earlier.seconds + outcome.seconds)


_SAMENESS = (
    "Tokens per second count prompt + completion of every completion; positions computed count "
    "what the forward pass embeds. No advantage is zero and no row is padded; loss and gradient "
    "norm are from the first update, from the same weights. TRL is GRPOTrainer.train() of version "
    "1.16.0 with sampling replaced by the batch, without the forward pass that it adds for "
    "sampling by vLLM; the dtype is that of its norms, embeddings and head."
)
_OF_THE_SETTINGS = (
    "Offloaded means TRAINER_OFFLOAD_ACTIVATIONS, nothing recomputed means "
    "TRAINER_GRADIENT_CHECKPOINTING=false; the number is the limit of tokens per micro-batch. "
)
_OF_THE_RECIPE = (
    " The usual recipe is prepare_model_for_kbit_training, PEFT's LoRA in float32, Transformers' "
    "forward pass in bfloat16 autocast with gradient checkpointing, full logits, and AdamW, with "
    "the largest micro-batches that fit."
)
_TARGETS = "The targets on CUDA are at least 3 × the tokens per second at 0.4 × the memory or less."


def _where(arguments: argparse.Namespace) -> str:
    gpu = f" on one {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    threads = f" on {torch.get_num_threads()} CPU thread(s)" if arguments.device == "cpu" else ""
    return f"Qwen3 shape {arguments.shape}, random NF4 weights{gpu}{threads}"


# --- scaling ------------------------------------------------------------------------------------


def _scaling(
    arguments: argparse.Namespace, measurement: Measurement, sides: Sequence[Side]
) -> Report:
    """Report peak memory with micro-batches of one row, and of one group."""
    contexts = [Batch(1, 2, length // 2, length // 2) for length in _CONTEXTS]
    groups = [Batch(1, size, 1024, 256) for size in _GROUP_SIZES]
    by_context = _sweep(replace(measurement, max_tokens=1), sides, contexts)
    by_group = _sweep(replace(measurement, max_tokens=groups[-1].num_tokens), sides, groups)
    rows = [
        (str(batch), *(_gibibytes(memory[side][i]) for side in sides))
        for batches, memory in ((contexts, by_context), (groups, by_group))
        for i, batch in enumerate(batches)
    ]

    def plot(path: Path) -> None:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
        for axis, memory, values, label in (
            (axes[0], by_context, _CONTEXTS, "context of a row, tokens (one row at a time)"),
            (axes[1], by_group, _GROUP_SIZES, "completions of a group of 1,024 + 256 (at once)"),
        ):
            for side in sides:
                points = [(x, m / 2**30) for x, m in zip(values, memory[side], strict=True) if m]
                axis.plot(*zip(*points, strict=True), marker="o", label=side.name)
            axis.set(xlabel=label, ylabel="peak memory, GiB", xscale="log", ylim=(0, None))
            axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    return Report(
        name="policy_update",
        variant="scaling",
        title="Memory of a policy update against context and group size",
        setting=(
            f"{_where(arguments)}, LoRA of rank {_RANK}; peak of torch's allocator in an update, "
            "including base and optimizer. A micro-batch is one row in the first "
            f"{len(contexts)} batches (groups × completions × (prompt + completion)), a whole "
            "group in the others."
        ),
        header=("batch", *(side.name for side in sides)),
        rows=rows,
        conclusion="A peer is not measured beyond the first batch that does not fit in memory.",
        plot=plot,
    )


def _sweep(
    measurement: Measurement, sides: Sequence[Side], batches: Sequence[Batch]
) -> dict[Side, list[int]]:
    """Peak bytes per batch, or 0 from the first batch on that runs out of memory."""
    peaks = {}
    for side in sides:
        outcomes = replace(measurement, rounds=1).of(side, *batches)
        peaks[side] = [outcome.peak_bytes if outcome else 0 for outcome in outcomes]
    return peaks


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "out of memory"


if __name__ == "__main__":
    main()
