"""The config of a run: YAML or JSON in, one frozen record out; its resolved form is kept.

Defaults are those of LoRA reinforcement learning on models of some billion parameters; what a run
must name is a dataset, its rewards and `num_steps`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from services.trainer.config_text import parse_config
from shared.adapters import LINEAR_MODULES
from shared.schemas import RunId, SamplingParams


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Options of PEFT that an adapter on a replica cannot have.
_UNSERVABLE = {
    "use_dora": "rescales every row of a weight, which the rollout engine does not",
    "modules_to_save": "trains whole modules, which an adapter file does not carry",
    "rank_pattern": "gives modules ranks of their own, the engine has one for all",
    "alpha_pattern": "gives modules factors of their own, the engine has one for all",
    "bias": "trains biases, which an adapter file does not carry",
    "lora_dropout": "makes the policy that trains another one than the policy that sampled",
}


class LoraConfig(Config):
    rank: int = Field(ge=1, le=512, default=32)  # of every linear
    alpha: float = Field(gt=0, default=32.0)  # the factor on B·A is alpha / rank
    use_rslora: bool = False  # the factor is alpha / √rank (arXiv:2312.03732)
    # names of the linears that have an adapter
    target_modules: tuple[str, ...] = Field(min_length=1, default=LINEAR_MODULES)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @model_validator(mode="before")
    @classmethod
    def _is_servable(cls, value: Any) -> Any:
        for name, reason in _UNSERVABLE.items():
            if isinstance(value, Mapping) and value.get(name):
                raise ValueError(f"{name} {reason}: leave it out")
        return value


class OptimizerConfig(Config):
    """AdamW. The learning rate rises linearly over `warmup_steps` updates, then stays."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # 8 bits: a quarter of its memory
    learning_rate: float = Field(gt=0, default=5e-5)  # after warm-up
    betas: tuple[float, float] = (0.9, 0.99)  # decay of the two moments
    weight_decay: float = Field(ge=0, default=0.0)  # of the LoRA weights
    max_grad_norm: float = Field(gt=0, default=1.0)  # gradients above are scaled down to it
    warmup_steps: int = Field(ge=0, default=10)  # updates, from 0 on


class KlConfig(Config):
    """KL of the policy from the reference, which is the policy with its adapter off.

    services/trainer/algorithms/kl.py; a coefficient of 0 computes no reference and costs nothing.
    """

    coefficient: float = Field(ge=0, default=0.0)  # times the KL; 0 is off
    estimator: Literal["k1", "k2", "k3"] = "k3"  # docs/algorithms.md has the formulas
    place: Literal["loss", "reward"] = "loss"  # added to the loss, or taken off the reward
    importance_weighted: bool = True  # in the loss: times policy / old, unbiased after the 1st step

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.place == "reward"


class RewardKlConfig(KlConfig):
    """The same with the defaults of algorithms that take KL off the reward."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    place: Literal["loss", "reward"] = "reward"


class CorrectionConfig(Config):
    """Importance weights old / sampler against the mismatch of trainer and rollout engine.

    services/trainer/algorithms/mismatch.py. `truncate` bounds a weight, `mask` makes one out of
    bounds 0; at sequence level a weight is the product over the tokens of a completion.
    """

    level: Literal["token", "sequence", "none"] = "token"  # what one weight is of
    mode: Literal["truncate", "mask"] = "truncate"  # of weights out of bounds
    max_ratio: float = Field(gt=0, default=3.0)  # the upper bound
    min_ratio: float | None = Field(ge=0, default=None)  # the lower bound
    # Completions whose geometric mean ratio is outside are masked, as (0.99, 1.001).
    geometric_band: tuple[float, float] | None = None
    # Completions with a token whose ratio is below are masked, as 1e-4.
    veto_ratio: float | None = Field(gt=0, default=None)

    @model_validator(mode="after")
    def _has_bounds_in_order(self) -> CorrectionConfig:
        if self.min_ratio is not None and not self.min_ratio < self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is not below max_ratio {self.max_ratio}")
        low, high = self.geometric_band or (1.0, 2.0)
        if not 0 < low < high:
            raise ValueError(f"geometric_band [{low}, {high}] is no band of ratios above 0")
        return self


LossName = Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "rloo"]


class LearningConfig(Config):
    """What every algorithm says of itself."""

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
    """What GRPO, RLOO, REINFORCE++ and PPO share; services/trainer/algorithms/losses.py has the
    losses. None is the value of the loss's paper."""

    loss: LossName = "dapo"  # docs/algorithms.md has the formulas
    # what the loss clips: of a token, or of a completion
    ratio: Literal["token", "sequence", "sequence_product"] | None = None
    clip_low: float | None = Field(ge=0, lt=1, default=None)  # a ratio below 1 - this is clipped
    clip_high: float | None = Field(ge=0, default=None)  # cispo: the largest ratio itself
    delta: float | None = Field(gt=1, default=None)  # bounds the ratio of bad tokens, too
    sapo_temperature_positive: float = Field(gt=0, default=1.0)  # sapo: τ of good tokens
    sapo_temperature_negative: float = Field(gt=0, default=1.05)  # sapo: τ of bad ones
    kl: KlConfig = KlConfig()  # to the policy without its adapter
    # for what trainer and replica compute differently
    correction: CorrectionConfig = CorrectionConfig()
    # times the mean entropy, added to what is maximized
    entropy_bonus: float = Field(ge=0, default=0.0)
    top_entropy_fraction: float = Field(gt=0, le=1, default=1.0)  # of tokens, that are trained on
    off_policy_mask: float | None = Field(ge=0, default=None)  # nats; drops bad, unlikely ones
    mask_truncated: bool = False  # completions that ran into max_tokens have no loss
    num_epochs: int = Field(ge=1, default=1)  # passes over the groups of one update
    num_minibatches: int = Field(ge=1, default=1)  # optimizer steps per pass

    @model_validator(mode="after")
    def _has_only_what_its_loss_uses(self) -> PolicyGradientConfig:
        unused = {"cispo": ("clip_low", "delta"), "sapo": ("clip_low", "clip_high", "delta")}
        for name in unused.get(self.loss, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"loss {self.loss} has no {name}: leave it out")
        return self


class GrpoConfig(PolicyGradientConfig):
    """services/trainer/algorithms/grpo.py"""

    name: Literal["grpo"] = "grpo"
    # by whose deviation advantages are divided
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # several rewards: weigh and add them before the group is normalized, or after
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"

    @property
    def compares_within_groups(self) -> bool:
        return True

    @model_validator(mode="before")
    @classmethod
    def _takes_its_former_field(cls, value: Any) -> Any:
        """`importance_clip`, of runs begun before there were other corrections."""
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
                "kl.place reward is one reward, which normalize_then_sum has no weight for: set "
                "kl.place to loss"
            )
        return self


class RlooConfig(PolicyGradientConfig):
    """services/trainer/algorithms/rloo.py"""

    name: Literal["rloo"] = "rloo"
    loss: LossName = "rloo"
    kl: RewardKlConfig = RewardKlConfig()
    whiten_advantages: bool = False  # to mean 0 and deviation 1 over the update

    @property
    def compares_within_groups(self) -> bool:
        return True


class ReinforceConfig(PolicyGradientConfig):
    """services/trainer/algorithms/reinforce.py; `_baseline` subtracts the mean of the group."""

    name: Literal["reinforce_pp", "reinforce_pp_baseline"] = "reinforce_pp"
    loss: LossName = "bnpo"
    kl: RewardKlConfig = RewardKlConfig()
    discount: float = Field(gt=0, le=1, default=1.0)  # γ, per token
    whiten_advantages: bool = True  # to mean 0 and deviation 1 over the tokens of the update

    @property
    def compares_within_groups(self) -> bool:
        return self.name == "reinforce_pp_baseline"


class PpoConfig(PolicyGradientConfig):
    """services/trainer/algorithms/ppo.py; the critic is a second LoRA adapter with a value head."""

    name: Literal["ppo"] = "ppo"
    loss: LossName = "bnpo"
    kl: RewardKlConfig = RewardKlConfig()
    num_epochs: int = Field(ge=1, default=4)
    discount: float = Field(gt=0, le=1, default=1.0)  # γ, per token
    gae_lambda: float = Field(ge=0, le=1, default=0.95)  # λ of generalized advantage estimation
    whiten_advantages: bool = True  # to mean 0 and deviation 1 over the tokens of the update
    value_clip: float | None = Field(gt=0, default=0.2)  # how far a value may move in one update
    critic_learning_rate: float | None = Field(gt=0, default=None)  # None: the optimizer's


class PreferenceConfig(LearningConfig):
    """What online and offline DPO share."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # docs/algorithms.md has the formulas
    beta: float = Field(gt=0, default=0.1)  # how strongly the reference holds
    num_epochs: int = Field(ge=1, default=1)  # passes over the pairs of one update
    num_minibatches: int = Field(ge=1, default=1)  # optimizer steps per pass


class OnlineDpoConfig(PreferenceConfig):
    """services/trainer/algorithms/dpo.py; a pair is the best and the worst of a group."""

    name: Literal["online_dpo"] = "online_dpo"
    missing_eos_penalty: float = Field(ge=0, default=0.0)  # off the reward of truncated ones

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
    """1 when the completion, stripped, equals the `column` of its prompt; else 0."""

    type: Literal["exact_match"] = "exact_match"
    column: str = "answer"  # holds the right answer
    weight: float = 1.0  # times the reward, in the sum


class RegexReward(Config):
    """1 when `pattern` matches the whole completion (`full`) or occurs in it; else 0."""

    type: Literal["regex"] = "regex"
    pattern: str  # of Python's re; a dot matches newlines, too
    full: bool = True  # False: it may occur anywhere
    timeout_s: float = Field(gt=0, default=60.0)  # for all completions that wait
    weight: float = 1.0  # times the reward, in the sum


class FunctionReward(Config):
    """A Python function `module:name`, called as `f(prompts, completions, **columns)`; returns one
    float per completion. May be a coroutine function. It runs in a process of its own
    (services/trainer/rewards/process.py)."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[\w.]+:\w+$")  # module:name, on the trainer's PYTHONPATH
    timeout_s: float = Field(gt=0, default=120.0)  # for its import, and for every call
    weight: float = 1.0  # times the reward, in the sum


class HttpReward(Config):
    """POST {prompts, completions, columns} to `url`; it answers {"rewards": [float, ...]}
    (services/trainer/rewards/service.py)."""

    type: Literal["http"] = "http"
    url: str = Field(pattern=r"^https?://[^/\s]")  # of the service that scores
    # the trainer's environment variable with its bearer token; its name begins with REWARD_
    api_key_env: str | None = None
    timeout_s: float = Field(gt=0, default=60.0)  # for one answer
    max_outage_s: float = Field(ge=0, default=300.0)  # how long the run waits while it is away
    max_completions_per_request: int | None = Field(ge=1, default=None)  # None: all that wait
    max_concurrent_requests: int = Field(ge=1, default=4)  # when there are several
    weight: float = 1.0  # times the reward, in the sum

    @property
    def public_url(self) -> str:
        """Without its query, which may hold a secret."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()

    @field_validator("url")
    @classmethod
    def _has_no_password(cls, url: str) -> str:
        if "@" in urlsplit(url).netloc:
            raise ValueError(
                "has a user or password in it, which logs would show: leave it out, and name the "
                "variable with the service's key in api_key_env"
            )
        return url

    @field_validator("api_key_env")
    @classmethod
    def _is_for_rewards(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"REWARD_\w+", name, re.ASCII):
            raise ValueError(
                "must begin with REWARD_, so that no config sends another secret of the trainer's: "
                "put the key of the reward service in such a variable"
            )
        return name


RewardConfig = Annotated[
    ExactMatchReward | RegexReward | FunctionReward | HttpReward, Field(discriminator="type")
]


class SortDigitsDataset(Config):
    """The demo task (services/trainer/data/sort_digits.py); generated, no files."""

    type: Literal["sort_digits"] = "sort_digits"
    num_prompts: int = Field(ge=1, default=4096)  # how many are generated


class FileDataset(Config):
    """JSONL or Parquet. `prompt_column` holds a text or a list of chat messages; the other columns
    go to the rewards."""

    type: Literal["jsonl", "parquet"]
    path: str  # on the trainer's machine
    prompt_column: str = "prompt"  # its name


class PreferenceDataset(Config):
    """Pairs for `dpo`, from .jsonl or .parquet: a prompt as in `FileDataset`, and two answers.

    An answer is a text, or chat messages of which the last is the assistant's; the tokenizer's EOS
    is appended to one that does not end with it.
    """

    type: Literal["preferences"]
    path: str  # on the trainer's machine
    prompt_column: str = "prompt"  # its name
    chosen_column: str = "chosen"  # the better answer
    rejected_column: str = "rejected"  # the worse one

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
    """One more reward, for training: down to -`penalty` over the last `buffer_tokens` before
    `sampling.max_tokens` (services/trainer/rewards/scorer.py)."""

    buffer_tokens: int = Field(ge=1)  # before max_tokens, in which it grows
    penalty: float = Field(gt=0, default=1.0)  # of a completion of max_tokens


class DynamicSamplingConfig(Config):
    """Groups of equal rewards are set aside and others sampled in their place, until an update has
    seen `max_groups_factor` times `prompts_per_step` groups (services/trainer/run/pacing.py)."""

    # bounds the groups of an update, set aside ones included
    max_groups_factor: float = Field(gt=1, le=1000, default=4.0)


class EvalConfig(Config):
    """Rewards on held-out prompts: before the first step, every `every_steps`, and at the end."""

    dataset: PromptDatasetConfig  # of held-out prompts
    num_prompts: int = Field(ge=1, default=256)  # the first ones
    every_steps: int = Field(ge=1, default=10)  # updates between two evaluations


class ConformanceConfig(Config):
    """What every replica must prove (services/trainer/fleet/conformance.py).

    A gap is the mean |Δlogprob| over the tokens of the probe, in nats.
    """

    num_sequences: int = Field(ge=1, le=64, default=8)  # of the probe
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

    services/trainer/learner/stats.py says what is measured, of tokens and completions that were
    sampled by the version that trains. `max_` and `min_` refuse the update and end the run,
    `warn_` only logs; None switches a guard off.
    """

    warn_sampler_kl: float | None = Field(gt=0, default=1e-3)  # nats per token
    max_sampler_kl: float | None = Field(gt=0, default=0.02)  # nats per token
    warn_probability_factor: float | None = Field(gt=1, default=1.03)  # mean exp |Δlogprob|
    # The least effective sample size of completions; off, because it shrinks as they get longer:
    # about e^(-2 · KL · tokens).
    min_sequence_ess: float | None = Field(gt=0, le=1, default=None)
    max_masked_fraction: float | None = Field(ge=0, le=1, default=0.2)  # of the tokens
    # Completions of the first batch are scored by the trainer before it learns from them.
    max_handshake_kl: float | None = Field(gt=0, default=5e-3)
    num_handshake_completions: int = Field(ge=1, default=32)  # how many of them


ProjectName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,127}$")]


class WandbTracking(Config):
    """Weights & Biases (services/trainer/run/tracking.py). `offline` writes `<run_dir>/wandb`, for
    `wandb sync`."""

    type: Literal["wandb"]
    project: ProjectName  # at W&B
    entity: str | None = None  # the team or user; default: that of the login
    mode: Literal["online", "offline"] = "online"  # offline needs no login


class TrackioTracking(Config):
    """Trackio (services/trainer/run/tracking.py)."""

    type: Literal["trackio"]
    project: ProjectName  # in Trackio
    space_id: str | None = None  # a Hugging Face Space; default: TRACKIO_DIR on this machine


TrackingConfig = Annotated[WandbTracking | TrackioTracking, Field(discriminator="type")]


class CheckpointConfig(Config):
    """What `<run_dir>/checkpoints` holds; a run resumes from the newest one."""

    every_steps: int = Field(ge=1, default=10)  # updates between two checkpoints
    keep: int = Field(ge=1, default=2)  # the newest ones


class RunConfig(Config):
    run_id: RunId | None = None  # default: a new one
    managed: bool = True  # False: the loop is yours, through POST /train
    replace_run: bool = False  # take replicas over from a run of another trainer
    resume: Literal["auto", "never"] = "auto"  # auto: a run_id that exists goes on where it was
    # of prompts' order, sampling and LoRA's first weights
    seed: int = Field(ge=0, lt=2**31, default=0)

    num_steps: int | None = Field(ge=1, default=None)  # policy updates in all
    prompts_per_step: int = Field(ge=1, default=32)  # groups of one update; pairs, for dpo
    sampling: SamplingParams = SamplingParams(n=8, max_tokens=512)  # of the completions
    dataset: DatasetConfig | None = None  # the prompts, or pairs
    rewards: tuple[RewardConfig, ...] = ()  # added up by their weights
    overlong: OverlongConfig | None = None  # off without it
    dynamic_sampling: DynamicSamplingConfig | None = None  # off without it
    eval: EvalConfig | None = None  # off without it

    lora: LoraConfig = LoraConfig()  # the adapter that is trained
    optimizer: OptimizerConfig = OptimizerConfig()  # of the LoRA weights
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(_by_name)] = GrpoConfig()  # or its name
    max_tokens_per_micro_batch: int = Field(ge=1, default=16384)  # prompts + completions

    max_staleness: int = Field(ge=0, le=64, default=0)  # versions; 0 is on-policy
    in_flight: Literal["finish", "continue"] = "finish"  # completions that run when a version comes
    min_ready_replicas: int = Field(ge=1, default=1)  # that must hold a version to go on

    conformance: ConformanceConfig = ConformanceConfig()  # of replicas
    guards: GuardsConfig = GuardsConfig()  # of updates
    checkpoint: CheckpointConfig = CheckpointConfig()  # when, and how many
    tracking: tuple[TrackingConfig, ...] = ()  # beside TensorBoard and metrics.jsonl

    # for a request to the fleet, replicas that come and go included
    generate_timeout_s: float = Field(gt=0, default=600.0)
    sync_timeout_s: float = Field(gt=0, default=120.0)  # for one upload of an adapter

    @field_validator("tracking")
    @classmethod
    def _has_one_of_a_type(cls, tracking: tuple[TrackingConfig, ...]) -> tuple[TrackingConfig, ...]:
        if len({tracker.type for tracker in tracking}) < len(tracking):
            raise ValueError("two trackers have the same type: leave one out")
        return tracking

    def public_settings(self) -> dict[str, Any]:
        """All of them, for other machines: JSON without what may be a secret."""
        rewards = (
            reward.model_copy(update={"url": reward.public_url})
            if isinstance(reward, HttpReward)
            else reward
            for reward in self.rewards
        )
        return self.model_copy(update={"rewards": tuple(rewards)}).model_dump(mode="json")

    @property
    def needs_replicas(self) -> bool:
        """False for a run that samples nothing, or elsewhere."""
        return self.managed and (not self.algorithm.learns_from_pairs or self.eval is not None)

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """Of the rewards that a completion is scored with, in their order."""
        penalties = (self.overlong.penalty,) if self.overlong else ()
        return (*(reward.weight for reward in self.rewards), *penalties)

    @property
    def max_set_aside(self) -> int:
        """Constant groups per update that dynamic sampling replaces."""
        if self.dynamic_sampling is None:
            return 0
        num_groups = round(self.dynamic_sampling.max_groups_factor * self.prompts_per_step, 6)
        return math.ceil(num_groups) - self.prompts_per_step

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Of the same, for people: a function by its own name, others by their type."""
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
                    f"a run with managed: false has no {', '.join(loops_own[:-1])} or "
                    f"{loops_own[-1]}: they are your loop's"
                )
            return self
        for name in ("dataset", "rewards", "num_steps"):
            if not getattr(self, name) and (name != "rewards" or self.needs_replicas):
                raise ValueError(f"a managed run needs {name}")
        if self.sampling.seed is not None:
            raise ValueError("sampling.seed is derived from the run's seed: leave it out")
        has_pairs = isinstance(self.dataset, PreferenceDataset)
        if self.algorithm.learns_from_pairs and not has_pairs:
            raise ValueError("algorithm dpo learns from pairs: set dataset.type to preferences")
        if has_pairs and not self.algorithm.learns_from_pairs:
            raise ValueError(
                f"algorithm {self.algorithm.name} samples completions itself, dataset.type "
                "preferences has them: choose another type, or algorithm dpo"
            )
        return self

    @model_validator(mode="after")
    def _samples_what_it_learns_from(self) -> RunConfig:
        if self.managed and self.algorithm.learns_from_pairs:
            if self.rewards and not self.eval:
                raise ValueError("rewards without eval are of no use to algorithm dpo: add eval")
            for name in ("overlong", "dynamic_sampling"):
                if getattr(self, name):
                    raise ValueError(f"algorithm dpo samples no completions: leave {name} out")
        elif self.managed:
            if obstacles := self.sampling.gradient_obstacles():
                raise ValueError(
                    f"sampling has {', '.join(obstacles)}: a policy gradient needs logprobs of the "
                    "full softmax, so only the temperature may change"
                )
            if self.sampling.n < 2 and (
                self.algorithm.compares_within_groups or self.dynamic_sampling
            ):
                raise ValueError("sampling.n is 1: a group needs at least 2 completions to compare")
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
    """The settings that were given, as YAML, of which `parse_run_config` makes the same run."""
    given = config.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def read_run_config(path: Path) -> RunConfig:
    return parse_run_config(path.read_bytes())
