"""`PolicyModel` without an engine, and the requests that it sends to an engine."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.attention import NAME, packed_attention, plain_attention
from services.trainer.run_config import LoraConfig
from shared.errors import RunConflict
from shared.schemas import ChatMessage, PolicyId, SamplingParams
from tandem.model.engine import RolloutEngine
from tandem.model.inputs import read_prompts, read_sampling
from tandem.model.policy_model import PolicyModel
from tests.fake_replica import BASE, FakeProver, FakeReplica, adapter_of
from tests.replica_process import eventually

PROMPTS = [[1, 5, 6, 7, 8], [1, 5, 6, 7, 8], [1, 9, 10]]
COMPLETIONS = [[4, 5, 6], [7, 8], [9, 10, 11, 2]]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> PolicyModel:
    model, _ = PolicyModel.from_pretrained(
        str(tiny_checkpoint), max_seq_length=256, max_lora_rank=16, device="cpu"
    )
    return model


@pytest.fixture
def model(loaded: PolicyModel) -> PolicyModel:
    """A model with a LoRA of rank 8 that changes its logprobs."""
    loaded.get_peft_model(r=8, lora_alpha=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(loaded):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return loaded


class PlayedEngine(RolloutEngine):
    """An engine on replicas and adapters that are simulated in memory."""

    def __init__(self, replica: FakeReplica) -> None:
        super().__init__(generate_timeout_s=600)
        self._prover = FakeProver([replica])
        self._background.fleet = Fleet(
            [replica.url], connect=lambda _: replica.client(), probe_interval_s=0.1
        )

    def begin(self, requirements: Requirements, **others: Any) -> None:
        super().begin(replace(requirements, base=BASE, prover=self._prover), **others)

    def keep(self, adapter: PublishedAdapter) -> None:
        super().keep(adapter_of(adapter.policy))


def with_engine(loaded: PolicyModel, replica: FakeReplica) -> PolicyModel:
    """A model on the base of `loaded`, whose engine uses `replica`."""
    return PolicyModel(
        loaded.policy,
        loaded.tokenizer,
        engine=PlayedEngine(replica),
        lora=LoraConfig(rank=8, alpha=8),
        max_lora_rank=16,
        max_seq_length=32,
        seed=0,
        replace_run=False,
        serving_mode="lora",
        ready_timeout_s=20,
    )


@pytest.fixture
def replica() -> FakeReplica:
    return FakeReplica("http://10.0.0.1:8000")


def trained(model: PolicyModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_of(model: PolicyModel) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in trained(model)]
    return [gradient.clone() for gradient in gradients if gradient is not None]


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True.* is not supported: a base is 4-bit"),
        ({"serving_mode": "merge"}, "serving_mode is .merge.: it is .lora. or .merged."),
        ({"full_finetuning": True}, "full_finetuning=True.* replicas load LoRA adapters only"),
        ({"trust_remote_code": True}, "Transformers itself implements"),
        ({"dtype": torch.float16}, "dtype=float16.* compute in bfloat16"),
        ({"rollout_urls": ["a b"], "fast_inference": True}, "'a b' is not a URL"),
        ({"max_seq_length": 4}, "max_seq_length is 4: give it 16 or more"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(
    tiny_checkpoint: Path, option: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        PolicyModel.from_pretrained(str(tiny_checkpoint), **option)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_seq_len", "max_seq_length"),
        ("fast_infernce", "fast_inference"),
        ("load_in_8bits", "load_in_8bit"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
    ],
)
def test_a_misspelt_parameter_is_answered_with_the_nearest_valid_one(
    wrong: str, right: str
) -> None:
    options: dict[str, Any] = {wrong: 1}
    with pytest.raises(TypeError, match=f"no parameter '{wrong}': did you mean {right}"):
        PolicyModel.from_pretrained("model", **options)


def test_a_parameter_without_effect_is_taken_and_says_so(
    loaded: PolicyModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded.get_peft_model(r=4, max_seq_length=128, use_gradient_checkpointing="unsloth")
    (record,) = caplog.records
    assert "max_seq_length=128) has no effect" in record.getMessage()


def test_get_peft_model_is_called_on_the_model_or_on_the_class(loaded: PolicyModel) -> None:
    assert PolicyModel.get_peft_model(loaded, r=4, target_modules=["q_proj", "v_proj"]) is loaded
    modules = {name.split(".")[-4] for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert modules == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"r is 64.* load it with max_lora_rank=64"):
        loaded.get_peft_model(r=64)
    with pytest.raises(
        ValueError, match=r"this LoRA is not supported: rank: .* greater than or equal"
    ):
        loaded.get_peft_model(r=0)
    with pytest.raises(ValueError, match=r"lora_dropout=0.1.* is not supported"):
        loaded.get_peft_model(r=4, lora_dropout=0.1)


def test_a_longer_context_than_the_models_is_cut_to_it(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="services.trainer"):
        model, _ = PolicyModel.from_pretrained(
            str(tiny_checkpoint), max_seq_length=4096, device="cpu"
        )
    assert model.max_seq_length == 512
    assert "max_seq_length=4096 is more than the 512 positions" in caplog.text


# --- forward ------------------------------------------------------------------------------------


def by_transformers(model: PolicyModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].float()
    table = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return table.gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_logprobs_are_those_of_transformers_logits(model: PolicyModel) -> None:
    found = model.logprobs(PROMPTS, COMPLETIONS)
    assert found.mask.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [True, True, True, True],
    ]
    for row, prompt, ids in zip(found.logprobs, PROMPTS, COMPLETIONS, strict=True):
        expected = by_transformers(model, prompt, ids)
        torch.testing.assert_close(row[: len(ids)], expected, atol=0.03, rtol=0)


def test_a_temperature_divides_the_logits(model: PolicyModel) -> None:
    hot = model.logprobs(PROMPTS, COMPLETIONS, temperature=100.0)
    uniform = torch.full_like(hot.logprobs[hot.mask], 1 / 16).log()
    torch.testing.assert_close(hot.logprobs[hot.mask], uniform, atol=0.2, rtol=0)
    torch.testing.assert_close(hot.entropy[hot.mask], -uniform, atol=0.01, rtol=0)


def test_the_gradient_does_not_depend_on_how_many_positions_are_computed_at_once(
    model: PolicyModel,
) -> None:
    gradients = []
    for max_positions in (8192, 8):
        found = model.logprobs(PROMPTS, COMPLETIONS, max_positions=max_positions)
        (found.logprobs - 0.1 * found.entropy)[found.mask].sum().backward()
        gradients.append(gradient_of(model))
        model.zero_grad()
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=0.02 * float(whole.abs().max()), rtol=0)


def test_the_reference_is_the_base_and_has_no_gradient(model: PolicyModel) -> None:
    reference = model.reference_logprobs(PROMPTS, COMPLETIONS)
    assert not reference.logprobs.requires_grad
    policy = model.logprobs(PROMPTS, COMPLETIONS)
    effect = (policy.logprobs.detach() - reference.logprobs)[policy.mask].abs().mean()
    assert float(effect) > 0.1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    fresh = model.logprobs(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(fresh.logprobs[fresh.mask], reference.logprobs[fresh.mask])


def test_a_value_head_reads_one_state_per_token(model: PolicyModel) -> None:
    assert model.hidden_states(PROMPTS, COMPLETIONS).shape == (3, 4, 128)


def test_prompts_and_completions_must_be_as_many_and_have_tokens(model: PolicyModel) -> None:
    with pytest.raises(ValueError, match="3 prompts and 2 completions"):
        model.logprobs(PROMPTS, COMPLETIONS[:2])
    with pytest.raises(ValueError, match="completion 1 or its prompt has no token"):
        model.logprobs(PROMPTS[:2], [[4], []])


def test_a_plain_call_on_a_gpu_layout_is_recomputed_with_the_mask_it_had(
    tiny_checkpoint: Path,
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids, mask = torch.tensor([[0, 1, 5, 6], [1, 5, 6, 7]]), torch.ones(2, 4, dtype=torch.int64)
    mask[0, 0] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with plain_attention(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()  # recomputes the layers
    assert model.config._attn_implementation == NAME
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- modes --------------------------------------------------------------------------------------


def test_a_mode_is_for_good_or_for_a_block(model: PolicyModel) -> None:
    assert model.for_training() is model
    with model.for_inference() as inside:
        assert inside is model
        assert not model.training
        assert model.tokenizer.padding_side == "left"
        with model.for_training():
            assert model.training
        assert not model.training
    assert model.training
    assert model.tokenizer.padding_side == "right"
    model.for_inference()
    assert not model.training
    model.for_training()
    assert model.training


def test_transformers_generates_in_either_mode_and_leaves_it(model: PolicyModel) -> None:
    ids = torch.tensor([PROMPTS[0]])
    answers = []
    for enter in (model.for_training, model.for_inference):
        enter()
        was_training = model.training
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                do_sample=False,
            ).tolist()
        )
        assert model.training == was_training
    assert answers[0] == answers[1]


def test_gradients_after_transformers_has_generated_are_those_before(model: PolicyModel) -> None:
    def gradient() -> list[torch.Tensor]:
        found = model.logprobs(PROMPTS, COMPLETIONS)
        found.logprobs[found.mask].sum().backward()
        gradients = gradient_of(model)
        model.zero_grad()
        return gradients

    before = gradient()
    ids = torch.tensor([PROMPTS[0]])
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    for first, second in zip(before, gradient(), strict=True):
        torch.testing.assert_close(first, second)


def test_without_an_engine_the_fast_ways_say_how_to_get_one(model: PolicyModel) -> None:
    assert not hasattr(model, "vllm_engine")
    for fast in (model.fast_generate, model.fast_generate_batches):
        with pytest.raises(RuntimeError, match="load it with fast_inference=True, or use model"):
            fast(["s1="])
    with pytest.raises(RuntimeError, match="restore_lora"):
        model.load_lora("anywhere")


# --- adapters -----------------------------------------------------------------------------------


def test_a_saved_adapter_is_peft_s_and_comes_back(
    model: PolicyModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("stays")
    model.save_lora(tmp_path)
    before = model.logprobs(PROMPTS, COMPLETIONS)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert PeftModel.from_pretrained(base, tmp_path).peft_config["default"].r == 8
    model.get_peft_model(r=16, lora_alpha=16, random_state=1)
    model.restore_lora(tmp_path)  # has half the rank and twice the scaling
    after = model.logprobs(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(after.logprobs, before.logprobs, atol=0.05, rtol=0)
    assert (tmp_path / "mine.txt").read_text() == "stays"


def test_the_whole_rank_trains_on_from_an_adapter_of_a_smaller_one(
    model: PolicyModel, tmp_path: Path
) -> None:
    model.get_peft_model(r=4, target_modules=["q_proj"])
    model.save_lora(tmp_path)
    model.get_peft_model(r=16)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.fill_(torch.nan)  # restoring must overwrite every value
    model.restore_lora(tmp_path)
    found = model.logprobs(PROMPTS, COMPLETIONS)
    base = model.reference_logprobs(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found.logprobs, base.logprobs)
    found.logprobs[found.mask].sum().backward()
    of_b = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(of_b) == 7 * 4
    for gradient in of_b:
        assert gradient is not None
        assert gradient.shape[1] == 16
        assert gradient.any(0).all()  # no column is all zero
    model.zero_grad()


def test_training_goes_on_from_a_folder_with_an_adapter(model: PolicyModel, tmp_path: Path) -> None:
    model.save_lora(tmp_path / "saved")
    before = model.logprobs(PROMPTS, COMPLETIONS)
    again, _ = PolicyModel.from_pretrained(str(tmp_path / "saved"), max_lora_rank=4, device="cpu")
    after = again.logprobs(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(after.logprobs, before.logprobs, atol=0.05, rtol=0)


def test_an_adapter_that_does_not_fit_is_refused(model: PolicyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_config.json: name a folder that"):
        model.restore_lora(tmp_path)
    model.save_lora(tmp_path)
    model.get_peft_model(r=4)
    with pytest.raises(ValueError, match=r"has rank 8, this model's LoRA has 4: load .*rank=8"):
        model.restore_lora(tmp_path)
    model.get_peft_model(r=8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="which this model's LoRA does not have"):
        model.restore_lora(tmp_path)


# --- the engine ---------------------------------------------------------------------------------


def test_a_model_that_nobody_holds_is_freed_and_its_engine_closed(
    loaded: PolicyModel, replica: FakeReplica
) -> None:
    def load_and_forget() -> tuple[Callable[[], PolicyModel | None], Any]:
        model = with_engine(loaded, replica)
        return weakref.ref(model), model.vllm_engine.close

    model, close = load_and_forget()
    gc.collect()
    assert model() is None
    assert not close.alive


def test_a_model_ends_a_run_of_its_own_on_a_replica_and_not_that_of_another_model(
    loaded: PolicyModel, replica: FakeReplica
) -> None:
    model = with_engine(loaded, replica)
    replica.newest = replica.served = model.policy.id.model_copy(update={"version": 3})
    try:
        model.get_peft_model(r=4)
        assert model.policy.id.run_id != replica.newest.run_id
        with pytest.raises(RunConflict, match=f"still serves run '{replica.newest.run_id}'"):
            with_engine(loaded, replica)
    finally:
        model.close()


@pytest.fixture
def serving(loaded: PolicyModel, replica: FakeReplica) -> Iterator[PolicyModel]:
    model = with_engine(loaded, replica)
    yield model
    model.close()


def test_who_generates_while_the_engine_is_closed_is_told(
    serving: PolicyModel, replica: FakeReplica
) -> None:
    replica.token_s = 3600
    answers: queue.Queue[str] = queue.Queue()

    def generate() -> None:
        try:
            serving.fast_generate([1, 5], max_tokens=2)
        except RuntimeError as error:
            answers.put(str(error))

    threading.Thread(target=generate, daemon=True).start()
    assert eventually(lambda: replica.num_streams == 1, timeout_s=20)
    serving.close()
    told = "the engine was closed before it had answered: load the model again"
    assert answers.get(timeout=20) == told
    with pytest.raises(RuntimeError, match="the engine was closed: load the model again"):
        serving.fast_generate([1, 5], max_tokens=2)


def save_another(model: PolicyModel, folder: Path) -> Path:
    """Save an adapter that differs from every other."""
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.5)
    model.save_lora(folder)
    return folder


def sampled_by(model: PolicyModel, lora_request: Any) -> PolicyId:
    (output,) = model.vllm_engine.generate(
        [1, 5], max_tokens=2, detokenize=False, lora_request=lora_request
    )
    return output.policy


def test_an_adapter_that_is_loaded_again_is_the_same_version_and_uploaded_once(
    serving: PolicyModel, replica: FakeReplica, tmp_path: Path
) -> None:
    request = serving.load_lora(save_another(serving, tmp_path / "one"))
    assert serving.load_lora(tmp_path / "one") == request
    like_vllm = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(tmp_path / "one"))
    assert {sampled_by(serving, like_vllm) for _ in range(3)} == {request.policy}
    assert replica.uploads == [request.policy]
    save_another(serving, tmp_path / "one")
    assert serving.load_lora(tmp_path / "one").policy.version == request.policy.version + 1


def test_of_many_loaded_adapters_the_first_is_read_from_its_folder_again(
    serving: PolicyModel, tmp_path: Path
) -> None:
    requests = [
        serving.load_lora(save_another(serving, tmp_path / str(number))) for number in range(9)
    ]
    assert serving.vllm_engine.kept(requests[0].policy) is None
    assert sampled_by(serving, requests[0]) == requests[0].policy
    save_another(serving, tmp_path / "1")  # this version has been dropped too
    with pytest.raises(ValueError, match=r"/1 has changed since it was loaded as own-\S+@2, which"):
        sampled_by(serving, requests[1])


# --- prompts and sampling -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("s1=", ["s1="]),
        (["s1=", "s2="], ["s1=", "s2="]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        (torch.tensor([[1, 2], [3, 4]]), [(1, 2), (3, 4)]),
        (torch.tensor([1, 2]), [(1, 2)]),
        ({"prompt_token_ids": [1, 2]}, [(1, 2)]),
        ({"prompt_token_ids": torch.tensor([1, 2])}, [(1, 2)]),
        ([{"prompt": "s1="}, {"prompt_token_ids": [1]}], ["s1=", (1,)]),
        (
            [{"role": "user", "content": "s1"}],
            [(ChatMessage(role="user", content="s1"),)],
        ),
        (
            [[{"role": "user", "content": "s1"}], [{"role": "user", "content": "s2"}]],
            [
                (ChatMessage(role="user", content="s1"),),
                (ChatMessage(role="user", content="s2"),),
            ],
        ),
    ],
)
def test_a_prompt_is_text_ids_a_dict_or_messages(given: Any, prompts: list[Any]) -> None:
    assert read_prompts(given) == prompts


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "there is no prompt"),
        ([{"text": "s1="}], "prompt 0 is a dict with 'text': it needs 'prompt_token_ids'"),
        ([torch.tensor(5)], "prompt 0 is no text, no token ids and no chat messages"),
        (["s1=", 3.5], "prompt 1 is no text, no token ids and no chat messages"),
    ],
)
def test_what_is_no_prompt_is_named(given: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_prompts(given)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (torch.tensor([[0, 0, 5], [1, 5, 6]]), 0),
        (torch.tensor([[1, 5, 6], [5, 0, 0]]), 1),
        ([{"prompt_token_ids": torch.tensor([5, 0])}], 0),
    ],
)
def test_padding_is_no_prompt(given: Any, number: int) -> None:
    with pytest.raises(ValueError, match=f"prompt {number} is an array .* pad token 0, which"):
        read_prompts(given, pad_token_id=0)


def test_the_engine_knows_what_the_callers_tokenizer_pads_with(serving: PolicyModel) -> None:
    tokenizer = serving.tokenizer
    padded = tokenizer(["s1=", "s123="], padding=True, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=f"the pad token {tokenizer.pad_token_id}, which would"):
        serving.fast_generate(padded, max_tokens=2)
    with pytest.raises(ValueError, match="give lists of ids without padding"):
        serving.fast_generate_batches(padded, max_tokens=2)


def test_sampling_is_read_from_an_object_a_dict_or_keywords() -> None:
    expected = SamplingParams(n=8, temperature=0.7, max_tokens=64, stop=("=",))
    like_vllm = SimpleNamespace(
        n=8, temperature=0.7, max_tokens=64, stop=["="], stop_token_ids=None, top_k=-1, logprobs=1,
        prompt_logprobs=None, bad_words=[], logit_bias=None, skip_special_tokens=True, _private=1,
    )  # fmt: skip
    assert read_sampling(like_vllm) == expected
    assert read_sampling({"n": 8, "temperature": 0.7, "max_tokens": 64, "stop": "="}) == expected
    assert read_sampling(n=8, temperature=0.7, max_tokens=64, stop=["="], logprobs=0) == expected
    assert read_sampling(expected, n=2).n == 2


class LikeVllm:
    """Lists its fields like a msgspec.Struct, as vLLM's SamplingParams do."""

    __struct_fields__ = ("n", "of_tomorrow", "_private")
    __struct_defaults__ = (False, 7)

    def __init__(self, n: int = 1, *, of_tomorrow: bool = False) -> None:
        self.n, self.of_tomorrow, self._private = n, of_tomorrow, 7
        self.cached = "no field"


def test_a_default_that_is_not_known_here_asks_for_nothing() -> None:
    assert read_sampling(LikeVllm(n=3)) == SamplingParams(n=3)


def test_vllms_own_parameters_are_read_and_none_of_its_fields_is_lost() -> None:
    vllm = pytest.importorskip("vllm.sampling_params")
    assert read_sampling(vllm.SamplingParams(n=2, temperature=0.7, stop=["="])) == SamplingParams(
        n=2, temperature=0.7, stop=("=",), max_tokens=16
    )
    found = vllm.RepetitionDetectionParams(max_pattern_size=2, min_count=2)
    with pytest.raises(ValueError, match="repetition_detection is not supported"):
        read_sampling(vllm.SamplingParams(repetition_detection=found))


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"temprature": 1}, "no sampling parameter 'temprature': did you mean temperature"),
        ({"logprobs": 5}, "logprobs=5: a replica returns logprobs of the sampled tokens alone"),
        ({"logprobs": -1}, "logprobs=-1: a replica returns logprobs of the sampled tokens alone"),
        ({"logit_bias": {3: 1.0}}, "logit_bias is not supported by a replica"),
        ({"repetition_detection": {"min_count": 2}}, "repetition_detection is not supported"),
        ({"logprob_token_ids": [3]}, "logprob_token_ids is not supported"),
        (
            {"prompt_logprob_token_ids": torch.ones(2, 2)},
            "prompt_logprob_token_ids is not supported",
        ),
        ({"sampling_params": SimpleNamespace(n=2, watermarking=True)}, "watermarking is not"),
        ({"sampling_params": SimpleNamespace(n=2, extra_args={"a": 1})}, "extra_args is not"),
        ({"sampling_params": SimpleNamespace(n=2, of_tomorrow=1)}, "of_tomorrow is not supported"),
        ({"sampling_params": LikeVllm(of_tomorrow=True)}, "of_tomorrow is not supported"),
        ({"temperature": -1}, "sampling parameter temperature"),
        ({"sampling_params": 7}, "give vLLM's SamplingParams, a dict, or keywords"),
    ],
)
def test_a_sampling_parameter_that_cannot_be_honoured_is_named(
    named: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_sampling(named.pop("sampling_params", None), **named)
