"""The policy that trains: a 4-bit base, LoRA on its linears, AdamW; update() and publish().

    start(run)   fresh LoRA (B = 0) on the loaded base: version 0
    update()     samples -> optimizer steps (update.py) -> the next version
    publish()    the adapter file of the current version, as bytes

LoRA weights are float32 masters computed with in bfloat16, as the replicas serve them. Methods that
are `mirrored` are called on every GPU that trains (parallel.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.base_model import quantized_load_options, resolve_checkpoint
from services.tokens import PromptEncoder
from services.trainer.learner.critic import Critic
from services.trainer.learner.optimizer import Optimizer
from services.trainer.learner.stats import UpdateStats
from services.trainer.learner.update import take_update
from services.trainer.policy.layout import choose_layout, fuse_kernels, refuse_scaled_logits
from services.trainer.policy.logprobs import TokenLogprobs, token_logprobs
from services.trainer.policy.lora import use_fused_lora
from services.trainer.policy.offload import inputs_on_host
from services.trainer.policy.ranks import Ranks, mirrored
from services.trainer.policy.samples import (
    PackedAttention,
    Sample,
    TokenBatch,
    Tree,
    collate,
    micro_batches,
)
from services.trainer.run_config import (
    AlgorithmConfig,
    GrpoConfig,
    GuardsConfig,
    LoraConfig,
    OptimizerConfig,
    PpoConfig,
)
from shared.adapters import LINEAR_MODULES, content_digest, file_header
from shared.checkpoints import base_identity
from shared.errors import NotFound
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId, QuantizationRecipe

log = logging.getLogger(__name__)
_SCORE_POSITIONS = 8192  # of one forward of `score`
_GRPO, _GUARDS = GrpoConfig(), GuardsConfig()


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    manifest: AdapterManifest
    content: bytes | memoryview  # the adapter file
    content_digest: str  # RFC 9530
    probe_logprobs: tuple[float, ...] = ()  # of the run's probe (conformance.py), if it has one

    @property
    def policy(self) -> PolicyId:
        return self.manifest.policy


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """Everything an update depends on besides its samples, on the CPU."""

    manifest: AdapterManifest
    lora: Mapping[str, Tensor]  # float32, by name in the adapter file
    optimizer: dict[str, Any]  # torch's state dict
    num_updates: int
    rng: Mapping[str, Tensor]  # torch's generators, by device type
    critic: Mapping[str, Tensor] = field(default_factory=dict)  # float32; empty without one


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
        offload_activations: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.source = source
        self.encoder = encoder
        self.identity = identity
        self.device = device
        self._kept_adapters = kept_adapters
        self._offloads = offload_activations
        self._base = model
        self.layout = choose_layout(model, device)
        self.model: Any = None
        self.critic: Critic | None = None  # of a run that has one
        self._id: PolicyId | None = None
        self._lora = LoraConfig()
        self._optimizer: Optimizer | None = None
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
        offload_activations: bool = False,
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
            refuse_scaled_logits(base.config)
            _keep_linears_differentiable(base)
            base.requires_grad_(False)
            if torch.device(device).type == "cuda":
                fuse_kernels(base)
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
            offload_activations=offload_activations,
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
    def optimizer(self) -> Optimizer:
        assert self._optimizer, "no run was started"
        return self._optimizer

    @property
    def hidden_size(self) -> int:
        return int(self._base.config.get_text_config().hidden_size)

    @property
    def max_positions(self) -> int:
        return int(self._base.config.get_text_config().max_position_embeddings)

    @mirrored
    def start(
        self,
        policy: PolicyId,
        lora: LoraConfig,
        optimizer: OptimizerConfig,
        *,
        seed: int,
        algorithm: AlgorithmConfig = _GRPO,
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
        options = PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            use_rslora=lora.use_rslora,
            target_modules=list(lora.target_modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(self._base, options)
        self.critic = None
        sets = [([parameter for _, parameter in self._named_lora()], optimizer.learning_rate)]
        if isinstance(algorithm, PpoConfig):
            self.critic = Critic(self.model, options, self.hidden, self.device)
            learning_rate = algorithm.critic_learning_rate or optimizer.learning_rate
            sets.append((list(self.critic.tensors().values()), learning_rate))
        use_fused_lora(self.model)
        self.model.train()  # without it gradient checkpointing is silently off
        self._id, self._lora = policy, lora
        self._optimizer = Optimizer(optimizer, sets)
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

    def fingerprint(self) -> list[int]:
        """A number per trained tensor, of all its bits: equal weights have equal ones."""
        bits = [p.detach().view(torch.int32).sum() for p in self.optimizer.parameters]
        return [int(number) for number in torch.stack(bits).tolist()]

    # --- forward --------------------------------------------------------------------------------

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Final states [N, H] at the positions that predict the batch's completion tokens."""
        attention: dict[str, Any] = {"attention_mask": batch.attention}
        if isinstance(batch.attention, PackedAttention):
            attention = {"packed": batch.attention}
        decoder = self.model.get_base_model().get_decoder()
        offloads = self._offloads and torch.is_grad_enabled()
        with inputs_on_host(self.hidden_size) if offloads else contextlib.nullcontext():
            hidden: Tensor = decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **attention,
            ).last_hidden_state  # [B, T, H]
        return hidden.flatten(0, 1).index_select(0, batch.predicts)

    def logprobs(self, batch: TokenBatch) -> TokenLogprobs:
        """Logprobs and entropies [N] of the batch's completion tokens under the current policy."""
        head = self.model.get_base_model().get_output_embeddings()
        return token_logprobs(
            self.hidden(batch),
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
        with self.adapter_disabled() if base else contextlib.nullcontext():
            return tuple(logprob for row in self.sample_logprobs(samples) for logprob in row)

    def sample_logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Logprobs of every sample's tokens, at its temperature, as training computes them."""
        scored: dict[int, list[float]] = {}
        units = [[Tree((i,), sample.length - 1)] for i, sample in enumerate(samples)]
        with torch.no_grad():
            for trees in micro_batches(units, layout=self.layout, max_tokens=_SCORE_POSITIONS):
                rows = [index for tree in trees for index in tree.indices]
                batch = collate(samples, trees, layout=self.layout).to(self.device)
                parts = self.logprobs(batch).logprobs.split([samples[i].num_tokens for i in rows])
                scored.update((i, part.tolist()) for i, part in zip(rows, parts, strict=True))
        return [scored[index] for index in range(len(samples))]

    def set_probe(self, sequences: Sequence[Sequence[int]]) -> None:
        """Score these sequences at every publish() of this run."""
        self._probe = tuple(tuple(sequence) for sequence in sequences)

    @property
    def probe(self) -> tuple[tuple[int, ...], ...]:
        return self._probe

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
            if ".default." in name
        ]

    # --- update ---------------------------------------------------------------------------------

    @mirrored
    def update(
        self,
        samples: Sequence[Sample],
        algorithm: AlgorithmConfig,
        *,
        max_tokens_per_micro_batch: int,
        max_completion_tokens: int | None = None,
        reward_weights: Sequence[float] = (),
        guards: GuardsConfig = _GUARDS,
    ) -> UpdateStats:
        """Take the optimizer steps of one update; the policy is the next version afterwards.

        `max_completion_tokens` is what dr_grpo divides by, `reward_weights` are those that
        `Sample.rewards` were multiplied with (None and (): the longest, and ones). Raises
        UpdateRefused when a guard is violated, FloatingPointError when a gradient is not finite.
        Whatever is raised, the policy is the version it was: no gradient and no step of a failed
        update is left.
        """
        stats = take_update(
            self,
            samples,
            algorithm,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            max_completion_tokens=max_completion_tokens,
            reward_weights=reward_weights,
            guards=guards,
        )
        self._id = self.id.next()
        return stats

    def name(self, policy: PolicyId) -> None:
        """Somebody else's optimizer changed the weights: they are version `policy` of the run."""
        assert policy.life == self.id.life
        self._id = policy

    # --- publish --------------------------------------------------------------------------------

    def publish(self) -> PublishedAdapter:
        """The adapter of the current version, kept for `adapter`."""
        content = self._adapter_file(self.id)
        with ThreadPoolExecutor(1) as beside:  # hashing lets the interpreter go
            digest = beside.submit(_digest, content)
            probe_logprobs = self.score(self._probe)
        adapter = PublishedAdapter(
            self._manifest(self.id), content, digest.result(), probe_logprobs
        )
        self._published[self.id.version] = adapter
        for version in sorted(self._published)[: -self._kept_adapters]:
            del self._published[version]
        return adapter

    def export(self, policy: PolicyId, probe_logprobs: tuple[float, ...] = ()) -> PublishedAdapter:
        """The LoRA weights as the adapter file of `policy`, in bfloat16, under PEFT's names."""
        content = self._adapter_file(policy)
        return PublishedAdapter(self._manifest(policy), content, _digest(content), probe_logprobs)

    def _adapter_file(self, policy: PolicyId) -> memoryview:
        """In memory of its own, which a GPU writes at once and torch keeps for later files."""
        named = self._named_lora()
        header = file_header(self._manifest(policy), {name: tuple(p.shape) for name, p in named})
        sizes = [parameter.numel() for _, parameter in named]
        on_cpu = self.device.type == "cpu"
        file = torch.empty(
            len(header) + sum(sizes) * torch.bfloat16.itemsize,
            dtype=torch.uint8,
            pin_memory=not on_cpu,
        )
        values = file[len(header) :].view(torch.bfloat16)
        flat = values if on_cpu else torch.empty_like(values, device=self.device)
        torch._foreach_copy_(flat.split(sizes), [p.detach().flatten() for _, p in named])
        if flat is not values:
            values.copy_(flat)
        content: memoryview = file.numpy().data
        content[: len(header)] = header
        return content.toreadonly()

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
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        critic = self.critic.tensors() if self.critic else {}
        return PolicySnapshot(
            manifest=self._manifest(self.id),
            lora={name: p.detach().to("cpu", copy=True) for name, p in self._named_lora()},
            optimizer=self.optimizer.state(),
            num_updates=self.optimizer.num_updates,
            rng=rng,
            critic={name: p.detach().to("cpu", copy=True) for name, p in critic.items()},
        )

    @mirrored
    def restore(self, policy: PolicyId, snapshot: PolicySnapshot) -> None:
        """Go on as `policy` from a snapshot. Call after start() with the config of its run.

        The next update is, bit for bit, the one that the snapshot's policy would have taken.
        Raises ValueError when the tensors are not those of this base and LoRA config.
        """
        shapes = {name: tensor.shape for name, tensor in snapshot.lora.items()}
        if shapes != self.lora_shapes() or bool(self.critic) != bool(snapshot.critic):
            raise ValueError(
                f"the saved LoRA weights of {snapshot.manifest.policy} do not fit this base: start "
                "the trainer with the model that the run began with"
            )
        with torch.no_grad():
            for name, parameter in self._named_lora():
                parameter.copy_(snapshot.lora[name])
        if self.critic:
            self.critic.restore(snapshot.critic)
        self.optimizer.restore(snapshot.optimizer, num_updates=snapshot.num_updates)
        torch.set_rng_state(snapshot.rng["cpu"])
        if self.device.type == "cuda" and "cuda" in snapshot.rng:
            torch.cuda.set_rng_state(snapshot.rng["cuda"], self.device)
        self._id = policy
        self._published = {}


def _digest(content: memoryview) -> str:
    return content_digest(hashlib.sha256(content).digest())


def _unsampled(token_ids: Sequence[int]) -> Sample:
    """A sequence to be scored from its second token on."""
    return Sample(
        prompt_token_ids=tuple(token_ids[:1]),
        token_ids=tuple(token_ids[1:]),
        sampler_logprobs=(),
        staleness=(0,) * (len(token_ids) - 1),
        temperature=1.0,
        group=0,
        rewards=(0.0,),
        is_truncated=False,
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
