"""The config of a run: YAML or JSON in, one frozen record out; its resolved form is kept.

Defaults are those of LoRA reinforcement learning on models of some billion parameters; what a run
must name is a dataset, its rewards and `num_steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.adapters import LINEAR_MODULES
from shared.schemas import RunId, SamplingParams


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraConfig(Config):
    rank: int = Field(ge=1, le=512, default=32)
    alpha: float = Field(gt=0, default=32.0)  # the factor on B·A is alpha / rank
    target_modules: tuple[str, ...] = Field(min_length=1, default=LINEAR_MODULES)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class OptimizerConfig(Config):
    """AdamW. The learning rate rises linearly over `warmup_steps` updates, then stays."""

    learning_rate: float = Field(gt=0, default=5e-5)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(ge=0, default=0.0)
    max_grad_norm: float = Field(gt=0, default=1.0)
    warmup_steps: int = Field(ge=0, default=10)


class GrpoConfig(Config):
    """services/trainer/algorithms/grpo.py"""

    name: Literal["grpo"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    clip_low: float = Field(ge=0, lt=1, default=0.2)
    clip_high: float = Field(ge=0, default=0.28)
    importance_clip: float = Field(gt=0, default=3.0)  # truncates policy / sampler per token
    num_epochs: int = Field(ge=1, default=1)  # passes over the groups of one update
    num_minibatches: int = Field(ge=1, default=1)  # optimizer steps per pass


class ExactMatchReward(Config):
    """1 when the completion, stripped, equals the `column` of its prompt; else 0."""

    type: Literal["exact_match"] = "exact_match"
    column: str = "answer"
    weight: float = 1.0


class RegexReward(Config):
    """1 when `pattern` matches the whole completion (`full`) or occurs in it; else 0."""

    type: Literal["regex"] = "regex"
    pattern: str
    full: bool = True
    weight: float = 1.0


class FunctionReward(Config):
    """A Python function `module:name`, called as `f(prompts, completions, **columns)`; returns one
    float per completion. May be a coroutine function."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[\w.]+:\w+$")
    timeout_s: float = Field(gt=0, default=600.0)
    weight: float = 1.0


class HttpReward(Config):
    """POST {prompts, completions, columns} to `url`; it answers {"rewards": [float, ...]}."""

    type: Literal["http"] = "http"
    url: str = Field(pattern=r"^https?://")
    timeout_s: float = Field(gt=0, default=60.0)
    max_attempts: int = Field(ge=1, default=3)
    weight: float = 1.0


RewardConfig = Annotated[
    ExactMatchReward | RegexReward | FunctionReward | HttpReward, Field(discriminator="type")
]


class SortDigitsDataset(Config):
    """The demo task (services/trainer/sort_digits.py); generated, no files."""

    type: Literal["sort_digits"] = "sort_digits"
    num_prompts: int = Field(ge=1, default=4096)


class FileDataset(Config):
    """JSONL or Parquet. `prompt_column` holds a text or a list of chat messages; the other columns
    go to the rewards."""

    type: Literal["jsonl", "parquet"]
    path: str
    prompt_column: str = "prompt"


DatasetConfig = Annotated[SortDigitsDataset | FileDataset, Field(discriminator="type")]


class EvalConfig(Config):
    """Rewards on held-out prompts: before the first step, every `every_steps`, and at the end."""

    dataset: DatasetConfig
    num_prompts: int = Field(ge=1, default=256)
    every_steps: int = Field(ge=1, default=10)


class ConformanceConfig(Config):
    """What a replica is held to (services/trainer/conformance.py). Gaps are mean |Δlogprob| on the
    probe, in nats."""

    num_sequences: int = Field(ge=1, le=64, default=8)
    num_tokens: int = Field(ge=8, le=512, default=48)  # of each, at most
    max_base_gap: float = Field(gt=0, default=0.5)  # replica to trainer, without an adapter

    @model_validator(mode="after")
    def _is_long_enough_to_judge(self) -> ConformanceConfig:
        if self.num_sequences * self.num_tokens < 96:
            raise ValueError(
                f"{self.num_sequences} sequences of {self.num_tokens} tokens are too few to tell "
                "noise from a wrong policy: make them 96 tokens or more"
            )
        return self


class GuardsConfig(Config):
    """What stops an update that would teach the policy from another model's samples.

    services/trainer/stats.py says what is measured, of tokens and completions that the version
    which trains has sampled. `max_` and `min_` refuse the update and end the run, `warn_` only
    says so; None switches a guard off.
    """

    warn_sampler_kl: float | None = Field(gt=0, default=1e-3)  # nats per token
    max_sampler_kl: float | None = Field(gt=0, default=0.02)
    warn_probability_factor: float | None = Field(gt=1, default=1.03)  # mean exp |Δlogprob|
    min_sequence_ess: float | None = Field(gt=0, le=1, default=0.5)
    max_masked_fraction: float | None = Field(ge=0, le=1, default=0.2)  # of the tokens
    # Completions of the first batch are scored by the trainer before it learns from them.
    max_handshake_kl: float | None = Field(gt=0, default=5e-3)
    num_handshake_completions: int = Field(ge=1, default=32)


class CheckpointConfig(Config):
    """What `<run_dir>/checkpoints` holds; a run resumes from the newest one."""

    every_steps: int = Field(ge=1, default=10)
    keep: int = Field(ge=1, default=2)


class RunConfig(Config):
    run_id: RunId | None = None  # default: a new one
    managed: bool = True  # False: the loop is yours, through POST /train
    replace_run: bool = False  # take replicas over from a run of another trainer
    resume: Literal["auto", "never"] = "auto"  # auto: a run_id that exists goes on where it was
    seed: int = Field(ge=0, lt=2**31, default=0)

    num_steps: int | None = Field(ge=1, default=None)
    prompts_per_step: int = Field(ge=1, default=32)
    sampling: SamplingParams = SamplingParams(n=8, max_tokens=512)
    dataset: DatasetConfig | None = None
    rewards: tuple[RewardConfig, ...] = ()
    eval: EvalConfig | None = None

    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    algorithm: GrpoConfig = GrpoConfig()
    max_tokens_per_micro_batch: int = Field(ge=1, default=16384)  # padded prompt + completion

    max_staleness: int = Field(ge=0, le=64, default=0)  # versions; 0 is on-policy
    in_flight: Literal["finish", "continue"] = "finish"  # completions that run when a version comes
    min_ready_replicas: int = Field(ge=1, default=1)  # that must hold a version to go on

    conformance: ConformanceConfig = ConformanceConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    generate_timeout_s: float = Field(gt=0, default=600.0)
    sync_timeout_s: float = Field(gt=0, default=120.0)

    @model_validator(mode="after")
    def _a_managed_run_is_complete(self) -> RunConfig:
        if not self.managed:
            if self.dataset or self.rewards or self.eval or self.num_steps:
                raise ValueError(
                    "a run with managed: false has no dataset, rewards, eval or num_steps: they "
                    "are your loop's"
                )
            return self
        for name in ("dataset", "rewards", "num_steps"):
            if not getattr(self, name):
                raise ValueError(f"a managed run needs {name}")
        if obstacles := self.sampling.gradient_obstacles():
            raise ValueError(
                f"sampling has {', '.join(obstacles)}: a policy gradient needs logprobs of the "
                "full softmax, so only the temperature may change"
            )
        if self.sampling.seed is not None:
            raise ValueError("sampling.seed is derived from the run's seed: leave it out")
        if self.sampling.n < 2:
            raise ValueError("sampling.n is 1: a group needs at least 2 completions to compare")
        return self


def parse_run_config(text: str | bytes) -> RunConfig:
    """A run config from YAML, of which JSON is a subset. Raises ValueError in one sentence."""
    try:
        value: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"the run config is neither YAML nor JSON: {problem}") from error
    if not isinstance(value, Mapping):
        raise ValueError("the run config must be a mapping of settings")
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "run config"
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"unknown field {field!r}: the fields are in services/trainer/run_config.py"
            ) from error
        raise ValueError(f"{field}: {first['msg'].removeprefix('Value error, ')}") from error


def read_run_config(path: Path) -> RunConfig:
    return parse_run_config(path.read_bytes())
