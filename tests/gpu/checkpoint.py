"""A model of real width that half knows how to sort five digits, trained on the spot.

The demo's task, tokenizer and noisy demonstrations (examples/demo/model.py), at a width where
kernels, quantization and adapters work as they do in real models; batches are made on the device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.demo.model import BOS, CHARACTERS, CORRECT_SHARE, EOS, PAD, make_tokenizer
from services.trainer.data.sort_digits import NUM_DIGITS, held_out_problems
from tests.gpu.machine import CONTEXT, Shape

_ZERO, _SORT, _EQUALS = (CHARACTERS.index(character) for character in "0s=")
_NUM_PROMPT = 3 + NUM_DIGITS  # <bos>, s, the digits, =
_BATCH_SIZE = 256
_STEPS_PER_LOOK = 20


def make_checkpoint(
    path: Path, *, device: str, shape: Shape, accuracy: float = 0.3, max_steps: int = 1500
) -> float:
    """Train until the sampled accuracy on the held-out problems is at least `accuracy`, and write a
    bf16 checkpoint; that accuracy. AssertionError after `max_steps`."""
    torch.manual_seed(0)
    model = _make_model(shape).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
    )
    numbers = _training_numbers().to(device)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    for step in range(1, max_steps + 1):
        loss = -_answer_logprobs(model, *_demonstrations(numbers)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % _STEPS_PER_LOOK == 0 and (reached := sampled_accuracy(model)) >= accuracy:
            model.to(torch.bfloat16).save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            return reached
    raise AssertionError(
        f"after {max_steps} steps the model sorts {reached:.1%}, not {accuracy:.0%}"
    )


def _make_model(shape: Shape) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(CHARACTERS),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


@torch.no_grad()
def sampled_accuracy(model: Qwen3ForCausalLM) -> float:
    """The probability of a right answer at temperature 1, mean over the held-out problems."""
    numbers = torch.tensor([_number(prompt) for prompt, _ in held_out_problems()])
    digits = _digits(numbers.to(model.device))
    logprobs = _answer_logprobs(model, digits, digits.sort(-1).values)
    return float(logprobs.sum(-1).exp().mean())


def _answer_logprobs(model: Qwen3ForCausalLM, digits: Tensor, answers: Tensor) -> Tensor:
    """[B, 5] and [B, 5] digits -> [B, 6] logprobs of the answer and <eos>."""

    def column(token: int) -> Tensor:
        return torch.full_like(digits[:, :1], token)

    prompt = [column(BOS), column(_SORT), digits + _ZERO, column(_EQUALS)]
    ids = torch.cat([*prompt, answers + _ZERO, column(EOS)], -1)  # [B, 14]
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, _NUM_PROMPT - 1 :]
    losses = functional.cross_entropy(
        logits.float().transpose(1, 2), ids[:, _NUM_PROMPT:], reduction="none"
    )
    return -losses


def _demonstrations(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Digits and an answer [B, 5] each: sorted, else as often descending as copied."""
    device = numbers.device
    digits = _digits(numbers[torch.randint(len(numbers), (_BATCH_SIZE,), device=device)])
    ascending = digits.sort(-1).values
    draw = torch.rand(_BATCH_SIZE, 1, device=device)
    wrong = torch.where(draw < (1 + CORRECT_SHARE) / 2, ascending.flip(-1), digits)
    return digits, torch.where(draw < CORRECT_SHARE, ascending, wrong)


def _training_numbers() -> Tensor:
    """Every problem but the held-out ones, its digits read as a number."""
    numbers = torch.arange(10**NUM_DIGITS)
    held_out = torch.tensor([_number(prompt) for prompt, _ in held_out_problems()])
    return numbers[~torch.isin(numbers, held_out)]


def _number(prompt: str) -> int:
    return int(prompt[1:-1])


def _digits(numbers: Tensor) -> Tensor:
    """[B] -> [B, 5], the first digit first."""
    powers = 10 ** torch.arange(NUM_DIGITS - 1, -1, -1, device=numbers.device)
    return numbers[:, None] // powers % 10
