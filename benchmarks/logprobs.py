"""Logprobs of tokens, and their gradient, from hidden states: Tandem, TRL, and full logits.

    python -m benchmarks.logprobs [--device cuda] [--tokens 8192 --hidden 2560 --vocabulary 151936]

Each side gets bfloat16 hidden states and head, as in a policy, and is compared with the formula in
float64 on the first tokens. On CUDA the table also has peak memory beyond inputs and results.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import Report
from services.trainer.policy.logprobs import token_logprobs

_NUM_CHECKED = 256
_CHUNK = 4096  # vocabulary entries per chunk in TRL's function
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, head, labels -> [N] float32


@dataclass(frozen=True, slots=True)
class Inputs:
    hidden: Tensor  # [N, H] bfloat16
    head: Tensor  # [V, H] bfloat16
    labels: Tensor  # [N] int64
    grad: Tensor  # [N] float32


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float
    peak_bytes: int
    logprob_error: float  # largest absolute error, in nats
    gradient_error: float  # norm of the error relative to the norm of the gradient


def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    temperatures = torch.ones(len(labels), device=labels.device)
    return token_logprobs(hidden, head, labels, temperatures).logprobs


def of_trl(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    options = (None, labels, 1.0, _CHUNK, None, 1.0, ("entropy",))
    logprobs: Tensor = ChunkedLogProbFunction.apply(hidden, head, *options)[0]
    return logprobs.float()


def of_all_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ head.T).float()
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def run(logprobs: Logprobs, inputs: Inputs) -> tuple[Tensor, Tensor]:
    hidden = inputs.hidden.detach().requires_grad_()
    result = logprobs(hidden, inputs.head, inputs.labels)
    (gradient,) = torch.autograd.grad(result, hidden, inputs.grad)
    return result.detach(), gradient


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    first = slice(_NUM_CHECKED)
    doubles = Inputs(
        inputs.hidden[first].double(),
        inputs.head.double(),
        inputs.labels[first],
        inputs.grad[first].double(),
    )

    def formula(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    return run(formula, doubles)


def measure(
    logprobs: Logprobs, inputs: Inputs, expected: tuple[Tensor, Tensor], rounds: int
) -> Outcome:
    is_cuda = inputs.hidden.is_cuda
    found = run(logprobs, inputs)  # this first call also warms up
    held = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run(logprobs, inputs)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    gradient = found[1][:_NUM_CHECKED].double()
    return Outcome(
        seconds=statistics.median(seconds),
        peak_bytes=torch.cuda.max_memory_allocated() - held if is_cuda else 0,
        logprob_error=float((found[0][:_NUM_CHECKED].double() - expected[0]).abs().max()),
        gradient_error=float((gradient - expected[1]).norm() / expected[1].norm()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    inputs = Inputs(
        hidden=torch.randn(options.tokens, options.hidden).bfloat16().to(options.device),
        head=(0.05 * torch.randn(options.vocabulary, options.hidden)).bfloat16().to(options.device),
        labels=torch.randint(options.vocabulary, (options.tokens,)).to(options.device),
        grad=torch.randn(options.tokens).to(options.device),
    )
    expected = exact(inputs)
    sides = {"ours": ours, "TRL's ChunkedLogProbFunction": of_trl, "all logits": of_all_logits}
    found = {name: measure(f, inputs, expected, options.rounds) for name, f in sides.items()}
    Report(
        name="logprobs",
        variant=options.device,
        title="Logprobs from hidden states, and their gradient",
        setting=(
            f"{options.tokens:,} tokens, hidden size {options.hidden:,}, vocabulary "
            f"{options.vocabulary:,}, bfloat16, {torch.get_num_threads()} CPU thread(s) or one "
            f"GPU: {options.device}. Median of {options.rounds} rounds after a warm-up; errors "
            f"against float64 on {_NUM_CHECKED} tokens."
        ),
        header=("side", "time", "peak memory", "largest logprob error", "gradient error"),
        rows=[
            (
                name,
                f"{1e3 * outcome.seconds:.1f} ms",
                f"{outcome.peak_bytes / 2**30:.2f} GiB" if outcome.peak_bytes else "–",
                f"{outcome.logprob_error:.1e} nats",
                f"{outcome.gradient_error:.1e}",
            )
            for name, outcome in found.items()
        ],
        conclusion=", ".join(
            f"{name}: {outcome.seconds / found['ours'].seconds:.2f} × our time"
            for name, outcome in found.items()
            if name != "ours"
        )
        + ".",
    ).publish(keep=options.report)


if __name__ == "__main__":
    main()
