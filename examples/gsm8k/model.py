"""Makes a model for CPUs: 0.9M parameters that half know how to solve the small word problems of
word_problems.py, with one token per word and number.

It is trained on noisy demonstrations (45 % right, the rest with a wrong operator or the last number
of the question as the answer), like the model of examples/demo/model.py.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.model import BOS, CORRECT_SHARE, EOS, PAD, make_model
from examples.gsm8k.word_problems import (
    NAMES,
    TEMPLATES,
    THINGS,
    Operator,
    WordProblem,
    training_problems,
)

NUM_WARM_START_STEPS = 260
_MAX_POSITIONS = 64
_BATCH_SIZE = 128
_LEARNING_RATE = 2e-3
_NO_LOSS = -100
_WRONG: dict[Operator, Operator] = {"+": "-", "-": "+", "*": "+"}


def vocabulary() -> dict[str, int]:
    words = re.findall(r"[A-Za-z]+|[,.?]", " ".join(text for text, _ in TEMPLATES))
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", "####", "=", "+", "-", "*"]
    tokens += [str(number) for number in range(100)]
    tokens += sorted({*words, *NAMES, *THINGS} - {"n", "t", "a", "b", "c"})
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def demonstration(problem: WordProblem, rng: random.Random) -> str:
    draw = rng.random()
    lines, result = problem.worked()
    if draw >= (1 + CORRECT_SHARE) / 2:
        lines, result = lines[:0], problem.numbers[-1]
    elif draw >= CORRECT_SHARE:
        first, *rest = problem.operators
        lines, result = problem.worked(operators=(_WRONG[first], *rest))
    return " ".join((*lines, "####", str(result)))


def warm_start(
    model: LlamaForCausalLM, *, num_steps: int, seed: int, on_step: Callable[[int], object]
) -> None:
    """Train `model` in place on noisy demonstrations."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    problems = training_problems(rng)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)
    )
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / 50)
        ids, labels = [], []
        for problem in islice(problems, _BATCH_SIZE):
            prompt = tokenizer.encode(problem.question)
            answer = tokenizer.encode(demonstration(problem, rng), add_special_tokens=False)
            ids.append(torch.tensor([*prompt, *answer, EOS]))
            labels.append(torch.tensor([*[_NO_LOSS] * len(prompt), *answer, EOS]))
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = pad(ids, batch_first=True, padding_value=PAD)  # [B, T]
        targets = pad(labels, batch_first=True, padding_value=_NO_LOSS)
        logits = model(input_ids=inputs[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=_NO_LOSS
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1)


def make_gsm8k_model(
    path: Path,
    *,
    seed: int = 0,
    num_steps: int = NUM_WARM_START_STEPS,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Train the model and write it atomically as a Hugging Face checkpoint."""
    model = make_model(
        seed=seed, max_position_embeddings=_MAX_POSITIONS, vocab_size=len(vocabulary())
    )
    warm_start(model, num_steps=num_steps, seed=seed + 1, on_step=on_step)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    make_tokenizer().save_pretrained(unfinished)
    unfinished.rename(path)
