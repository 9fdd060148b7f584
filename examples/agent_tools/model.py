"""The agent's model: the demo's architecture, trained here on conversations that mostly go wrong.

The demonstrations use the calculator, but at every turn half of them answer too early instead of
calling it. Reinforcement learning takes over from there.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from examples.agent_tools.task import Problem, calculator, problem
from examples.demo.model import EOS, PAD, make_model, make_tokenizer, save

NUM_WARM_START_STEPS = 220
_CALL_SHARE = 0.5  # fraction of turns that call the calculator; the others answer too early
_LEARNING_RATE = 2e-3
_IGNORED = -100  # label of a position without a loss


def demonstration(problem: Problem, rng: random.Random) -> list[tuple[str, bool]]:
    """A conversation as (text, whether the policy writes it); the last text is the answer."""
    a, b, c = problem.numbers
    said = [(problem.question + "=", False)]
    known = f"{a:03}"  # the answer, if the conversation stopped at this point
    for number, first in ((b, f"{a}"), (c, None)):
        if rng.random() > _CALL_SHARE:
            break
        call = f"{first or known}+{number}"
        result = calculator(call)
        assert result
        said += [(call + "=", True), (result, False)]
        known = result[:-1]
    return [*said, (known, True)]


def make_agent_model(
    path: Path,
    *,
    seed: int = 0,
    num_steps: int = NUM_WARM_START_STEPS,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Train and write the checkpoint atomically: about 0.2 s per step on one core."""
    model, tokenizer, rng = make_model(seed=seed), make_tokenizer(), random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)
    )
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / 50)
        rows = [_ids_and_labels(demonstration(problem(rng), rng), tokenizer) for _ in range(64)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in rows])  # [B, T]
        labels = torch.tensor([row + [_IGNORED] * (longest - len(row)) for _, row in rows])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, unfinished)
    unfinished.rename(path)


def _ids_and_labels(
    said: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that mask out everything but the policy's text."""
    ids: list[int] = []
    labels: list[int] = []
    for number, (text, is_policy) in enumerate(said):
        new = tokenizer.encode(text, add_special_tokens=number == 0)
        ids += new
        labels += new if is_policy else [_IGNORED] * len(new)
    return [*ids, EOS], [*labels, EOS]
