"""`LIE_FILE=path python -m tests.lying_replica`: a rollout service whose engine lies.

This is the real service on the real engine, except that the word in LIE_FILE decides how the next
adapter is loaded: the receipt is the same, but the served weights are not.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.rollout.app import create_app
from services.rollout.engine import Adapter
from services.rollout.replica import BootedEngine, Replica
from services.rollout.settings import RolloutSettings, prepare_environment
from services.server import Server, read_settings
from shared.adapters import ADAPTER_WEIGHTS
from shared.logs import configure_logging

Lie = Literal["none", "base", "stale", "swapped", "twice", "layer_lost"]
Tensors = dict[str, Tensor]


def swap_gate_and_up(tensors: Tensors) -> Tensors:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def renamed(name: str) -> str:
        parts = name.split(".")
        return ".".join(other.get(part, part) for part in parts)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def lose_a_layer(tensors: Tensors) -> Tensors:
    lost = {name for name in tensors if ".layers.2." in name and ".lora_B." in name}
    assert lost
    return {name: tensor * (name not in lost) for name, tensor in tensors.items()}


def scale_twice(tensors: Tensors) -> Tensors:
    return {name: 2 * t if ".lora_B." in name else t for name, t in tensors.items()}


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    save_file(change(tensors), file, metadata)


def boot_liar(settings: RolloutSettings, model_dir: Path) -> BootedEngine:
    from services.rollout.vllm_engine import VLLM_VERSION, VllmEngine

    lie_file = Path(os.environ["LIE_FILE"])

    class LyingEngine(VllmEngine):
        def __init__(self, engine: object, max_model_len: int) -> None:
            super().__init__(engine, max_model_len)
            self._ignored: set[int] = set()  # slots that serve the base instead
            self._last_honest = b""

        async def load_adapter(self, adapter: Adapter) -> None:
            lie = lie_file.read_text()
            served = dataclasses.replace(adapter, path=adapter.path / "served")
            shutil.copytree(adapter.path, served.path)
            weights = served.path / ADAPTER_WEIGHTS
            match lie:
                case "none":
                    self._last_honest = weights.read_bytes()
                case "base":
                    self._ignored.add(adapter.slot_id)
                case "stale":
                    weights.write_bytes(self._last_honest)
                case "swapped":
                    rewrite(weights, swap_gate_and_up)
                case "twice":
                    rewrite(weights, scale_twice)
                case "layer_lost":
                    rewrite(weights, lose_a_layer)
                case _:
                    raise AssertionError(f"{lie!r} in {lie_file} is no lie")
            await super().load_adapter(served)

        async def score(
            self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
        ) -> list[float]:
            if adapter and adapter.slot_id in self._ignored:
                adapter = None
            return await super().score(request_id, token_ids, adapter)

    return BootedEngine(LyingEngine.boot(settings, model_dir), VLLM_VERSION)


def main() -> int:
    settings = read_settings(RolloutSettings)
    configure_logging("rollout", settings.log_level)
    prepare_environment(settings)
    replica = Replica(settings, boot_engine=boot_liar, on_exit=lambda code: server.exit(code))
    server = Server(
        create_app(replica), host=settings.host, port=settings.port, on_stop=replica.drain
    )
    return server.run_until_exit()


if __name__ == "__main__":
    sys.exit(main())
