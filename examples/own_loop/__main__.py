"""Your own training loop in your own process, with your prompts, reward, loss and optimizer.

`python -m examples.own_loop` trains the demo's model to sort digits with GRPO, in two to three
minutes on two CPU cores. `PolicyModel` starts and stops the engine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from examples.demo.model import make_demo_model
from examples.own_loop.plot import plot_curve
from services.processes import ROOT, ProcessFailed
from services.trainer.data.sort_digits import held_out_problems, training_problems
from shared.errors import ServiceError
from tandem import PolicyModel
from tandem.model.outputs import RequestOutput

WORK_DIR = ROOT / ".own_loop"
NUM_COMPLETIONS = 8  # completions per prompt
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
EVAL_EVERY = 10
MIN_RISE = 0.25  # required rise of the held-out accuracy


def rewards(outputs: list[RequestOutput], answers: list[str]) -> Tensor:
    """[prompts, completions]: 1 for the right answer, else 0."""
    return torch.tensor(
        [
            [float(completion.text == answer) for completion in output.outputs]
            for output, answer in zip(outputs, answers, strict=True)
        ]
    )


def grpo_loss(model: PolicyModel, outputs: list[RequestOutput], reward: Tensor) -> Tensor:
    """Clipped GRPO loss, with ratios to the sampler's probabilities, averaged over all tokens."""
    advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    policy = model.logprobs(outputs)
    weights = advantages.flatten()[:, None].to(policy.logprobs.device)  # [B, 1]
    ratios = (policy.logprobs - policy.sampler_logprobs).exp()  # [B, T]
    clipped = ratios.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    objective = torch.minimum(ratios * weights, clipped * weights)
    return -objective[policy.mask].mean()


def accuracy(model: PolicyModel) -> float:
    """The share of held-out problems that a sampled answer solves."""
    prompts, answers = zip(*held_out_problems(), strict=True)
    with model.for_inference():
        outputs = model.fast_generate_batches(list(prompts), max_tokens=8, seed=0)
    return float(rewards(outputs, list(answers)).mean())


def train(model: PolicyModel, *, num_steps: int, num_prompts: int, seed: int) -> list[float]:
    """Train for `num_steps` steps; returns the mean reward of each."""
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0
    )
    problems, curve = training_problems(random.Random(seed)), []
    for step in range(num_steps):
        prompts, answers = zip(*islice(problems, num_prompts), strict=True)
        with model.for_inference():  # the engine serves the current policy
            outputs = model.vllm_engine.generate(
                list(prompts), n=NUM_COMPLETIONS, max_tokens=8, seed=1_000_000 * (seed + 1) + step
            )
        reward = rewards(outputs, list(answers))
        model.for_training()
        loss = grpo_loss(model, outputs, reward)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(reward.mean()))
        if step == 0 or (step + 1) % EVAL_EVERY == 0:
            print(f"step {step + 1:3}  version {outputs[0].policy.version:3}  ", end="")
            print(f"reward {curve[-1]:.2f}", flush=True)
    return curve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.own_loop", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="checkpoint to train (default: make the demo's model)"
    )
    parser.add_argument("--steps", type=int, default=50, help="policy updates (%(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--rollout-urls", nargs="*", default=(), help="replicas to use instead of a new engine"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    folder = options.model or WORK_DIR / "model"
    if options.model is None and not folder.exists():
        print("making the demo's model, half a minute ...", flush=True)
        make_demo_model(folder)
    print("loading base, LoRA and engine ...", flush=True)
    try:
        model, _ = PolicyModel.from_pretrained(
            str(folder),
            max_seq_length=64,
            load_in_4bit=True,
            fast_inference=True,
            max_lora_rank=16,
            random_state=options.seed,
            rollout_urls=options.rollout_urls,
            cache_dir=WORK_DIR / "cache",
        )
        model.get_peft_model(r=16, lora_alpha=32, random_state=options.seed)
        before = accuracy(model)
        print(f"held-out accuracy {before:.0%}", flush=True)
        curve = train(
            model, num_steps=options.steps, num_prompts=options.prompts, seed=options.seed
        )
        after = accuracy(model)
    except (ValueError, ServiceError, ProcessFailed) as error:
        print(error, file=sys.stderr)
        return 1
    model.save_lora(WORK_DIR / "adapter")
    plot_curve(curve, before=before, after=after, path=WORK_DIR / "curve.png")
    print(f"held-out accuracy {before:.0%} -> {after:.0%} in {time.perf_counter() - started:.0f} s")
    print("adapter in .own_loop/adapter, curve in .own_loop/curve.png")
    model.close()
    return 0 if after - before >= MIN_RISE else 1


if __name__ == "__main__":
    sys.exit(main())
