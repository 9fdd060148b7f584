"""Makes the demo's model: a 0.8M-parameter Llama that half knows how to sort digits.

It is trained on noisy demonstrations (45 % sorted, the rest descending or copied), so that its
answers have the right form but are mostly wrong. Reinforcement learning takes over from there.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.trainer.data.sort_digits import training_problems

CHARACTERS = ("<pad>", "<bos>", "<eos>", *"0123456789+=s")
PAD, BOS, EOS = 0, 1, 2
CORRECT_SHARE = 0.45
NUM_WARM_START_STEPS = 220
# Concatenates the messages and ends the prompt with "=", so that chat requests work too.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character that prepends `<bos>`."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    *, seed: int, max_position_embeddings: int = 64, vocab_size: int = len(CHARACTERS)
) -> LlamaForCausalLM:
    """A model with random weights; all widths are multiples of 64, the block size of NF4."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def warm_start(
    model: LlamaForCausalLM,
    *,
    num_steps: int,
    seed: int,
    batch_size: int = 128,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Supervised training on noisy demonstrations, in place: about 0.12 s per step on two cores."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    problems = training_problems(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98))
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
        batch = list(islice(problems, batch_size))
        texts = [prompt + _demonstration(prompt, answer, rng) for prompt, answer in batch]
        ids = torch.tensor([[*tokenizer.encode(text), EOS] for text in texts])  # [B, T]
        num_prompt = len(tokenizer.encode(batch[0][0]))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, num_prompt - 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, num_prompt:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1)


def _demonstration(prompt: str, answer: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < CORRECT_SHARE:
        return answer
    return answer[::-1] if draw < (1 + CORRECT_SHARE) / 2 else prompt[1:-1]


def save(model: LlamaForCausalLM, path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def make_demo_model(
    path: Path,
    *,
    seed: int = 0,
    num_steps: int = NUM_WARM_START_STEPS,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Train the demo model and write it atomically as a Hugging Face checkpoint."""
    model = make_model(seed=seed)
    warm_start(model, num_steps=num_steps, seed=seed + 1, on_step=on_step)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, unfinished)
    unfinished.rename(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("pass the folder to write: python -m examples.demo.model .demo/model")
    folder = Path(sys.argv[1])
    if folder.exists():
        print(f"{folder} already exists")
    else:
        make_demo_model(folder)
