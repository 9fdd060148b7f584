"""The policy that trains: a 4-bit base, LoRA on its linears, AdamW; update() and publish().

    start(run)   fresh LoRA (B = 0) on the loaded base: version 0
    update()     samples -> optimizer steps -> the next version
    publish()    the adapter file of the current version, as bytes

LoRA weights are float32 masters computed with in bfloat16, as the replicas serve them. Methods that
are `mirrored` are called on every GPU that trains (parallel.py).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.base_model import quantized_load_options, resolve_checkpoint
from services.tokens import PromptEncoder
from services.trainer.algorithms.grpo import MAX_LOG_RATIO, PolicyLoss, clipped_policy_loss
from services.trainer.logprobs import TokenLogprobs, token_logprobs
from services.trainer.parallel import Ranks, mirrored
from services.trainer.run_config import GrpoConfig, LoraConfig, OptimizerConfig
from services.trainer.samples import Sample, TokenBatch, collate, micro_batches
from shared.adapters import LINEAR_MODULES, content_digest, manifest_metadata
from shared.checkpoints import base_identity
from shared.errors import NotFound
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId, QuantizationRecipe

log = logging.getLogger(__name__)
_SCORE_POSITIONS = 8192  # padded, of one forward of `score`


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    manifest: AdapterManifest
    content: bytes  # the adapter file
    content_digest: str  # RFC 9530
    probe_logprobs: tuple[float, ...] = ()  # of the run's probe (conformance.py), if it has one

    @property
    def policy(self) -> PolicyId:
        return self.manifest.policy


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Means over the tokens of one update; see StepRecord for the meanings."""

    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    clip_fraction: float
    importance_weight_mean: float
    importance_truncated_fraction: float
    logprob_gap: float
    sampler_kl: float


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """Everything an update depends on besides its samples, on the CPU."""

    manifest: AdapterManifest
    lora: Mapping[str, Tensor]  # float32, by name in the adapter file
    optimizer: dict[str, Any]  # torch's state dict
    num_updates: int
    rng: Mapping[str, Tensor]  # torch's generators, by device type


@dataclass(slots=True)
class _Sums:
    """Sums over tokens, to be divided once at the end of an update."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def mean(self, name: str, count: str) -> float:
        return self.values.get(name, 0.0) / max(self.values.get(count, 0.0), 1.0)


class Policy:
    """One base, and at most one run's LoRA and optimizer on it. Not thread-safe."""

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        identity: BaseIdentity,
        device: torch.device,
        *,
        source: str = "",
        kept_adapters: int = 2,
        compute_dtype: torch.dtype = torch.bfloat16,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.source = source
        self.encoder = encoder
        self.identity = identity
        self.device = device
        self._compute_dtype = compute_dtype
        self._kept_adapters = kept_adapters
        self._base = model
        self.model: Any = None
        self._id: PolicyId | None = None
        self._lora = LoraConfig()
        self._optimizer_config = OptimizerConfig()
        self._optimizer: torch.optim.Optimizer | None = None
        self._num_updates = 0
        self._published: dict[int, PublishedAdapter] = {}
        self._probe: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str,
        load_in_4bit: bool = True,
        gradient_checkpointing: bool = True,
        kept_adapters: int = 2,
    ) -> Policy:
        """Load the base from a checkpoint folder or hub id. Raises ValueError for an unfit one.

        With several ranks every one of them calls it, and none goes on when one cannot.
        """
        from transformers import AutoModelForCausalLM

        ranks = Ranks.join(device)
        device = ranks.device(device)
        with ranks.agreed():
            source = resolve_checkpoint(model)
            options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}}
            if load_in_4bit:
                options = quantized_load_options(source, device)
            base = AutoModelForCausalLM.from_pretrained(source, **options)
            _refuse_scaled_logits(base.config)
            _keep_linears_differentiable(base)
            base.requires_grad_(False)
            if gradient_checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            identity = base_identity(source, QuantizationRecipe() if load_in_4bit else None)
            encoder = PromptEncoder.load(source)
        return cls(
            base,
            encoder,
            identity,
            torch.device(device),
            source=model,
            kept_adapters=kept_adapters,
            ranks=ranks,
        )

    # --- identity -------------------------------------------------------------------------------

    @property
    def id(self) -> PolicyId:
        assert self._id is not None, "no run was started"
        return self._id

    @property
    def has_run(self) -> bool:
        return self._id is not None

    @property
    def lora(self) -> LoraConfig:
        return self._lora

    @property
    def max_positions(self) -> int:
        return int(self._base.config.get_text_config().max_position_embeddings)

    @mirrored
    def start(
        self, policy: PolicyId, lora: LoraConfig, optimizer: OptimizerConfig, *, seed: int
    ) -> None:
        """Begin a run at `policy` (version 0) with a fresh adapter; the last run's is dropped.

        Raises ValueError for a config that does not fit the base; the last run's then stays.
        """
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        self._refuse_missing(lora.target_modules)
        if self.model is not None:
            self._base = self.model.unload()
        torch.manual_seed(seed)
        self.model = get_peft_model(
            self._base,
            PeftLoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=list(lora.target_modules),
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
        self.model.train()  # without it gradient checkpointing is silently off
        self._id, self._lora, self._optimizer_config = policy, lora, optimizer
        self._optimizer = torch.optim.AdamW(
            self._trainable(), betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self._num_updates = 0
        self._published = {}
        self._probe = ()

    def _refuse_missing(self, target_modules: Sequence[str]) -> None:
        """PEFT skips a target that the base does not have; replicas would refuse the adapter."""
        leaves = {name.rpartition(".")[2] for name, _ in self._base.named_modules()}
        servable = [name for name in LINEAR_MODULES if name in leaves]
        if missing := [name for name in target_modules if name not in servable]:
            raise ValueError(
                f"lora.target_modules has {', '.join(missing)}, this model has no such linear: "
                f"choose from {', '.join(servable)}"
            )

    def _trainable(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def fingerprint(self) -> list[int]:
        """A number per LoRA tensor, of all its bits: equal weights have equal ones."""
        bits = [p.detach().view(torch.int32).sum() for p in self._trainable()]
        return [int(number) for number in torch.stack(bits).tolist()]

    # --- forward --------------------------------------------------------------------------------

    def logprobs(self, batch: TokenBatch) -> TokenLogprobs:
        """Logprobs and entropies [N] of the batch's completion tokens under the current policy."""
        causal_lm = self.model.get_base_model()
        head = causal_lm.get_output_embeddings()
        half = self._compute_dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=half):
            hidden = causal_lm.get_decoder()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state  # [B, T, H]
        return token_logprobs(
            hidden[batch.predicts],
            head.weight,
            batch.labels,
            batch.temperatures,
            head_bias=getattr(head, "bias", None),
        )

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, the policy is the base: version 0."""
        with self.model.disable_adapter():
            yield

    # --- score ----------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]], *, base: bool = False) -> tuple[float, ...]:
        """Logprobs at temperature 1 of every token after the first, sequence by sequence, flat.

        Computed as training computes them, in train mode. `base`: with the adapter off.
        """
        samples = [_unsampled(sequence) for sequence in sequences]
        scored: dict[int, list[float]] = {}
        with torch.no_grad(), self.adapter_disabled() if base else contextlib.nullcontext():
            for rows in micro_batches(samples, _SCORE_POSITIONS):
                logprobs = self.logprobs(collate(rows).to(self.device)).logprobs
                parts = logprobs.split([sample.num_tokens for sample in rows])
                scored.update({id(s): part.tolist() for s, part in zip(rows, parts, strict=True)})
        return tuple(logprob for sample in samples for logprob in scored[id(sample)])

    def set_probe(self, sequences: Sequence[Sequence[int]]) -> None:
        """Score these sequences at every publish() of this run."""
        self._probe = tuple(tuple(sequence) for sequence in sequences)

    def lora_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the LoRA tensors by their name in the adapter file."""
        return {name: parameter.shape for name, parameter in self._named_lora()}

    @contextlib.contextmanager
    def replaced_lora(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the LoRA weights are `tensors`, by the names of `lora_shapes`."""
        weights = {name: parameter.data for name, parameter in self._named_lora()}
        try:
            for name, parameter in self._named_lora():
                parameter.data = tensors[name].to(parameter)
            yield
        finally:
            for name, parameter in self._named_lora():
                parameter.data = weights[name]

    def _named_lora(self) -> list[tuple[str, Tensor]]:
        return [
            (name.replace(".default.", "."), parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]

    # --- update ---------------------------------------------------------------------------------

    @mirrored
    def update(
        self, samples: Sequence[Sample], algorithm: GrpoConfig, *, max_tokens_per_micro_batch: int
    ) -> UpdateStats:
        """Take the optimizer steps of one update; the policy is the next version afterwards.

        Raises FloatingPointError when a gradient is not finite. Whatever is raised, the policy is
        the version it was: no gradient and no step of a failed update is left.
        """
        num_steps = algorithm.num_epochs * algorithm.num_minibatches
        old: dict[int, Tensor] = {}
        if num_steps > 1:
            mine = [s for m in _split(samples, algorithm.num_minibatches) for s in self._share(m)]
            old = self._old_logprobs(mine, max_tokens_per_micro_batch)
        sums, losses, grad_norms = _Sums(), [], []
        learning_rate = self._set_learning_rate()
        with self._all_or_nothing(num_steps):
            for _ in range(algorithm.num_epochs):
                for minibatch in _split(samples, algorithm.num_minibatches):
                    losses.append(
                        self._backward(minibatch, old, algorithm, max_tokens_per_micro_batch, sums)
                    )
                    grad_norms.append(self._step())
        sums = _Sums(self.ranks.add_up({**sums.values, "loss": sum(losses)}))
        self._num_updates += 1
        self._id = self.id.next()
        return UpdateStats(
            loss=sums.values["loss"] / len(losses),
            grad_norm=sum(grad_norms) / len(grad_norms),
            learning_rate=learning_rate,
            entropy=sums.mean("entropy", "tokens"),
            clip_fraction=sums.mean("clipped", "tokens"),
            importance_weight_mean=sums.mean("weight", "tokens"),
            importance_truncated_fraction=sums.mean("truncated", "tokens"),
            logprob_gap=sums.mean("gap", "fresh"),
            sampler_kl=sums.mean("kl", "fresh"),
        )

    @contextlib.contextmanager
    def _all_or_nothing(self, num_steps: int) -> Iterator[None]:
        """Undo the steps of an update that fails before its last one, and drop its gradients."""
        assert self._optimizer
        weights, state = [], {}
        if num_steps > 1:
            weights = [parameter.detach().clone() for parameter in self._trainable()]
            state = copy.deepcopy(self._optimizer.state_dict())
        try:
            yield
        except Exception:  # whatever it was: half an update is no version
            self._optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, weight in zip(self._trainable(), weights, strict=False):
                    parameter.copy_(weight)
            if state:
                self._optimizer.load_state_dict(state)
            raise

    def _share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The samples with a gradient that this rank computes."""
        return self.ranks.share([sample for sample in samples if sample.advantage])

    def _backward(
        self,
        samples: Sequence[Sample],
        old: dict[int, Tensor],
        algorithm: GrpoConfig,
        max_tokens: int,
        sums: _Sums,
    ) -> float:
        """Accumulate the gradient of one optimizer step; its loss. Of this rank's share alone.

        Samples without advantage have no gradient: they count as tokens and are not computed.
        """
        num_tokens = sum(sample.num_tokens for sample in samples)
        total = 0.0
        for rows in micro_batches(self._share(samples), max_tokens):
            batch = collate(rows).to(self.device)
            logprobs, entropy = self.logprobs(batch)
            before = logprobs.detach()
            if old:
                before = torch.cat([old[id(sample)] for sample in rows])
            result = clipped_policy_loss(
                logprobs,
                before,
                batch,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                importance_clip=algorithm.importance_clip,
                num_tokens=num_tokens,
            )
            result.loss.backward()
            total += result.loss.item()
            _add_stats(sums, batch, before, entropy, result, algorithm.importance_clip)
        return total

    def _old_logprobs(self, samples: Sequence[Sample], max_tokens: int) -> dict[int, Tensor]:
        """Logprobs before the update, by identity of the sample, for several optimizer steps."""
        old: dict[int, Tensor] = {}
        with torch.no_grad():
            for rows in micro_batches(samples, max_tokens):
                logprobs = self.logprobs(collate(rows).to(self.device)).logprobs
                parts = logprobs.split([sample.num_tokens for sample in rows])
                old.update({id(sample): part for sample, part in zip(rows, parts, strict=True)})
        return old

    def _step(self) -> float:
        """Add up the ranks' gradients, clip, step and zero them; the norm before clipping."""
        assert self._optimizer
        parameters = self._trainable()
        for parameter in parameters:
            if parameter.grad is None:  # no sample had an advantage: a step of momentum alone
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.add_gradients(parameters)
        norm = float(
            torch.nn.utils.clip_grad_norm_(parameters, self._optimizer_config.max_grad_norm)
        )
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(
                f"the gradient of policy {self.id} is not finite: no step was taken; lower "
                "optimizer.learning_rate"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _set_learning_rate(self) -> float:
        assert self._optimizer
        config = self._optimizer_config
        share = min(1.0, (self._num_updates + 1) / max(config.warmup_steps, 1))
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        return config.learning_rate * share

    # --- publish --------------------------------------------------------------------------------

    def publish(self) -> PublishedAdapter:
        """The adapter of the current version, kept for `adapter`."""
        adapter = self.export(self.id, self.score(self._probe))
        self._published[self.id.version] = adapter
        for version in sorted(self._published)[: -self._kept_adapters]:
            del self._published[version]
        return adapter

    def export(self, policy: PolicyId, probe_logprobs: tuple[float, ...] = ()) -> PublishedAdapter:
        """The LoRA weights as the adapter file of `policy`, in bfloat16, under PEFT's names."""
        from safetensors.torch import save

        manifest = self._manifest(policy)
        tensors = {
            name: parameter.detach().to(torch.bfloat16).cpu()
            for name, parameter in self._named_lora()
        }
        content = save(tensors, manifest_metadata(manifest))
        digest = content_digest(hashlib.sha256(content).digest())
        return PublishedAdapter(manifest, content, digest, probe_logprobs)

    def _manifest(self, policy: PolicyId) -> AdapterManifest:
        return AdapterManifest(
            policy=policy,
            base=self.identity,
            rank=self._lora.rank,
            scaling=self._lora.scaling,
            target_modules=self._lora.target_modules,
        )

    @property
    def kept_versions(self) -> tuple[int, ...]:
        """The versions whose adapter file `adapter` still has."""
        return tuple(self._published)

    def adapter(self, version: int) -> PublishedAdapter:
        """A published adapter. Raises NotFound when it was never made or is no longer kept."""
        if version not in self._published:
            kept = ", ".join(map(str, self._published)) or "none"
            raise NotFound(f"the adapter of version {version} is not kept; kept versions: {kept}")
        return self._published[version]

    # --- snapshot -------------------------------------------------------------------------------

    def snapshot(self) -> PolicySnapshot:
        """A copy of everything an update depends on, and of the manifest of the current version."""
        assert self._optimizer
        optimizer = self._optimizer.state_dict()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return PolicySnapshot(
            manifest=self._manifest(self.id),
            lora={name: p.detach().to("cpu", copy=True) for name, p in self._named_lora()},
            optimizer={
                "state": {
                    index: {name: value.to("cpu", copy=True) for name, value in moments.items()}
                    for index, moments in optimizer["state"].items()
                },
                "param_groups": copy.deepcopy(optimizer["param_groups"]),
            },
            num_updates=self._num_updates,
            rng=rng,
        )

    @mirrored
    def restore(self, policy: PolicyId, snapshot: PolicySnapshot) -> None:
        """Go on as `policy` from a snapshot. Call after start() with the config of its run.

        The next update is, bit for bit, the one that the snapshot's policy would have taken.
        Raises ValueError when the tensors are not those of this base and LoRA config.
        """
        assert self._optimizer
        shapes = {name: tensor.shape for name, tensor in snapshot.lora.items()}
        if shapes != self.lora_shapes():
            raise ValueError(
                f"the saved LoRA weights of {snapshot.manifest.policy} do not fit this base: start "
                "the trainer with the model that the run began with"
            )
        with torch.no_grad():
            for name, parameter in self._named_lora():
                parameter.copy_(snapshot.lora[name])
        self._optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))  # it keeps what it gets
        torch.set_rng_state(snapshot.rng["cpu"])
        if self.device.type == "cuda" and "cuda" in snapshot.rng:
            torch.cuda.set_rng_state(snapshot.rng["cuda"], self.device)
        self._num_updates = snapshot.num_updates
        self._id = policy
        self._published = {}


def _unsampled(token_ids: Sequence[int]) -> Sample:
    """A sequence to be scored from its second token on."""
    return Sample(
        prompt_token_ids=tuple(token_ids[:1]),
        token_ids=tuple(token_ids[1:]),
        sampler_logprobs=(0.0,) * (len(token_ids) - 1),
        staleness=(0,) * (len(token_ids) - 1),
        temperature=1.0,
        advantage=0.0,
    )


def _split(samples: Sequence[Sample], num_parts: int) -> Iterator[Sequence[Sample]]:
    """Contiguous parts whose sizes differ by at most one; whole groups stay nearly together."""
    for part in range(num_parts):
        start, end = (len(samples) * k // num_parts for k in (part, part + 1))
        if start < end:
            yield samples[start:end]


def _add_stats(
    sums: _Sums,
    batch: TokenBatch,
    before: Tensor,
    entropy: Tensor,
    result: PolicyLoss,
    importance_clip: float,
) -> None:
    gap = (before - batch.sampler_logprobs)[batch.is_fresh]
    bounded_gap = gap.clamp(max=MAX_LOG_RATIO)
    sums.add(
        tokens=torch.tensor(len(before)),
        entropy=entropy.sum(),
        clipped=result.is_clipped.sum(),
        weight=result.importance_weights.sum(),
        truncated=(result.importance_weights > importance_clip).sum(),
        fresh=batch.is_fresh.sum(),
        gap=gap.abs().sum(),
        kl=(bounded_gap.exp() - 1 - bounded_gap).sum(),
    )


def _refuse_scaled_logits(config: Any) -> None:
    """Logits are computed here from hidden states; a model that rescales them would differ."""
    text_config = config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1.0):
            raise ValueError(
                f"{text_config.model_type} sets {name}, which the trainer does not apply yet: "
                "choose a model without it"
            )


def _keep_linears_differentiable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights on CPUs with AVX512-BF16.

    Its first forward in eval mode repacks a Linear4bit in place for a kernel without backward;
    gradients of later training steps are then silently wrong (seen with 0.50.2).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
