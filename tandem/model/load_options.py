"""What `PolicyModel.from_pretrained` and `get_peft_model` are asked for, as an Unsloth user asks.

Every name that Unsloth knows is honoured, taken with one sentence that says what it does not do, or
refused with one that says what to do; any other name is answered with the nearest that there is.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Name -> the values that change nothing, and what to do about any other.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "load_in_8bit": ((False, None), "a base is 4-bit, or 16-bit with load_in_4bit=False"),
    "load_in_fp8": ((False, None), "a base is 4-bit, or 16-bit with load_in_4bit=False"),
    "full_finetuning": ((False, None), "replicas load LoRA adapters only; remove it"),
    "trust_remote_code": ((False, None), "choose a model that Transformers itself implements"),
    "rope_scaling": ((None,), "write it into the checkpoint's config.json, for the replicas too"),
    "resize_model_vocab": ((None,), "the vocabulary of replicas is the checkpoint's"),
    "qat_scheme": ((None,), "the base is quantized once, and the same on the replicas"),
    "num_labels": ((None,), "a policy is a causal language model"),
    "auto_model": ((None,), "a policy is a causal language model"),
    "tokenizer_name": ((None,), "save the tokenizer into the checkpoint's folder"),
}
_WITHOUT_EFFECT: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "device_map": (("sequential", "auto", None), "device='cpu' or 'cuda' says where the base is"),
    "fix_tokenizer": ((True,), "the tokenizer is the checkpoint's in any case"),
    "use_exact_model_name": ((False, True), "names are always exact"),
    "offload_embedding": ((False,), "embeddings stay on the device"),
    "float32_mixed_precision": ((None, False), "LoRA weights are float32, computed in bfloat16"),
    "disable_log_stats": ((True, False), "a replica's numbers are at its /metrics"),
    "unsloth_tiled_mlp": ((False,), "gradient checkpointing bounds the memory"),
    "text_only": ((True, False), "a policy reads and writes text"),
    "enable_prefix_caching": ((True,), "replicas always keep prefixes, by policy"),
    "compilation_config": ((3, None), "a replica compiles as its own settings say"),
    "conservativeness": ((1.0,), "gpu_memory_utilization says how much memory a replica takes"),
    "max_logprobs": ((0, 1), "the logprobs of sampled tokens always come, and no others"),
    "unsloth_vllm_standby": ((False, True), "weights are not shared: there is nothing to wake"),
    "use_async": ((False, True), "the engine is a process of its own"),
    "use_engine": ((False, True), "the engine is a process of its own"),
    "training": ((True,), "see for_training() and for_inference()"),
    "return_logits": ((False, True), "a plain call returns them"),
    "fullgraph": ((False, True), "updates are not compiled"),
}
_REFUSED_OF_LORA: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "lora_dropout": ((0, 0.0), "the trained policy must equal the sampling one; remove it"),
    "bias": (("none",), "an adapter file cannot hold biases; remove it"),
    "layers_to_transform": ((None,), "an adapter covers all layers"),
    "layers_pattern": ((None,), "an adapter covers all layers"),
    "finetune_last_n_layers": ((None,), "an adapter covers all layers"),
    "modules_to_save": ((None, []), "an adapter file cannot hold whole modules; remove it"),
    "loftq_config": ((None, {}), "the base is what the replicas serve"),
    "init_lora_weights": ((True,), "training begins at the base: B is 0"),
    "target_parameters": ((None,), "name linears in target_modules"),
    "use_dora": ((False,), "replicas do not rescale weights; remove it"),
    "rank_pattern": ((None, {}), "a replica has one rank for all modules"),
    "alpha_pattern": ((None, {}), "a replica has one scaling for all modules"),
    "qat_scheme": ((None,), "the base is quantized once, and the same on the replicas"),
    "ensure_weight_tying": ((False,), "embeddings are not trained"),
}
_WITHOUT_EFFECT_ON_LORA: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "max_seq_length": ((), "it was set when the model was loaded"),
    "temporary_location": (("_unsloth_temporary_saved_buffers",), "nothing is written there"),
    "use_gradient_checkpointing": ((True, "unsloth"), "from_pretrained says it"),
}


def check_load_options(others: Mapping[str, Any], honoured: Callable[..., Any]) -> None:
    """Raises ValueError for an unsupported value, TypeError for an unknown option."""
    _check("from_pretrained", others, honoured, _REFUSED, _WITHOUT_EFFECT)


def check_lora_options(others: Mapping[str, Any], honoured: Callable[..., Any]) -> None:
    _check("get_peft_model", others, honoured, _REFUSED_OF_LORA, _WITHOUT_EFFECT_ON_LORA)


def _check(
    function: str,
    others: Mapping[str, Any],
    honoured: Callable[..., Any],
    refused: Mapping[str, tuple[tuple[Any, ...], str]],
    without_effect: Mapping[str, tuple[tuple[Any, ...], str]],
) -> None:
    for name, value in others.items():
        if name in refused:
            neutral, todo = refused[name]
            if not _is_one_of(value, neutral):
                raise ValueError(f"{function}({name}={value!r}) is not supported: {todo}")
        elif name in without_effect:
            neutral, instead = without_effect[name]
            if not _is_one_of(value, neutral):
                log.warning("%s(%s=%r) has no effect: %s", function, name, value, instead)
        else:
            named = [n for n in inspect.signature(honoured).parameters if n not in _NOT_NAMES]
            near = difflib.get_close_matches(name, [*named, *refused, *without_effect], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(named)}"
            raise TypeError(f"{function}() has no parameter {name!r}: {hint}")


_NOT_NAMES = ("self", "cls", "model", "others")


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value is item or value == item for item in neutral)


def check_dtype(dtype: Any) -> None:
    """Accept None and bfloat16, in which a policy computes."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in ("bfloat16", "bf16"):
        raise ValueError(
            f"from_pretrained(dtype={str(dtype).removeprefix('torch.')}) is not supported: "
            "trainer and replicas compute in bfloat16; remove it"
        )


def replica_settings(
    *,
    source: Path,
    device: str,
    load_in_4bit: bool,
    max_seq_length: int,
    max_lora_rank: int,
    gpu_memory_utilization: float,
    float8_kv_cache: bool,
    random_state: int,
    cache_dir: Path,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """The environment of a replica that serves the policy.

    `options` are the engine's options that were named; see services/rollout/settings.py.
    """
    named = {
        "model": source,
        "device": device,
        "base": "nf4-exact" if load_in_4bit else "original",
        "max_model_len": max_seq_length,
        "max_lora_rank": max_lora_rank,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_dtype": "fp8" if float8_kv_cache else "auto",
        "seed": random_state,
        "cache_dir": cache_dir,
        "drain_delay_s": 0,
        **{name: value for name, value in options.items() if value is not None},
    }
    return {f"ROLLOUT_{name.upper()}": str(value) for name, value in named.items()}
