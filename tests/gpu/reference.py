"""What transformers says about a served base, in float32: computed apart from any engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


class Reference:
    def __init__(self, checkpoint: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = self._model.to(device).eval()

    @torch.no_grad()
    def of_tokens(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """log p(ids[t + 1] | ids[: t + 1]) for every t but the last."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1]  # [T - 1, V]
        table = torch.log_softmax(logits / temperature, -1)
        logprobs: list[float] = table.gather(1, tokens[0, 1:, None])[:, 0].tolist()
        return logprobs
