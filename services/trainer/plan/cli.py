"""`python -m services.trainer plan`: arguments -> Request -> Plan -> a table, or JSON.

Exit code 0: it fits, on one GPU or two. 1: it does not, and what to change. 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn, get_args

import yaml

from services.boot import one_line
from services.trainer.plan.choice import Plan, Request, make_plan
from services.trainer.plan.inputs import GIB, find_gpu, read_model
from services.trainer.plan.memory import (
    CONTEXT_BYTES,
    LORA_RANKS,
    MAX_LIVE_POLICIES,
    Batch,
    KvCacheDtype,
    Optimizer,
)
from services.trainer.run_config import LoraConfig, OptimizerConfig, RunConfig
from services.trainer.settings import TrainerSettings
from shared.schemas import SamplingParams, ServingMode

MAX_NUM_SEQS = 256  # Default in rollout/settings.py.
_SAMPLING: SamplingParams = RunConfig.model_fields["sampling"].default


def main(arguments: Sequence[str]) -> int:
    try:
        return answer(arguments)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 2


def answer(arguments: Sequence[str], *, prog: str = "python -m services.trainer plan") -> int:
    """Print the plan; the exit code. Raises ValueError or OSError for bad input."""
    options = _parser(prog).parse_args(arguments)
    plan = make_plan(_request(options))
    print(json.dumps(_record(plan), indent=2) if options.json else _text(plan))
    return 0 if plan.fits else 1


# --- arguments ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help says what there is)")


def _parser(prog: str) -> argparse.ArgumentParser:
    run, trainer = RunConfig.model_fields, TrainerSettings.model_fields
    parser = _Parser(
        prog=prog,
        description="The GPU memory that trainer and replica take, and the settings to use.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    count = partial(add, type=_count, metavar="N")
    default = "(%(default)s)"
    add("--model", required=True, help="checkpoint folder, hub id, or a config.json alone")
    add("--gpu", required=True, help="its name, as H100, or its GiB")
    count("--context", required=True, help="tokens, prompt + completion")
    count("--completion", default=_SAMPLING.max_tokens, help=f"tokens of one {default}")
    count("--group-size", default=_SAMPLING.n, help=f"completions of a prompt {default}")
    num_prompts = run["prompts_per_step"].default
    count("--prompts-per-step", default=num_prompts, help=f"of an update {default}")
    count("--lora-rank", default=LoraConfig().rank, help=default)
    count("--max-tokens-per-micro-batch", help="(chosen by what there is room for)")
    add("--optimizer", choices=get_args(Optimizer), default=OptimizerConfig().name, help=default)
    add("--kv-cache-dtype", choices=get_args(KvCacheDtype), help="(fp8 where the GPU has it)")
    count("--max-num-seqs", default=MAX_NUM_SEQS, help=f"that run at once {default}")
    add("--serving-mode", choices=get_args(ServingMode), default="lora", help=default)
    for name in ("load_in_4bit", "offload_activations"):
        add(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            default=trainer[name].default,
            help=default,
        )
    add("--json", action="store_true")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _request(options: argparse.Namespace) -> Request:
    """Raises ValueError for what no run could have."""
    model, gpu = read_model(options.model), find_gpu(options.gpu)
    if options.context > model.max_context:
        raise ValueError(
            f"--context {options.context}: the longest of {model.name} is {model.max_context}"
        )
    if options.completion >= options.context:
        raise ValueError(
            f"--completion {options.completion} leaves no room for a prompt in a context of "
            f"{options.context}: make it shorter"
        )
    if options.lora_rank > LORA_RANKS[-1]:
        raise ValueError(f"--lora-rank {options.lora_rank}: the largest is {LORA_RANKS[-1]}")
    kv_cache_dtype: KvCacheDtype = options.kv_cache_dtype or ("fp8" if gpu.has_fp8 else "auto")
    if kv_cache_dtype == "fp8" and gpu.has_fp8 is False:
        raise ValueError(f"--kv-cache-dtype fp8: {gpu.name} has no FP8, its replicas use auto")
    return Request(
        model=model,
        gpu=gpu,
        batch=Batch(
            num_groups=options.prompts_per_step,
            group_size=options.group_size,
            prompt=options.context - options.completion,
            completion=options.completion,
        ),
        lora_rank=options.lora_rank,
        optimizer=options.optimizer,
        load_in_4bit=options.load_in_4bit,
        offload=options.offload_activations,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=options.max_num_seqs,
        serving_mode=options.serving_mode,
        max_tokens=options.max_tokens_per_micro_batch,
    )


# --- output -------------------------------------------------------------------------------------


def _record(plan: Plan) -> dict[str, Any]:
    """What `_text` says, in bytes and tokens."""
    placement = plan.placement
    request, share = placement.request, placement.share
    trainer, replica = placement.trainer, placement.replica
    return {
        "fits": plan.fits,
        "num_gpus": placement.num_gpus,
        "verdict": plan.verdict,
        "missing_bytes": placement.missing_bytes,
        "model": request.model.name,
        "gpu": asdict(request.gpu),
        "trainer": asdict(trainer) | {"peak": trainer.peak, "total": trainer.total},
        "replica": asdict(replica)
        | {
            "share": share,
            "kv_tokens": {dtype: replica.kv_tokens(share, dtype) for dtype in replica.token},
            "num_completions": placement.num_completions,
            "num_groups": placement.num_groups,
        },
        "environment": plan.environment,
        "run_config": plan.run_config,
    }


def _text(plan: Plan) -> str:
    placement = plan.placement
    request = placement.request
    gpu, batch = request.gpu, request.batch
    parts = [
        f"{request.model.name} on {gpu.name} ({gpu.usable_bytes / GIB:.1f} GiB usable)",
        f"context {batch.context:,} ({batch.prompt:,} + {batch.completion:,})",
        f"group of {batch.group_size}",
        f"LoRA rank {request.lora_rank}",
    ]
    lines = [" · ".join(parts), ""]
    lines += [f"trainer, micro-batches of {placement.max_tokens:,} tokens"]
    lines += _table(_trainer_rows(plan))
    lines += ["", f"replica, {placement.utilization:g} of the GPU"]
    lines += _table(_replica_rows(plan))
    lines += ["", plan.verdict, ""]
    if plan.fits:
        lines += ["environment", *(f"  {name}={value}" for name, value in plan.environment.items())]
        config = yaml.safe_dump(plan.run_config, sort_keys=False, default_flow_style=None)
        lines += ["run config", *(f"  {line}" for line in config.splitlines())]
    return "\n".join(lines)


def _table(rows: Iterator[tuple[str, float, str]]) -> Iterator[str]:
    for name, num_bytes, remark in rows:
        yield f"  {name:<42}{num_bytes / GIB:7.2f} GiB  {remark}".rstrip()


def _trainer_rows(plan: Plan) -> Iterator[tuple[str, float, str]]:
    request, memory = plan.placement.request, plan.placement.trainer
    parts = memory.activations
    yield f"weights, {'NF4' if request.load_in_4bit else 'bf16'}", memory.weights, ""
    yield "LoRA, float32", memory.lora, ""
    yield "gradients", memory.gradients, ""
    yield f"optimizer, {request.optimizer}", memory.optimizer, ""
    yield "cuBLAS", memory.cublas, ""
    host = f"of {parts.host_inputs / GIB:.2f} GiB in host memory" if request.offload else ""
    yield f"inputs of {request.model.layers} layers", parts.layer_inputs, host
    smaller = "not at once with the larger"
    yield "one layer, computed again", parts.layer, smaller if parts.layer < parts.head else ""
    yield (
        "logits of a chunk, final states",
        parts.head,
        smaller if parts.head <= parts.layer else "",
    )
    yield "peak of an update", memory.peak, "as torch counts it"
    yield "room for other lengths, fragments", memory.other_lengths + memory.fragments, ""
    yield "CUDA context", CONTEXT_BYTES, ""
    yield "total", memory.total, ""


def _replica_rows(plan: Plan) -> Iterator[tuple[str, float, str]]:
    memory, share = plan.placement.replica, plan.placement.share
    yield "weights, bf16", memory.weights, ""
    if memory.copy:
        yield "copy of the linears, for merging", memory.copy, ""
    if memory.slots:
        yield f"{MAX_LIVE_POLICIES + 1} adapter slots", memory.slots, ""
    yield "vLLM", memory.engine, ""
    fp8, bf16 = (memory.kv_tokens(share, dtype) for dtype in ("fp8", "auto"))
    yield "KV cache", max(share - memory.fixed, 0), f"tokens: {fp8:,} fp8, {bf16:,} bf16"
    yield "share", share, "ROLLOUT_GPU_MEMORY_UTILIZATION"
    yield "beside it: CUDA context and graphs", memory.beside, ""
