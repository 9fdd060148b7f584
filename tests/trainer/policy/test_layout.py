"""Which models share prompts: those whose positions meet in full causal attention, nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.falcon_h1 import FalconH1Config

from services.trainer.policy.layout import choose_layout, refuse_scaled_logits

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
}
CONFIGS = {
    "llama": (LlamaConfig(**SMALL), "masked"),
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), "masked"),
    "qwen2": (Qwen2Config(**SMALL), "masked"),
    "mistral without a window": (MistralConfig(**SMALL, sliding_window=None), "masked"),
    "mistral with a sliding window": (MistralConfig(**SMALL, sliding_window=8), "padded"),
    "qwen3 with sliding layers": (
        Qwen3Config(
            **SMALL,
            head_dim=16,
            sliding_window=8,
            use_sliding_window=True,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "padded",
    ),
    "falcon with a state space": (
        FalconH1Config(**SMALL, head_dim=16, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16),
        "padded",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_full_attention_shares_a_prompt(name: str) -> None:
    config, expected = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert choose_layout(model, torch.device("cpu")) == expected


def test_a_model_that_scales_its_logits_is_refused() -> None:
    config = LlamaConfig(**SMALL)
    refuse_scaled_logits(config)
    config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="llama sets final_logit_softcapping"):
        refuse_scaled_logits(config)
