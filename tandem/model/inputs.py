"""What `model.vllm_engine` is given: sampling parameters and prompts in vLLM's shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.boot import one_line
from shared.schemas import ChatMessage, PromptInput, SamplingParams

_PROMPT: TypeAdapter[PromptInput] = TypeAdapter(PromptInput)


# Of vLLM's SamplingParams, what a replica does not do, with the values that ask for nothing: its
# defaults among them.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None, []),
    "logits_processors": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "truncate_prompt_tokens": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "watermarking": (None, False),
    "extra_args": (None, {}),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (None,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "best_of": (None, 1),
}


# Accepted and ignored: these do not change the tokens.
_WITHOUT_EFFECT = (
    "logprobs",
    "output_kind",
    "flat_logprobs",
    "spaces_between_special_tokens",
    "stream_interval",
    "skip_clone",
    "output_text_buffer_length",
    "skip_reading_prefix_cache",
)


def read_sampling(given: Any = None, **named: Any) -> SamplingParams:
    """Sampling parameters by vLLM's names: an object with such attributes, a dict, keywords.

    Raises ValueError for a name or value that a replica cannot honour.
    """
    values = {**_values(given), **named}
    known = set(SamplingParams.model_fields)
    for name, neutral in _UNSUPPORTED.items():
        if name in values and not _is_one_of(values.pop(name), neutral):
            raise _not_served(name)
    if (num_logprobs := values.get("logprobs")) not in (None, 0, 1):
        raise ValueError(
            f"logprobs={num_logprobs}: a replica returns logprobs of the sampled tokens alone; "
            "remove it, or set it to 1"
        )
    for name in _WITHOUT_EFFECT:
        values.pop(name, None)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"there is no sampling parameter {name!r}: {hint}")
    if values.get("top_k") == -1:  # vLLM's other value for off.
        values["top_k"] = 0
    for name in ("stop", "stop_token_ids"):
        value = values.get(name)
        values[name] = (value,) if isinstance(value, str) else tuple(value or ())
    try:
        return SamplingParams.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"sampling parameter {one_line(error)}") from error


def _values(given: Any) -> dict[str, Any]:
    """The values that an object holds; for vLLM's own class, the values of its known fields.

    Raises ValueError for an unknown field that is not at its default.
    """
    if given is None:
        return {}
    if isinstance(given, SamplingParams):
        return given.model_dump()
    if isinstance(given, Mapping):
        return dict(given)
    known = (*SamplingParams.model_fields, *_UNSUPPORTED, *_WITHOUT_EFFECT)
    found = {name: getattr(given, name) for name in known if hasattr(given, name)}
    if not found:
        raise ValueError(
            f"sampling_params is a {type(given).__name__}: give vLLM's SamplingParams, a dict, or "
            "keywords as in generate(prompts, temperature=0.7, n=8)"
        )
    fields = getattr(given, "__struct_fields__", ())  # vLLM's class is a msgspec.Struct.
    defaults = getattr(given, "__struct_defaults__", ())  # Defaults of the last fields.
    neutral = dict(zip(reversed(fields), reversed(defaults), strict=False))
    public = [name for name in fields or getattr(given, "__dict__", ()) if name[0] != "_"]
    for name in set(public).difference(known):
        if not _is_one_of(getattr(given, name), (None, neutral.get(name))):
            raise _not_served(name)
    return found


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return not _is_array(value) and value in neutral


def _not_served(name: str) -> ValueError:
    return ValueError(f"sampling parameter {name} is not supported by a replica: remove it")


def read_prompts(given: Any, *, pad_token_id: int | None = None) -> list[Any]:
    """One prompt or several -> several. A prompt is a text, token ids, {"prompt_token_ids": ids},
    {"prompt": text} or chat messages. Raises ValueError for anything else, and for an array of ids
    that is padded."""
    if isinstance(given, str | Mapping) or _is_prompt(given):
        given = [given]
    prompts = list(given)
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    return [_plain(prompt, number, pad_token_id) for number, prompt in enumerate(prompts)]


def _is_prompt(given: Any) -> bool:
    """Ids or chat messages, rather than several prompts."""
    if _is_array(given):
        return bool(given.ndim == 1)
    if not isinstance(given, Sequence) or not given:
        return False
    first = given[0]
    is_message = isinstance(first, ChatMessage) or (isinstance(first, Mapping) and "role" in first)
    return is_message or (isinstance(first, int) and not isinstance(first, bool))


def _is_array(given: Any) -> bool:
    return hasattr(given, "tolist") and hasattr(given, "ndim")


def _plain(prompt: Any, number: int, pad_token_id: int | None) -> Any:
    if isinstance(prompt, Mapping):
        fitting = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        if not fitting:
            raise ValueError(
                f"prompt {number} is a dict with {', '.join(map(repr, prompt)) or 'nothing'}: it "
                "needs 'prompt_token_ids' or 'prompt'"
            )
        prompt = prompt[fitting[0]]
    if _is_array(prompt):
        ids = prompt.tolist()
        if prompt.ndim == 1 and pad_token_id is not None and pad_token_id in (ids[:1] + ids[-1:]):
            raise ValueError(
                f"prompt {number} is an array that begins or ends with the pad token "
                f"{pad_token_id}, which would be sampled from: give lists of ids without padding"
            )
        prompt = ids
    try:
        return _PROMPT.validate_python(prompt)
    except ValidationError as error:
        raise ValueError(
            f"prompt {number} is no text, no token ids and no chat messages: {one_line(error)}"
        ) from error
