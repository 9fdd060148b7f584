"""Logprobs of a checkpoint according to Transformers and PEFT, independent of the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST_KEY, peft_config
from shared.schemas import AdapterManifest


class ReferenceModel:
    """bf16 weights with a float32 head, like the engine; `adapter` is a pushed adapter file."""

    def __init__(
        self, checkpoint: Path, adapter: bytes | None = None, work_dir: Path | None = None
    ):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        self._head = model.lm_head.weight.detach().float()  # [V, H]
        if adapter is not None:
            assert work_dir
            model = _with_adapter(model, checkpoint, adapter, work_dir).base_model.model
        self._body = model.model.eval()

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int], *, temperature: float = 1.0) -> Tensor:
        """log p(token | ids[: t + 1]) for every t: [T, V]."""
        hidden = self._body(input_ids=torch.tensor([list(ids)])).last_hidden_state  # [1, T, H]
        logits = hidden[0].float() @ self._head.T
        return torch.log_softmax(logits / temperature, -1)

    def of_tokens(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """log p(ids[t + 1] | ids[: t + 1]) for every t but the last."""
        table = self.logprobs(ids, temperature=temperature)[:-1]
        return table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def _with_adapter(model: Any, checkpoint: Path, adapter: bytes, work_dir: Path) -> Any:
    from peft import PeftModel

    header = json.loads(adapter[8 : 8 + int.from_bytes(adapter[:8], "little")])
    manifest = AdapterManifest.model_validate_json(header["__metadata__"][MANIFEST_KEY])
    assert len(load(adapter)) == len(header) - 1
    config = peft_config(manifest, str(checkpoint))
    (work_dir / ADAPTER_CONFIG).write_text(json.dumps(config))
    (work_dir / ADAPTER_WEIGHTS).write_bytes(adapter)
    return PeftModel.from_pretrained(model, work_dir)
