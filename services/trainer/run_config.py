"""The config of a run: YAML or JSON in, one frozen record out.

The defaults suit LoRA reinforcement learning on models of some billion parameters. A run must name
a dataset, its rewards and `num_steps`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from services.trainer.config_text import parse_config
from shared.adapters import LINEAR_MODULES
from shared.schemas import RunId, SamplingParams


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# PEFT options that a replica cannot serve, and why.
_UNSERVABLE = {
    "use_dora": "rescales every row of a weight, which the rollout engine does not support",
    "modules_to_save": "trains whole modules, which an adapter file cannot hold",
    "rank_pattern": "sets ranks per module, and the engine supports one rank for all",
    "alpha_pattern": "sets factors per module, and the engine supports one factor for all",
    "bias": "trains biases, which an adapter file cannot hold",
    "lora_dropout": "makes the trained policy differ from the policy that sampled",
}


class LoraConfig(Config):
    rank: int = Field(ge=1, le=512, default=32)  # Rank of the adapter on every linear.
    alpha: float = Field(gt=0, default=32.0)  # B·A is multiplied by alpha / rank.
    use_rslora: bool = False  # Multiply by alpha / √rank instead (arXiv:2312.03732).
    # Names of the linear layers that get an adapter.
    target_modules: tuple[str, ...] = Field(min_length=1, default=LINEAR_MODULES)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @model_validator(mode="before")
    @classmethod
    def _is_servable(cls, value: Any) -> Any:
        for name, reason in _UNSERVABLE.items():
            if isinstance(value, Mapping) and value.get(name):
                raise ValueError(f"{name} {reason}: remove it")
        return value


class OptimizerConfig(Config):
    """AdamW. The learning rate rises linearly over `warmup_steps` updates, then stays."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # The 8-bit one takes a quarter of the memory.
    learning_rate: float = Field(gt=0, default=5e-5)  # The rate after warm-up.
    betas: tuple[float, float] = (0.9, 0.99)  # Decay rates of the two moments.
    weight_decay: float = Field(ge=0, default=0.0)  # Decay of the LoRA weights.
    max_grad_norm: float = Field(
        gt=0, default=1.0
    )  # Larger gradients are scaled down to this norm.
    warmup_steps: int = Field(ge=0, default=10)  # Length of the warm-up, in updates.


class KlConfig(Config):
    """KL of the policy from the reference, which is the policy with its adapter off.

    See services/trainer/algorithms/kl.py. With a coefficient of 0 no reference is computed.
    """

    coefficient: float = Field(ge=0, default=0.0)  # Weight of the KL; 0 switches it off.
    estimator: Literal["k1", "k2", "k3"] = "k3"  # Formulas are in docs/algorithms.md.
    place: Literal["loss", "reward"] = "loss"  # Added to the loss, or subtracted from the reward.
    # Multiply the KL in the loss by policy / old, which keeps it unbiased after the first step.
    importance_weighted: bool = True

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.place == "reward"


class RewardKlConfig(KlConfig):
    """The same, with the defaults of algorithms that subtract KL from the reward."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    place: Literal["loss", "reward"] = "reward"


class CorrectionConfig(Config):
    """Importance weights old / sampler, which correct the mismatch of trainer and rollout engine.

    See services/trainer/algorithms/mismatch.py.
    """

    # One weight per token, or per completion: the product over its tokens.
    level: Literal["token", "sequence", "none"] = "token"
    # Weights out of bounds are set to the bound (truncate) or to 0 (mask).
    mode: Literal["truncate", "mask"] = "truncate"
    max_ratio: float = Field(gt=0, default=3.0)  # Upper bound of a weight.
    min_ratio: float | None = Field(ge=0, default=None)  # Lower bound of a weight.
    # Mask completions whose geometric mean ratio is outside, for example [0.99, 1.001].
    geometric_band: tuple[float, float] | None = None
    # Mask completions that have a token with a smaller ratio, for example 1e-4.
    veto_ratio: float | None = Field(gt=0, default=None)

    @model_validator(mode="after")
    def _has_bounds_in_order(self) -> CorrectionConfig:
        if self.min_ratio is not None and not self.min_ratio < self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is not below max_ratio {self.max_ratio}")
        low, high = self.geometric_band or (1.0, 2.0)
        if not 0 < low < high:
            raise ValueError(f"geometric_band [{low}, {high}] must rise, from above 0")
        return self


LossName = Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "rloo"]


class LearningConfig(Config):
    """What the rest of the trainer asks of every algorithm."""

    @property
    def learns_from_pairs(self) -> bool:
        """True for pairs of a dataset or of POST /train instead of groups."""
        return False

    @property
    def compares_within_groups(self) -> bool:
        """True when a group of equal rewards teaches nothing but to stay near the reference."""
        return False

    def is_constant(self, rewards: Sequence[tuple[float, ...]], truncated: Sequence[bool]) -> bool:
        """True when comparing the completions of a group teaches nothing.

        `rewards` are those of each completion, `truncated` whether it ran into max_tokens.
        """
        return len({sum(own) for own in rewards}) == 1


class PolicyGradientConfig(LearningConfig):
    """What GRPO, RLOO, REINFORCE++ and PPO share.

    The losses are in services/trainer/algorithms/losses.py; None takes the value of a loss's paper.
    """

    loss: LossName = "dapo"  # Formulas are in docs/algorithms.md.
    # The ratio that the loss clips: of a token, or of a completion.
    ratio: Literal["token", "sequence", "sequence_product"] | None = None
    clip_low: float | None = Field(
        ge=0, lt=1, default=None
    )  # Ratios below 1 - clip_low are clipped.
    # Ratios above 1 + clip_high are clipped; for cispo it is the largest ratio itself.
    clip_high: float | None = Field(ge=0, default=None)
    delta: float | None = Field(
        gt=1, default=None
    )  # Upper bound of the ratio of tokens with a negative advantage.
    sapo_temperature_positive: float = Field(
        gt=0, default=1.0
    )  # τ of tokens with a positive advantage (sapo).
    sapo_temperature_negative: float = Field(gt=0, default=1.05)  # τ of the other tokens (sapo).
    kl: KlConfig = KlConfig()  # KL from the policy with its adapter off.
    # Correction of what trainer and replica compute differently.
    correction: CorrectionConfig = CorrectionConfig()
    # Weight of the mean entropy in the objective that is maximized.
    entropy_bonus: float = Field(ge=0, default=0.0)
    top_entropy_fraction: float = Field(gt=0, le=1, default=1.0)  # Share of tokens to train on.
    # Drop completions with a negative advantage that became this unlikely, in nats per token.
    off_policy_mask: float | None = Field(ge=0, default=None)
    mask_truncated: bool = False  # Take no loss of completions that ran into max_tokens.
    num_epochs: int = Field(ge=1, default=1)  # Passes over the groups of one update.
    num_minibatches: int = Field(ge=1, default=1)  # Optimizer steps per pass.

    @model_validator(mode="after")
    def _has_only_what_its_loss_uses(self) -> PolicyGradientConfig:
        unused = {"cispo": ("clip_low", "delta"), "sapo": ("clip_low", "clip_high", "delta")}
        for name in unused.get(self.loss, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"loss {self.loss} has no {name}: remove it")
        return self


class GrpoConfig(PolicyGradientConfig):
    """services/trainer/algorithms/grpo.py"""

    name: Literal["grpo"] = "grpo"
    # Divide advantages by the standard deviation of the group or of the batch.
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # With several rewards: add them up before the group is normalized, or after.
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"

    @property
    def compares_within_groups(self) -> bool:
        return True

    @model_validator(mode="before")
    @classmethod
    def _takes_its_former_field(cls, value: Any) -> Any:
        """`importance_clip`, in the configs of runs that began with an older version."""
        if isinstance(value, Mapping) and "importance_clip" in value:
            rest = {name: item for name, item in value.items() if name != "importance_clip"}
            return {"correction": {"max_ratio": value["importance_clip"]}, **rest}
        return value

    def is_constant(self, rewards: Sequence[tuple[float, ...]], truncated: Sequence[bool]) -> bool:
        if self.reward_aggregation == "normalize_then_sum":  # every reward is compared alone
            return len(set(rewards)) == 1
        return super().is_constant(rewards, truncated)

    @model_validator(mode="after")
    def _has_one_place_for_kl(self) -> GrpoConfig:
        if self.reward_aggregation == "normalize_then_sum" and self.kl.in_reward:
            raise ValueError(
                "kl.place reward adds a reward for which normalize_then_sum has no weight: set "
                "kl.place to loss"
            )
        return self


class RlooConfig(PolicyGradientConfig):
    """services/trainer/algorithms/rloo.py"""

    name: Literal["rloo"] = "rloo"
    loss: LossName = "rloo"
    kl: RewardKlConfig = RewardKlConfig()
    whiten_advantages: bool = False  # Scale to mean 0 and deviation 1 over the update.

    @property
    def compares_within_groups(self) -> bool:
        return True


class ReinforceConfig(PolicyGradientConfig):
    """services/trainer/algorithms/reinforce.py; `_baseline` subtracts the mean of the group."""

    name: Literal["reinforce_pp", "reinforce_pp_baseline"] = "reinforce_pp"
    loss: LossName = "bnpo"
    kl: RewardKlConfig = RewardKlConfig()
    discount: float = Field(gt=0, le=1, default=1.0)  # γ per token.
    whiten_advantages: bool = True  # Scale to mean 0 and deviation 1 over the update's tokens.

    @property
    def compares_within_groups(self) -> bool:
        return self.name == "reinforce_pp_baseline"


class PpoConfig(PolicyGradientConfig):
    """services/trainer/algorithms/ppo.py; the critic is a second LoRA adapter with a value head."""

    name: Literal["ppo"] = "ppo"
    loss: LossName = "bnpo"
    kl: RewardKlConfig = RewardKlConfig()
    num_epochs: int = Field(ge=1, default=4)
    discount: float = Field(gt=0, le=1, default=1.0)  # γ per token.
    gae_lambda: float = Field(ge=0, le=1, default=0.95)  # λ of generalized advantage estimation.
    whiten_advantages: bool = True  # Scale to mean 0 and deviation 1 over the update's tokens.
    value_clip: float | None = Field(gt=0, default=0.2)  # How far a value may move in one update.
    critic_learning_rate: float | None = Field(gt=0, default=None)  # None: the optimizer's rate.


class PreferenceConfig(LearningConfig):
    """What online and offline DPO share."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # Formulas are in docs/algorithms.md.
    beta: float = Field(gt=0, default=0.1)  # Strength of the pull towards the reference.
    num_epochs: int = Field(ge=1, default=1)  # Passes over the pairs of one update.
    num_minibatches: int = Field(ge=1, default=1)  # Optimizer steps per pass.


class OnlineDpoConfig(PreferenceConfig):
    """services/trainer/algorithms/dpo.py; a pair is the best and the worst of a group."""

    name: Literal["online_dpo"] = "online_dpo"
    missing_eos_penalty: float = Field(
        ge=0, default=0.0
    )  # Subtracted from the reward of truncated completions.

    @property
    def compares_within_groups(self) -> bool:
        return True

    def is_constant(self, rewards: Sequence[tuple[float, ...]], truncated: Sequence[bool]) -> bool:
        scores = (
            sum(own) - self.missing_eos_penalty * cut
            for own, cut in zip(rewards, truncated, strict=True)
        )
        return len(set(scores)) == 1


class DpoConfig(PreferenceConfig):
    """services/trainer/algorithms/dpo.py; pairs come from the dataset or POST /train."""

    name: Literal["dpo"] = "dpo"

    @property
    def learns_from_pairs(self) -> bool:
        return True


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AlgorithmConfig = Annotated[
    GrpoConfig | RlooConfig | ReinforceConfig | PpoConfig | OnlineDpoConfig | DpoConfig,
    Field(discriminator="name"),
]


class ExactMatchReward(Config):
    """1 when the completion, stripped of white space, equals the prompt's `column`; else 0."""

    type: Literal["exact_match"] = "exact_match"
    column: str = "answer"  # The column with the right answer.
    weight: float = 1.0  # Factor of this reward in the sum.


class RegexReward(Config):
    """1 when `pattern` matches the whole completion (`full`) or occurs in it; else 0."""

    type: Literal["regex"] = "regex"
    pattern: str  # Syntax of Python's `re`; a dot matches newlines as well.
    full: bool = True  # False: the pattern may occur anywhere.
    timeout_s: float = Field(gt=0, default=60.0)  # Time limit for all waiting completions.
    weight: float = 1.0  # Factor of this reward in the sum.


class FunctionReward(Config):
    """A Python function `module:name`, called as `f(prompts, completions, **columns)`; returns one
    float per completion. May be a coroutine function. It runs in a process of its own
    (services/trainer/rewards/process.py)."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[\w.]+:\w+$")  # `module:name`, on the trainer's PYTHONPATH.
    timeout_s: float = Field(gt=0, default=120.0)  # Time limit of the import, and of each call.
    # Memory that its process may allocate; none: no limit.
    max_memory_bytes: int | None = Field(ge=64 << 20, le=1 << 50, default=None)
    weight: float = 1.0  # Factor of this reward in the sum.


class HttpReward(Config):
    """POST {prompts, completions, columns} to `url`; it answers {"rewards": [float, ...]}
    (services/trainer/rewards/service.py)."""

    type: Literal["http"] = "http"
    url: str = Field(pattern=r"^https?://[^/\s]")  # Address of the reward service.
    # Environment variable of the trainer with the bearer token; its name must begin with REWARD_.
    api_key_env: str | None = None
    timeout_s: float = Field(gt=0, default=60.0)  # Time limit of one answer.
    max_outage_s: float = Field(
        ge=0, default=300.0
    )  # How long the run waits for a service that is away.
    # None sends all waiting completions at once.
    max_completions_per_request: int | None = Field(ge=1, default=None)
    max_concurrent_requests: int = Field(ge=1, default=4)  # Applies when completions are split.
    weight: float = 1.0  # Factor of this reward in the sum.

    @property
    def public_url(self) -> str:
        """The URL without its query, which may hold a secret."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()

    @field_validator("url")
    @classmethod
    def _has_no_password(cls, url: str) -> str:
        if "@" in urlsplit(url).netloc:
            raise ValueError(
                "has a user or password in it, which logs would show: remove it, and name the "
                "variable with the service's key in api_key_env"
            )
        return url

    @field_validator("api_key_env")
    @classmethod
    def _is_for_rewards(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"REWARD_\w+", name, re.ASCII):
            raise ValueError(
                "must begin with REWARD_, so that no config can send another secret of the "
                "trainer: put the key of the reward service in such a variable"
            )
        return name


RewardConfig = Annotated[
    ExactMatchReward | RegexReward | FunctionReward | HttpReward, Field(discriminator="type")
]


class SortDigitsDataset(Config):
    """The demo task (services/trainer/data/sort_digits.py), which is generated."""

    type: Literal["sort_digits"] = "sort_digits"
    num_prompts: int = Field(ge=1, default=4096)  # Prompts to generate.


class FileDataset(Config):
    """A JSONL or Parquet file. Rewards get the columns other than `prompt_column`."""

    type: Literal["jsonl", "parquet"]
    path: str  # Path on the trainer's machine.
    prompt_column: str = "prompt"  # The column with a text or a list of chat messages.


class PreferenceDataset(Config):
    """Pairs for `dpo`, from .jsonl or .parquet: a prompt as in `FileDataset`, and two answers.

    An answer is a text, or chat messages of which the last is the assistant's. The tokenizer's EOS
    is appended unless the answer ends with it.
    """

    type: Literal["preferences"]
    path: str  # Path on the trainer's machine.
    prompt_column: str = "prompt"  # The column with a text or a list of chat messages.
    chosen_column: str = "chosen"  # The column with the better answer.
    rejected_column: str = "rejected"  # The column with the worse answer.

    @field_validator("path")
    @classmethod
    def _names_its_format(cls, path: str) -> str:
        if not path.endswith((".jsonl", ".parquet")):
            raise ValueError(f"{path} ends with neither .jsonl nor .parquet: convert it to one")
        return path


PromptDatasetConfig = Annotated[SortDigitsDataset | FileDataset, Field(discriminator="type")]
DatasetConfig = Annotated[
    SortDigitsDataset | FileDataset | PreferenceDataset, Field(discriminator="type")
]


class OverlongConfig(Config):
    """A penalty for long completions, added to the reward in training.

    It grows linearly over the last `buffer_tokens` before `sampling.max_tokens`: see
    overlong_penalty in services/trainer/rewards/scorer.py.
    """

    buffer_tokens: int = Field(ge=1)  # Length of the stretch in which the penalty grows.
    penalty: float = Field(gt=0, default=1.0)  # Penalty at `max_tokens`.


class DynamicSamplingConfig(Config):
    """Replace groups of equal rewards by new ones (services/trainer/run/pacing.py)."""

    # An update samples at most this many times `prompts_per_step` groups, replaced ones included.
    max_groups_factor: float = Field(gt=1, le=1000, default=4.0)


class EvalConfig(Config):
    """Rewards on held-out prompts: before the first step, every `every_steps`, and at the end."""

    dataset: PromptDatasetConfig  # The held-out prompts.
    num_prompts: int = Field(
        ge=1, default=256
    )  # Evaluate the first prompts of the dataset, at most this many.
    every_steps: int = Field(ge=1, default=10)  # Updates between two evaluations.


class ConformanceConfig(Config):
    """What every replica must prove (services/trainer/fleet/conformance.py).

    A gap is the mean |Δlogprob| over the tokens of the probe, in nats.
    """

    num_sequences: int = Field(ge=1, le=64, default=8)  # Sequences in the probe.
    num_tokens: int = Field(ge=8, le=512, default=48)  # Tokens per sequence, at most.
    max_base_gap: float = Field(
        gt=0, default=0.5
    )  # Largest gap between replica and trainer without an adapter.

    @model_validator(mode="after")
    def _is_long_enough_to_judge(self) -> ConformanceConfig:
        if self.num_sequences * self.num_tokens < 96:
            raise ValueError(
                f"{self.num_sequences} sequences of {self.num_tokens} tokens are too few to tell "
                "noise from a wrong policy: choose 96 tokens or more in total"
            )
        return self


class GuardsConfig(Config):
    """What stops an update that would teach the policy from another model's samples.

    services/trainer/learner/stats.py says what is measured, of tokens and completions that were
    sampled by the version that trains. `max_` and `min_` refuse the update and end the run,
    `warn_` only logs; None switches a guard off.
    """

    warn_sampler_kl: float | None = Field(gt=0, default=1e-3)  # Nats per token.
    max_sampler_kl: float | None = Field(gt=0, default=0.02)  # Nats per token.
    warn_probability_factor: float | None = Field(gt=1, default=1.03)  # Mean exp |Δlogprob|.
    # Smallest effective sample size of completions. Off by default, because it shrinks with their
    # length: about e^(-2 · KL · tokens).
    min_sequence_ess: float | None = Field(gt=0, le=1, default=None)
    max_masked_fraction: float | None = Field(
        ge=0, le=1, default=0.2
    )  # Share of tokens whose weight is 0.
    # Bound on the KL that the trainer measures on the first batch, before it learns from it.
    max_handshake_kl: float | None = Field(gt=0, default=5e-3)
    num_handshake_completions: int = Field(
        ge=1, default=32
    )  # Completions of the first batch to score for it.


ProjectName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,127}$")]


class WandbTracking(Config):
    """Weights & Biases (services/trainer/run/tracking.py). `offline` writes `<run_dir>/wandb`, for
    `wandb sync`."""

    type: Literal["wandb"]
    project: ProjectName  # Project at W&B.
    entity: str | None = None  # Team or user; None: the one of the login.
    mode: Literal["online", "offline"] = "online"  # `offline` needs no login.


class TrackioTracking(Config):
    """Trackio (services/trainer/run/tracking.py)."""

    type: Literal["trackio"]
    project: ProjectName  # Project in Trackio.
    space_id: str | None = None  # Hugging Face Space; None: TRACKIO_DIR on this machine.


TrackingConfig = Annotated[WandbTracking | TrackioTracking, Field(discriminator="type")]


class CheckpointConfig(Config):
    """The checkpoints in `<run_dir>/checkpoints`; a run resumes from the newest one."""

    every_steps: int = Field(ge=1, default=10)  # Updates between two checkpoints.
    keep: int = Field(ge=1, default=2)  # Checkpoints to keep.


class RunConfig(Config):
    run_id: RunId | None = None  # None: a new id.
    managed: bool = True  # False: your own loop calls POST /train.
    replace_run: bool = False  # Take replicas over from the run of another trainer.
    resume: Literal["auto", "never"] = "auto"  # `auto` resumes a run_id that exists.
    # Seed of the order of prompts, of sampling and of the initial LoRA weights.
    seed: int = Field(ge=0, lt=2**31, default=0)

    num_steps: int | None = Field(ge=1, default=None)  # Policy updates of the whole run.
    prompts_per_step: int = Field(ge=1, default=32)  # Groups per update; pairs, for dpo.
    sampling: SamplingParams = SamplingParams(n=8, max_tokens=512)  # How completions are sampled.
    dataset: DatasetConfig | None = None  # The prompts, or pairs.
    rewards: tuple[RewardConfig, ...] = ()  # Rewards, added up by their weights.
    overlong: OverlongConfig | None = None  # None: no penalty.
    dynamic_sampling: DynamicSamplingConfig | None = None  # None: keep all groups.
    eval: EvalConfig | None = None  # None: no evaluation.

    lora: LoraConfig = LoraConfig()  # The adapter to train.
    optimizer: OptimizerConfig = OptimizerConfig()  # Optimizer of the LoRA weights.
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(_by_name)] = (
        GrpoConfig()
    )  # A name, or fields.
    max_tokens_per_micro_batch: int = Field(ge=1, default=16384)  # Prompt and completion tokens.

    max_staleness: int = Field(
        ge=0, le=64, default=0
    )  # Versions that a sample may lag; 0 is on-policy.
    # Whether running completions finish under their version or continue under a new one.
    in_flight: Literal["finish", "continue"] = "finish"
    min_ready_replicas: int = Field(
        ge=1, default=1
    )  # Replicas that must hold a version before the run continues.

    conformance: ConformanceConfig = ConformanceConfig()  # What replicas must prove.
    guards: GuardsConfig = GuardsConfig()  # What stops an update.
    checkpoint: CheckpointConfig = CheckpointConfig()  # When to save, and how many to keep.
    tracking: tuple[TrackingConfig, ...] = ()  # Trackers besides TensorBoard and metrics.jsonl.

    # Time limit of a request to the fleet, over all replicas that it visits.
    generate_timeout_s: float = Field(gt=0, default=600.0)
    sync_timeout_s: float = Field(gt=0, default=120.0)  # Time limit of one upload of an adapter.

    @field_validator("tracking")
    @classmethod
    def _has_one_of_a_type(cls, tracking: tuple[TrackingConfig, ...]) -> tuple[TrackingConfig, ...]:
        if len({tracker.type for tracker in tracking}) < len(tracking):
            raise ValueError("two trackers have the same type: remove one")
        return tracking

    def public_settings(self) -> dict[str, Any]:
        """The whole config as JSON, without what may be a secret: for other machines."""
        rewards = (
            reward.model_copy(update={"url": reward.public_url})
            if isinstance(reward, HttpReward)
            else reward
            for reward in self.rewards
        )
        return self.model_copy(update={"rewards": tuple(rewards)}).model_dump(mode="json")

    @property
    def needs_replicas(self) -> bool:
        """False for a run that samples nothing, or samples elsewhere."""
        return self.managed and (not self.algorithm.learns_from_pairs or self.eval is not None)

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """The weights of a completion's rewards, in their order."""
        penalties = (self.overlong.penalty,) if self.overlong else ()
        return (*(reward.weight for reward in self.rewards), *penalties)

    @property
    def max_set_aside(self) -> int:
        """How many constant groups per update dynamic sampling may replace."""
        if self.dynamic_sampling is None:
            return 0
        num_groups = round(self.dynamic_sampling.max_groups_factor * self.prompts_per_step, 6)
        return math.ceil(num_groups) - self.prompts_per_step

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of a completion's rewards: a function by its own name, others by their type."""
        names = (
            reward.path.partition(":")[2] if isinstance(reward, FunctionReward) else reward.type
            for reward in self.rewards
        )
        return (*names, *(("overlong",) if self.overlong else ()))

    @model_validator(mode="after")
    def _has_what_its_loop_needs(self) -> RunConfig:
        loops_own = ("dataset", "rewards", "overlong", "dynamic_sampling", "eval", "num_steps")
        if not self.managed:
            if any(getattr(self, name) for name in loops_own):
                raise ValueError(
                    f"a run with managed: false takes no {', '.join(loops_own[:-1])} or "
                    f"{loops_own[-1]}: remove them, your own loop has them"
                )
            return self
        for name in ("dataset", "rewards", "num_steps"):
            if not getattr(self, name) and (name != "rewards" or self.needs_replicas):
                raise ValueError(f"a managed run needs {name}")
        if self.sampling.seed is not None:
            raise ValueError("sampling.seed is derived from the run's seed: remove it")
        has_pairs = isinstance(self.dataset, PreferenceDataset)
        if self.algorithm.learns_from_pairs and not has_pairs:
            raise ValueError("algorithm dpo learns from pairs: set dataset.type to preferences")
        if has_pairs and not self.algorithm.learns_from_pairs:
            raise ValueError(
                f"algorithm {self.algorithm.name} samples its own completions, and dataset.type "
                "preferences provides them: choose another type, or algorithm dpo"
            )
        return self

    @model_validator(mode="after")
    def _samples_what_it_learns_from(self) -> RunConfig:
        if self.managed and self.algorithm.learns_from_pairs:
            if self.rewards and not self.eval:
                raise ValueError(
                    "algorithm dpo uses rewards in eval only: add eval, or remove them"
                )
            for name in ("overlong", "dynamic_sampling"):
                if getattr(self, name):
                    raise ValueError(f"algorithm dpo samples no completions: remove {name}")
        elif self.managed:
            if obstacles := self.sampling.gradient_obstacles():
                raise ValueError(
                    f"sampling has {', '.join(obstacles)}: a policy gradient needs logprobs of the "
                    "full softmax, so change the temperature only"
                )
            if self.sampling.n < 2 and (
                self.algorithm.compares_within_groups or self.dynamic_sampling
            ):
                raise ValueError(
                    "sampling.n is 1: set it to 2 or more, so that groups can be compared"
                )
        return self

    @model_validator(mode="after")
    def _completions_have_the_bound_that_is_used(self) -> RunConfig:
        max_tokens = self.sampling.max_tokens
        if max_tokens is None and self.algorithm.loss == "dr_grpo":
            raise ValueError("loss dr_grpo divides by sampling.max_tokens: set it")
        if self.overlong and self.overlong.buffer_tokens >= (max_tokens or 0):
            raise ValueError(
                f"overlong.buffer_tokens is {self.overlong.buffer_tokens}, sampling.max_tokens "
                f"{max_tokens or 'not set'}: the buffer must be the shorter one"
            )
        return self


def parse_run_config(text: str | bytes) -> RunConfig:
    """A run config from YAML or JSON. Raises ValueError in one sentence, with the line."""
    return parse_config(text, RunConfig, name="run config")


def dump_run_config(config: RunConfig) -> str:
    """The settings that were given, as YAML that `parse_run_config` reads as the same config."""
    given = config.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def read_run_config(path: Path) -> RunConfig:
    return parse_run_config(path.read_bytes())
