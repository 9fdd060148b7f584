"""What the trainer does to a model for the sake of its architecture: layout, fused kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from typing import Any

import torch

from services.trainer.policy import attention
from services.trainer.policy.token_batch import Layout

log = logging.getLogger(__name__)
_LAYER_PARTS = {"self_attn", "mlp"}  # Besides norms; only self_attn mixes positions.
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_MAX_HEAD_DIM = 256  # Limit of flash attention.


def choose_layout(model: Any, device: torch.device) -> Layout:
    """How completions of one prompt are computed together: exactly, or else not at all.

    Sharing a prompt needs layers that mix positions by full causal attention and nothing else. On
    CUDA the model gets the attention of packed rows.
    """
    if not _has_plain_attention(model):
        log.info("%s: rows are padded, prompts not shared", model.config.model_type)
        return "padded"
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = model.get_input_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or head_dim > _MAX_HEAD_DIM:
        return "masked"
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, attention.packed_attention)
    model.set_attn_implementation(attention.NAME)
    return "packed"


def _has_plain_attention(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return False
    if getattr(config, "attn_logit_softcapping", None):
        return False
    for layer in model.get_decoder().layers:
        parts = dict(layer.named_children())
        if any(name not in _LAYER_PARTS and "norm" not in name for name in parts):
            return False
        if "self_attn" not in parts:
            return False
        names = {name for name, _ in parts["self_attn"].named_children()}
        if names - _ATTENTION_PARTS or list(parts["self_attn"].parameters(recurse=False)):
            return False
    return True


def fuse_kernels(model: Any) -> None:
    """RMSNorm, rotary positions and SwiGLU as one kernel each, where liger-kernel has them."""
    if importlib.util.find_spec("liger_kernel") is None:
        log.warning("liger-kernel is not installed: updates are slower than they could be")
        return
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        log.warning("there is no C compiler for Triton's kernels: install gcc for faster updates")
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        log.info("liger-kernel has no kernels for %s", model.config.model_type)
        return
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def refuse_scaled_logits(config: Any) -> None:
    """Logits are computed here from hidden states; a model that rescales them would differ.

    Raises ValueError for one that does.
    """
    text_config = config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1.0):
            raise ValueError(
                f"{text_config.model_type} sets {name}, which the trainer does not apply yet: "
                "choose a model without it"
            )
