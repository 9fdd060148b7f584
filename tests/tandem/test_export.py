"""An exported policy has the trainer's logprobs in plain Transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.trainer.learner.learner import Learner
from services.trainer.policy.adapter import write_adapter
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample
from services.trainer.run_config import LoraConfig, OptimizerConfig
from shared.adapters import manifest_metadata
from shared.model_folder import linear_shapes
from tandem.export import TrainedPolicy, read_policy, write_merged, write_peft
from tests.publisher import PROBE
from tests.reference_model import ReferenceModel
from tests.trainer.conftest import VERSION_0
from tests.trainer.policy.test_policy import train_a_little

ROUNDING = 0.05  # nats; merging rounds a weight to bf16 once, the trainer adds two products


@pytest.fixture
def learner(loaded_learner: Learner) -> Learner:
    loaded_learner.start(
        VERSION_0,
        LoraConfig(rank=8, alpha=16),
        OptimizerConfig(learning_rate=2e-2, warmup_steps=0),
        seed=0,
    )
    return loaded_learner


@pytest.fixture
def trained(learner: Learner, samples: list[Sample], tiny_checkpoint: Path) -> TrainedPolicy:
    """A policy after five large updates, far from the base."""
    for _ in range(5):
        train_a_little(learner, samples)
    published = learner.policy.publish()
    return TrainedPolicy(published.manifest, bytes(published.content), str(tiny_checkpoint))


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean |Δlogprob|, in nats."""
    return float((torch.tensor(ours) - torch.tensor(theirs)).abs().mean())


def test_a_merged_checkpoint_is_the_policy_in_plain_transformers(
    policy: Policy, trained: TrainedPolicy, tmp_path: Path
) -> None:
    write_merged(trained, tmp_path / "merged")
    merged = ReferenceModel(tmp_path / "merged").of_tokens(PROBE)
    ours, base = policy.score([PROBE]), policy.score([PROBE], base=True)
    assert gap(base, ours) > 10 * ROUNDING
    assert gap(merged, ours) < ROUNDING


def test_merged_into_the_original_weights_it_is_farther_from_the_policy(
    policy: Policy, trained: TrainedPolicy, tmp_path: Path
) -> None:
    ours = policy.score([PROBE])
    gaps = {}
    for base in ("exact", "original"):
        write_merged(trained, tmp_path / base, base=base)
        gaps[base] = gap(ReferenceModel(tmp_path / base).of_tokens(PROBE), ours)
    assert gaps["original"] > 3 * gaps["exact"]


def test_merging_changes_the_linears_of_the_adapter_and_nothing_else(
    trained: TrainedPolicy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_merged(trained, tmp_path / "merged", base="original")
    before = load_file(tiny_checkpoint / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name].bfloat16())}
    assert changed == {f"{module}.weight" for module in linear_shapes(tiny_checkpoint)}


def test_a_merged_checkpoint_has_tokenizer_template_and_generation_config(
    trained: TrainedPolicy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_merged(trained, tmp_path / "merged")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes == {(tiny_checkpoint / "config.json").stat().st_mode}  # others may read every file
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "s21"}], tokenize=False)


def test_an_exported_adapter_is_the_policy_in_peft(
    policy: Policy, trained: TrainedPolicy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from services.base_model import quantized_load_options

    write_peft(trained, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, **quantized_load_options(tiny_checkpoint, "cpu")
    )
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        logits = model(torch.tensor([PROBE])).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1)[range(len(PROBE) - 1), PROBE[1:]]
    assert gap(logprobs.tolist(), policy.score([PROBE])) < ROUNDING


def test_another_model_than_was_trained_is_refused_by_what_differs(
    trained: TrainedPolicy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="its chat template differ: name that checkpoint with"):
        write_merged(replace(trained, model=str(other)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_modules_that_the_model_lacks_leaves_no_folder(
    trained: TrainedPolicy, tmp_path: Path
) -> None:
    from safetensors.torch import load

    renamed = {n.replace("layers.3", "layers.9"): t for n, t in load(trained.adapter).items()}
    adapter = save(renamed, manifest_metadata(trained.manifest))
    with pytest.raises(ValueError, match=r"layers\.9\S+, which is no linear of"):
        write_merged(replace(trained, adapter=adapter), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_peft, write_merged])
def test_an_existing_folder_that_is_not_empty_is_left_alone(
    write: Callable[[TrainedPolicy, Path], None], trained: TrainedPolicy, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(trained: TrainedPolicy, tmp_path: Path) -> None:
    write_peft(trained, tmp_path)
    assert read_policy(tmp_path) == trained


def test_the_newest_adapter_of_a_run_counts(trained: TrainedPolicy, tmp_path: Path) -> None:
    """A killed run has no adapter/ folder, or a checkpoint that is newer than it."""
    for name, version in (("adapter", 2), ("checkpoints/step-000003", 3), ("checkpoints/x", 9)):
        policy = trained.manifest.policy.model_copy(update={"version": version})
        manifest = trained.manifest.model_copy(update={"policy": policy})
        tensors = {"base_model.model.x.lora_A.weight": torch.ones(8, 2, dtype=torch.bfloat16)}
        (tmp_path / name).mkdir(parents=True)
        content = save(tensors, manifest_metadata(manifest))
        write_adapter(tmp_path / name, content, manifest, "some/model")
    found = read_policy(tmp_path)
    assert (found.manifest.policy.version, found.model) == (3, "some/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder"), ("", "neither adapter/ nor checkpoints/ with an adapter")],
)
def test_a_folder_without_an_adapter_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_policy(tmp_path / name)
