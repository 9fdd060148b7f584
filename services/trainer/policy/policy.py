"""The policy as a function of tokens: a 4-bit base and LoRA on its linears.

    start(run)   fresh LoRA (B = 0) on the loaded base: version 0
    logprobs()   TokenBatch -> logprobs and entropies of its completion tokens, with a gradient
    score()      token ids -> logprobs, without one
    publish()    the adapter file of the current version, as bytes

LoRA weights are float32 masters computed with in bfloat16, as the replicas serve them. What changes
them is a Learner (learner/learner.py), or an optimizer of the caller's.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from services.base_model import quantized_load_options, resolve_checkpoint
from services.tokens import PromptEncoder
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.layout import choose_layout, fuse_kernels, refuse_scaled_logits
from services.trainer.policy.logprobs import TokenLogprobs, token_logprobs
from services.trainer.policy.lora import use_fused_lora
from services.trainer.policy.offload import inputs_on_host
from services.trainer.policy.ranks import Ranks
from services.trainer.policy.samples import Sample
from services.trainer.policy.token_batch import (
    PackedAttention,
    TokenBatch,
    Tree,
    collate,
    micro_batches,
)
from services.trainer.run_config import LoraConfig
from shared.adapters import LINEAR_MODULES, content_digest, file_header
from shared.errors import NotFound
from shared.model_folder import base_identity
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId, QuantizationRecipe

log = logging.getLogger(__name__)
_SCORE_POSITIONS = 8192  # Positions per forward pass of `score`.


class Policy:
    """One base, and at most one run's LoRA on it. Not thread-safe."""

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
        self._id: PolicyId | None = None
        self._lora = LoraConfig()
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

        Every rank calls it, and none continues when one of them fails.
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
    def hidden_size(self) -> int:
        return int(self._base.config.get_text_config().hidden_size)

    @property
    def max_positions(self) -> int:
        return int(self._base.config.get_text_config().max_position_embeddings)

    def start(self, policy: PolicyId, lora: LoraConfig, *, seed: int) -> None:
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
        use_fused_lora(self.model)
        self.model.train()  # Gradient checkpointing is silently off in eval mode.
        self._lora = lora
        self._set_out(policy)
        self._probe = ()

    def set_version(self, policy: PolicyId) -> None:
        """The LoRA weights were changed: they are version `policy` of the run."""
        assert policy.life == self.id.life
        self._id = policy

    def restore(self, policy: PolicyId, lora: Mapping[str, Tensor]) -> None:
        """Go on as `policy` with the LoRA weights of a snapshot, by their names in the file.

        Raises ValueError when they do not fit this base and LoRA config.
        """
        if {name: tensor.shape for name, tensor in lora.items()} != self.lora_shapes():
            raise ValueError(
                f"the saved LoRA weights of {policy} do not fit this base: start the trainer with "
                "the model that the run began with"
            )
        with torch.no_grad():
            for name, parameter in self.lora_tensors().items():
                parameter.copy_(lora[name])
        self._set_out(policy)

    def _set_out(self, policy: PolicyId) -> None:
        self._id = policy
        self._published = {}

    def _refuse_missing(self, target_modules: Sequence[str]) -> None:
        """PEFT skips a target that the base does not have; replicas would refuse the adapter."""
        leaves = {name.rpartition(".")[2] for name, _ in self._base.named_modules()}
        servable = [name for name in LINEAR_MODULES if name in leaves]
        if missing := [name for name in target_modules if name not in servable]:
            raise ValueError(
                f"lora.target_modules has {', '.join(missing)}, this model has no such linear: "
                f"choose from {', '.join(servable)}"
            )

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
        return {name: parameter.shape for name, parameter in self.lora_tensors().items()}

    @contextlib.contextmanager
    def replaced_lora(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the LoRA weights are `tensors`, by the names of `lora_shapes`."""
        weights = {name: parameter.data for name, parameter in self.lora_tensors().items()}
        try:
            for name, parameter in self.lora_tensors().items():
                parameter.data = tensors[name].to(parameter)
            yield
        finally:
            for name, parameter in self.lora_tensors().items():
                parameter.data = weights[name]

    def lora_tensors(self) -> dict[str, Tensor]:
        """The LoRA weights that train, float32, by their name in the adapter file."""
        return {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if ".default." in name
        }

    # --- publish --------------------------------------------------------------------------------

    def publish(self) -> PublishedAdapter:
        """The adapter of the current version, kept for `adapter`."""
        content = self._adapter_file(self.id)
        with ThreadPoolExecutor(1) as beside:  # Hashing releases the interpreter.
            digest = beside.submit(_digest, content)
            probe_logprobs = self.score(self._probe)
        adapter = PublishedAdapter(self.manifest, content, digest.result(), probe_logprobs)
        self._published[self.id.version] = adapter
        for version in sorted(self._published)[: -self._kept_adapters]:
            del self._published[version]
        return adapter

    def export(self, policy: PolicyId, probe_logprobs: tuple[float, ...] = ()) -> PublishedAdapter:
        """The LoRA weights as the adapter file of `policy`, in bfloat16, under PEFT's names."""
        content = self._adapter_file(policy)
        return PublishedAdapter(self._manifest(policy), content, _digest(content), probe_logprobs)

    def _adapter_file(self, policy: PolicyId) -> memoryview:
        """The file in a buffer of its own, which a GPU writes directly and torch reuses."""
        tensors = self.lora_tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        header = file_header(self._manifest(policy), shapes)
        sizes = [tensor.numel() for tensor in tensors.values()]
        on_cpu = self.device.type == "cpu"
        file = torch.empty(
            len(header) + sum(sizes) * torch.bfloat16.itemsize,
            dtype=torch.uint8,
            pin_memory=not on_cpu,
        )
        values = file[len(header) :].view(torch.bfloat16)
        flat = values if on_cpu else torch.empty_like(values, device=self.device)
        torch._foreach_copy_(flat.split(sizes), [t.detach().flatten() for t in tensors.values()])
        if flat is not values:
            values.copy_(flat)
        content: memoryview = file.numpy().data
        content[: len(header)] = header
        return content.toreadonly()

    @property
    def manifest(self) -> AdapterManifest:
        """What the current version's adapter file says of itself."""
        return self._manifest(self.id)

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
