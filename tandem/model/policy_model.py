"""`PolicyModel`: a QLoRA policy in this process, and the replicas that sample from it.

    from_pretrained()  base + LoRA (policy.py), and with fast_inference an engine (engine.py)
    for_inference()    the engine serves the weights as they are now; so does every generate()
    for_training()     the loss and the optimizer are the caller's: parameters() are torch's

The names are those of Unsloth's FastLanguageModel. What differs: the engine is another process, or
several, which receive the LoRA weights over HTTP; each push is a policy version, and every token
knows the version that sampled it.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from services.base_model import resolve_checkpoint
from services.boot import one_line
from services.machine import gpus
from services.trainer.fleet.conformance import Conformance
from services.trainer.fleet.member import Requirements
from services.trainer.fleet.probe import make_probe
from services.trainer.policy.attention import plain_attention
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.policy.token_batch import TokenBatch, collate, make_trees, micro_batches
from services.trainer.preflight import check_fits
from services.trainer.run_config import ConformanceConfig, LoraConfig
from shared.adapters import LINEAR_MODULES
from shared.http_client import ROLLOUT_PORT, service_url
from shared.schemas import PolicyId, ServingMode
from tandem.model.engine import RolloutEngine, without_engine
from tandem.model.load_options import (
    check_dtype,
    check_load_options,
    check_lora_options,
    log,
    replica_settings,
)
from tandem.model.lora_folder import (
    is_lora_folder,
    lora_digest,
    read_lora,
    read_lora_config,
    write_lora,
)
from tandem.model.outputs import LoRARequest, RequestOutput

_MIN_CONTEXT = 16  # Tokens that the probe of the replicas needs.
_MAX_POSITIONS = 8192  # Positions per forward pass of `logprobs`.
_SYNC_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """B completions of up to T tokens, padded on the right. Sum over `mask` only."""

    logprobs: Tensor  # [B, T] float32, of the tokens at their temperature; with a gradient
    entropy: Tensor  # [B, T] float32, nats, of the distributions; with a gradient
    sampler_logprobs: Tensor  # [B, T] float32, the engine's; NaN where it did not sample
    mask: Tensor  # [B, T] bool


class PolicyModel(torch.nn.Module):
    """Not thread-safe, except for generation."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        engine: RolloutEngine | None,
        lora: LoraConfig,
        max_lora_rank: int,
        max_seq_length: int,
        seed: int,
        replace_run: bool,
        serving_mode: ServingMode,
        ready_timeout_s: float,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self._engine = engine
        self._max_lora_rank = max_lora_rank
        self._replace_run = replace_run
        self._serving_mode = serving_mode
        self._ready_timeout_s = ready_timeout_s
        self._runs: set[str] = set()  # Runs that this model began and may end.
        self._lock = threading.RLock()  # Serializes pushes.
        self._before: bool | None = None  # Mode before the last for_*() call.
        self._modes: list[bool] = []  # Modes to restore when open `with` blocks end.
        if engine:
            self.vllm_engine = engine
        self._start(lora, seed=seed)

    # --- load -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        *,
        load_in_16bit: bool = False,
        token: str | None = None,
        revision: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        enforce_eager: bool | None = None,
        max_num_seqs: int | None = None,
        max_loras: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        serving_mode: ServingMode = "lora",
        device: str = "auto",
        rollout_urls: Sequence[str] = (),
        api_key: str | None = None,
        replace_run: bool = False,
        cache_dir: str | Path = "~/.cache/tandem",
        ready_timeout_s: float = 900.0,
        generate_timeout_s: float = 600.0,
        **others: Any,
    ) -> tuple[PolicyModel, Any]:
        """The model with a fresh LoRA of rank `max_lora_rank`, and its tokenizer.

        `model_name`: a checkpoint folder, a hub id, or a folder with an adapter, which is trained
        on. docs/python_api.md has every parameter. Raises ValueError, TypeError or a ServiceError
        for unsupported options, ProcessFailed when the engine does not start.
        """
        check_load_options(others, cls.from_pretrained)
        check_dtype(dtype)
        if serving_mode not in get_args(ServingMode):
            raise ValueError(f"serving_mode is {serving_mode!r}: it is 'lora' or 'merged'")
        name, folder, lora = model_name, Path(model_name).expanduser(), None
        if is_lora_folder(folder):
            lora, name = read_lora_config(folder)
            max_lora_rank = max(max_lora_rank, lora.rank)
        source = resolve_checkpoint(name, "model_name", revision=revision, token=token)
        max_seq_length = _fitting_length(source, max_seq_length)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        load_in_4bit = load_in_4bit and not load_in_16bit
        engine = RolloutEngine(generate_timeout_s=generate_timeout_s) if fast_inference else None
        try:
            if engine and rollout_urls:
                urls = [service_url(url, port=ROLLOUT_PORT) for url in rollout_urls]
                engine.use_replicas(urls, api_key or os.environ.get("TANDEM_API_KEY"))
            elif engine:
                cache = Path(cache_dir).expanduser().resolve()
                settings = replica_settings(
                    source=source,
                    device=device,
                    load_in_4bit=load_in_4bit,
                    max_seq_length=max_seq_length,
                    max_lora_rank=max_lora_rank,
                    gpu_memory_utilization=gpu_memory_utilization,
                    float8_kv_cache=float8_kv_cache,
                    random_state=random_state,
                    cache_dir=cache,
                    options={
                        "enforce_eager": enforce_eager,
                        "max_num_seqs": max_num_seqs,
                        "max_live_policies": max_loras,
                        "kv_cache_memory_bytes": kv_cache_memory_bytes,
                        "serving_mode": serving_mode,
                    },
                )
                log_name = f"rollout-{os.getpid()}-{secrets.token_hex(2)}.log"
                engine.start_child(settings, cache / "logs" / log_name)
                # On one GPU, because vLLM measures free memory when it starts.
                if device == "cuda":
                    engine.wait_until_ready(ready_timeout_s)
            check_fits(
                f"model_name {name}",
                source,
                gpu=gpus(f"device={device!r}", 1)[0] if device == "cuda" else None,
                load_in_4bit=load_in_4bit,
            )
            policy = Policy.load(
                str(source),
                device=device,
                load_in_4bit=load_in_4bit,
                gradient_checkpointing=bool(use_gradient_checkpointing),
            )
            policy.source = name
            if engine:
                engine.wait_until_ready(ready_timeout_s)
            model = cls(
                policy,
                _load_tokenizer(source),
                engine=engine,
                lora=lora or _lora(rank=max_lora_rank, alpha=max_lora_rank),
                max_lora_rank=max_lora_rank,
                max_seq_length=max_seq_length,
                seed=random_state,
                replace_run=replace_run or not rollout_urls,
                serving_mode=serving_mode,
                ready_timeout_s=ready_timeout_s,
            )
            if lora:
                model.restore_lora(folder)
        except BaseException:
            if engine:
                engine.close()
            raise
        return model, model.tokenizer

    def get_peft_model(
        self,
        r: int = 16,
        target_modules: Sequence[str] = LINEAR_MODULES,
        lora_alpha: float = 16,
        *,
        use_rslora: bool = False,
        random_state: int = 3407,
        **others: Any,
    ) -> PolicyModel:
        """The same model with a new LoRA; make optimizers after this call.

        Also `PolicyModel.get_peft_model(model, r=...)`, as in Unsloth.
        """
        check_lora_options(others, PolicyModel.get_peft_model)
        if r > self._max_lora_rank:
            raise ValueError(
                f"r is {r}, the model was loaded with max_lora_rank={self._max_lora_rank}: load it "
                f"with max_lora_rank={r}"
            )
        lora = _lora(
            rank=r, alpha=lora_alpha, use_rslora=use_rslora, target_modules=tuple(target_modules)
        )
        self._start(lora, seed=random_state)
        return self

    def _start(self, lora: LoraConfig, *, seed: int) -> None:
        """A fresh LoRA, which is version 0 of a run of its own on the replicas."""
        policy = self.policy
        run = PolicyId(run_id=f"own-{secrets.token_hex(4)}", version=0)
        policy.start(run, lora, seed=seed)
        self.peft_model = policy.model
        self.train()
        self._num_versions = 0
        # Versions loaded from folders, by the digest of their tensors.
        self._loaded: dict[bytes, PolicyId] = {}
        self._pushed = self._fingerprint()
        if self._engine is None:
            return
        config = ConformanceConfig(num_tokens=min(48, self.max_seq_length - 1))
        probe = make_probe(policy, (), config, seed=seed)
        policy.set_probe(probe.sequences)
        self._runs.add(run.run_id)
        # The engine's thread keeps what the closure captures, which must not be the model.
        replace_run, runs = self._replace_run, self._runs
        self._engine.begin(
            Requirements(
                run=run,
                base=policy.identity,
                lora_rank=lora.rank,
                num_context_tokens=self.max_seq_length,
                may_replace_run=lambda run_id: replace_run or run_id in runs,
                prover=Conformance(probe, config),
                in_flight="continue" if self._serving_mode == "merged" else "finish",
                sync_timeout_s=_SYNC_TIMEOUT_S,
            ),
            encoder=policy.encoder,
            tokenizer=self.tokenizer,
            before=self.push_weights,
            load=self.load_lora,
            timeout_s=self._ready_timeout_s,
        )

    def close(self) -> None:
        """End the engine now; it ends with the process in any case."""
        if self._engine:
            self._engine.close()

    # --- weights --------------------------------------------------------------------------------

    def push_weights(self) -> PolicyId:
        """Push the weights to the replicas if they have changed; returns their version.

        Raises FloatingPointError for weights that are not finite: the engine keeps the last ones.
        """
        assert self._engine
        with self._lock:
            fingerprint = self._fingerprint()
            if fingerprint != self._pushed:
                self._check_finite()
                self.policy.set_version(self._next_version())
                self._engine.push(self.policy.publish(), timeout_s=self._ready_timeout_s)
                self._pushed = fingerprint
            return self.policy.id

    def _next_version(self) -> PolicyId:
        self._num_versions += 1
        return self.policy.id.model_copy(update={"version": self._num_versions})

    @torch.no_grad()
    def _fingerprint(self) -> list[int]:
        """One number per LoRA tensor that any change of its bits changes, even through `.data`."""
        sums = []
        for parameter in self._trained():
            bits = parameter.detach().flatten().view(torch.int32).to(torch.int64)
            places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
            sums.append((bits * places).sum())
        return [int(number) for number in torch.stack(sums).tolist()]

    def _trained(self) -> list[Tensor]:
        return [p for name, p in self.peft_model.named_parameters() if ".default." in name]

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self._trained()):
            raise FloatingPointError(
                "the LoRA weights are not finite and were not pushed: the engine keeps version "
                f"{self.policy.id.version}; go back to a saved adapter (restore_lora), with a "
                "lower learning rate"
            )

    def save_lora(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format, in bfloat16."""
        with self._lock:
            current = self.policy.id
            named = current.next() if current.is_base else current
            write_lora(Path(folder), self.policy.export(named), self.policy.source)

    def restore_lora(self, folder: str | Path) -> None:
        """Continue training from a saved adapter.

        Its rank may be smaller than this model's: the rest starts fresh, and is trained as well.
        """
        tensors = read_lora(Path(folder), self.policy.lora_shapes(), self.policy.lora)
        with torch.no_grad():
            for (name, tensor), parameter in zip(tensors.items(), self._trained(), strict=True):
                parameter.copy_(tensor)
                if name.endswith("lora_A.weight"):
                    # Where A and B are both 0, so are both gradients, forever.
                    other = tensors[name.replace("lora_A", "lora_B")]
                    is_dead = ~(tensor.any(1) | other.any(0))  # [R]
                    fresh = torch.nn.init.kaiming_uniform_(torch.empty_like(tensor), a=5**0.5)
                    parameter[is_dead.to(parameter.device)] = fresh[is_dead].to(parameter)

    def load_lora(self, folder: str | Path, load_tensors: bool = True) -> LoRARequest:
        """An adapter folder as a `lora_request`, served next to the one that trains. The same
        content is the same version, however often it is loaded."""
        if self._engine is None:
            raise RuntimeError(
                "load_lora gives the engine an adapter, and this model was loaded without one: "
                "load it with fast_inference=True, or train on from it with restore_lora(folder)"
            )
        if self._serving_mode == "merged":
            raise RuntimeError(
                "load_lora serves an adapter next to the trained one, and serving_mode='merged' "
                "serves one at a time: load the model with serving_mode='lora', or continue "
                "training from the folder with restore_lora(folder)"
            )
        path = Path(folder)
        tensors = read_lora(path, self.policy.lora_shapes(), self.policy.lora)
        digest = lora_digest(tensors)
        with self._lock:
            named = self._loaded.get(digest) or self._next_version()
            adapter = self._engine.kept(named)
            if adapter is None:
                with self.policy.replaced_lora(tensors):
                    logprobs = self.policy.score(self.policy.probe)
                    adapter = self.policy.export(named, logprobs)
            self._loaded[digest] = named
            self._engine.keep(adapter)
        return LoRARequest(path.name, named.version, str(path), named)

    # --- modes ----------------------------------------------------------------------------------

    def for_inference(self) -> PolicyModel:
        """Serve the weights as they are now. As a context manager, restore the mode afterwards."""
        if self._engine:
            self.push_weights()
        self._before = self.training
        self._set_mode(training=False)
        return self

    def for_training(self, use_gradient_checkpointing: bool | str | None = None) -> PolicyModel:
        """As `for_inference`; None leaves gradient checkpointing unchanged."""
        if use_gradient_checkpointing is not None:
            base = self.peft_model.get_base_model()
            if use_gradient_checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()
        self._before = self.training
        self._set_mode(training=True)
        return self

    def _set_mode(self, *, training: bool) -> None:
        self.train(training)
        self.tokenizer.padding_side = "right" if training else "left"

    def __enter__(self) -> PolicyModel:
        if self._before is None:
            raise RuntimeError("say with model.for_inference(): or with model.for_training():")
        self._modes.append(self._before)
        self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        self._set_mode(training=self._modes.pop())

    # --- generate -------------------------------------------------------------------------------

    def fast_generate(
        self, prompts: Any, sampling_params: Any = None, **others: Any
    ) -> list[RequestOutput]:
        """`vllm_engine.generate`."""
        if self._engine is None:
            raise without_engine()
        return self._engine.generate(prompts, sampling_params, **others)

    def fast_generate_batches(
        self, prompts: Any, sampling_params: Any = None, **others: Any
    ) -> list[RequestOutput]:
        """`vllm_engine.generate_batches`."""
        if self._engine is None:
            raise without_engine()
        return self._engine.generate_batches(prompts, sampling_params, **others)

    @torch.no_grad()
    def generate(self, *args: Any, **options: Any) -> Any:
        """Transformers' generate in this process, in either mode."""
        was_training = self.training
        self.eval()
        try:
            with plain_attention(self.peft_model.get_base_model()):
                return self.peft_model.generate(*args, **options)
        finally:
            self.train(was_training)

    # --- forward --------------------------------------------------------------------------------

    def forward(self, *args: Any, **options: Any) -> Any:
        """Transformers' forward: logits of all positions. `logprobs` needs far less memory."""
        with plain_attention(self.peft_model.get_base_model()):
            return self.peft_model(*args, **options)

    def logprobs(
        self,
        prompts: Sequence[RequestOutput] | Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]] | None = None,
        *,
        temperature: float = 1.0,
        max_positions: int = _MAX_POSITIONS,
    ) -> CompletionLogprobs:
        """Logprobs of completions under the current weights, for a loss.

        Either of what the engine returned, all completions prompt by prompt at their temperature,
        or of `completions[i]` after `prompts[i]` as token ids. Logits exist for a chunk of tokens
        at a time; beyond `max_positions` tokens activations are recomputed in the backward pass.
        """
        samples = _samples(prompts, completions, temperature)

        def compute(batch: TokenBatch) -> Tensor:  # [N, 2]
            return torch.stack(self.policy.logprobs(batch), -1)

        values = self._per_token(samples, compute, max_positions)  # [B, T, 2]
        lengths = torch.tensor([s.num_tokens for s in samples], device=values.device)
        sampled = [torch.tensor(s.sampler_logprobs or [torch.nan] * s.num_tokens) for s in samples]
        return CompletionLogprobs(
            logprobs=values[..., 0],
            entropy=values[..., 1],
            sampler_logprobs=pad_sequence(sampled, batch_first=True).to(values),
            mask=torch.arange(values.shape[1], device=values.device) < lengths[:, None],
        )

    @torch.no_grad()
    def reference_logprobs(
        self,
        prompts: Sequence[RequestOutput] | Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]] | None = None,
        *,
        temperature: float = 1.0,
        max_positions: int = _MAX_POSITIONS,
    ) -> CompletionLogprobs:
        """The same under the base, with the adapter off and without a gradient."""
        with self.policy.adapter_disabled():
            return self.logprobs(
                prompts, completions, temperature=temperature, max_positions=max_positions
            )

    def hidden_states(
        self,
        prompts: Sequence[RequestOutput] | Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]] | None = None,
        *,
        max_positions: int = _MAX_POSITIONS,
    ) -> Tensor:
        """[B, T, H]: the states that predict each token of a completion, for a value head."""
        samples = _samples(prompts, completions, 1.0)
        return self._per_token(samples, self.policy.hidden, max_positions)

    def _per_token(
        self, samples: Sequence[Sample], compute: Callable[[TokenBatch], Tensor], max_positions: int
    ) -> Tensor:
        """[N, D] of micro-batches -> [B, T, D] of the samples, in their order."""
        policy, layout = self.policy, self.policy.layout
        fitting = partial(
            make_trees,
            samples,
            layout=layout,
            max_tokens=max_positions,
            hidden_size=policy.hidden_size,
        )
        units = [[tree] for group in group_indices(samples) for tree in fitting(group)]
        batches = list(micro_batches(units, layout=layout, max_tokens=max_positions))
        found: dict[int, Tensor] = {}
        for trees in batches:
            rows = [index for tree in trees for index in tree.indices]
            batch = collate(samples, trees, layout=layout).to(policy.device)
            if len(batches) > 1 and torch.is_grad_enabled():
                values: Tensor = checkpoint(compute, batch, use_reentrant=False)
            else:
                values = compute(batch)
            found.update(
                zip(rows, values.split([samples[i].num_tokens for i in rows]), strict=True)
            )
        return pad_sequence([found[i] for i in range(len(samples))], batch_first=True)

    def __getattr__(self, name: str) -> Any:
        """Names that torch does not find belong to the PEFT model or the base: config, device..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "vllm_engine":
                raise AttributeError(str(without_engine())) from None
            if name == "peft_model":
                raise
            return getattr(self.peft_model, name)


def _lora(**values: Any) -> LoraConfig:
    try:
        return LoraConfig(**values)
    except ValidationError as error:
        raise ValueError(f"this LoRA is not supported: {one_line(error)}") from error


def _samples(
    prompts: Sequence[RequestOutput] | Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]] | None,
    temperature: float,
) -> list[Sample]:
    """One prompt per completion; completions of a prompt share it."""
    rows: list[tuple[Sequence[int], Sequence[int], Sequence[float], float, int]] = []
    if completions is None:
        for group, output in enumerate(prompts):
            if not isinstance(output, RequestOutput):
                raise TypeError("logprobs takes what the engine returned, or prompts, completions")
            if obstacles := output.sampling.gradient_obstacles():
                raise ValueError(
                    f"these completions were sampled with {', '.join(obstacles)}: their logprobs "
                    "are not the policy's; sample with temperature alone, or pass token ids"
                )
            rows += [
                (
                    output.prompt_token_ids,
                    completion.token_ids,
                    completion.token_logprobs,
                    output.sampling.temperature,
                    group,
                )
                for completion in output.outputs
            ]
    else:
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts and {len(completions)} completions: give one for one"
            )
        group, last = -1, None
        for prompt, ids in zip(prompts, completions, strict=True):
            plain = _ids(prompt)
            group, last = (group, last) if plain == last else (group + 1, plain)
            rows.append((plain, _ids(ids), (), temperature, group))
    for number, (prompt, ids, *_) in enumerate(rows):
        if not len(prompt) or not len(ids):
            raise ValueError(f"completion {number} or its prompt has no token: remove it")
    return [
        Sample(tuple(p), tuple(ids), tuple(logprobs), (0,) * len(ids), t, group, (0.0,), False)
        for p, ids, logprobs, t, group in rows
    ]


def _ids(given: Any) -> list[int]:
    return list(given.tolist() if isinstance(given, Tensor) else given)


def _fitting_length(source: Path, max_seq_length: int) -> int:
    from transformers import AutoConfig

    if max_seq_length < _MIN_CONTEXT:
        raise ValueError(f"max_seq_length is {max_seq_length}: give it {_MIN_CONTEXT} or more")
    config = AutoConfig.from_pretrained(source).get_text_config()
    most = int(config.max_position_embeddings)
    if max_seq_length > most:
        log.warning(
            "max_seq_length=%d is more than the %d positions of the model: it is %d",
            max_seq_length,
            most,
            most,
        )
    return min(max_seq_length, most)


def _load_tokenizer(source: Path) -> Any:
    """A tokenizer for the caller; changes to it do not reach the policy's encoder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
