"""From prompts and answers as text to token ids, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import InvalidRequest
from shared.schemas import ChatMessage, PromptInput

_CHARACTERS_PER_TOKEN = 16  # Most texts have 3 to 5.
_MAX_CHARACTERS_PER_TOKEN = 128  # The longest tokens of common vocabularies are blanks.
_CUT_TOKENS = 64


class PromptEncoder:
    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, model_dir: Path) -> PromptEncoder:
        from transformers import AutoConfig, AutoTokenizer

        text_config = AutoConfig.from_pretrained(model_dir).get_text_config()
        return cls(AutoTokenizer.from_pretrained(model_dir), text_config.vocab_size)

    def encode(self, prompt: PromptInput, *, max_tokens: int | None = None) -> tuple[int, ...]:
        """The token ids of a prompt. A chat is rendered up to the start of the assistant's answer.

        Raises InvalidRequest for a token id out of vocabulary, a chat that cannot be rendered, and
        a text that is clearly longer than `max_tokens`, in time proportional to `max_tokens`.
        """
        if isinstance(prompt, str):
            return self._tokenize(prompt, max_tokens)
        if isinstance(prompt[0], ChatMessage):
            messages = [
                message.model_dump(mode="json", exclude_none=True)
                for message in prompt
                if isinstance(message, ChatMessage)
            ]
            text = self._render(messages)
            return self._tokenize(text, max_tokens, add_special_tokens=False)
        ids = tuple(token for token in prompt if isinstance(token, int))
        self.check_vocabulary(ids)
        return ids

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """The token ids of a complete answer, which ends with the tokenizer's EOS token.

        Raises InvalidRequest if the tokenizer has no EOS token.
        """
        end = self._tokenizer.eos_token_id
        if end is None:
            raise InvalidRequest(
                "this model's tokenizer has no EOS token, which must end an answer: use another "
                "tokenizer"
            )
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return ids if ids[-1:] == (end,) else (*ids, end)

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of a completion or prompt, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token, or the name of a special one; \ufffd for a part of a character."""
        return str(self._tokenizer.decode([token]))

    def _tokenize(self, text: str, max_tokens: int | None, **options: Any) -> tuple[int, ...]:
        if max_tokens is not None:
            self._check_length(text, max_tokens, **options)
        return tuple(self._tokenizer.encode(text, **options))

    def _check_length(self, text: str, max_tokens: int, **options: Any) -> None:
        """Raise InvalidRequest for a text whose beginning has too many tokens already."""
        num_characters = _CHARACTERS_PER_TOKEN * max_tokens
        while num_characters < len(text):
            is_too_long = len(text) > _MAX_CHARACTERS_PER_TOKEN * max_tokens
            if not is_too_long:
                # The cut changes the last tokens of the part only.
                part = self._tokenizer.encode(text[:num_characters], **options)
                is_too_long = len(part) > max_tokens + _CUT_TOKENS
            if is_too_long:
                raise InvalidRequest(
                    f"a prompt of {len(text)} characters has more than {max_tokens} tokens, the "
                    "most that a prompt and its completion may have together: shorten it"
                )
            num_characters *= 4  # Its tokens are long, as those of blank lines are.

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequest(
                "this model has no chat template: send the prompt as text or token ids"
            )
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:  # For example if roles do not alternate.
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from error
        return text

    @property
    def ordinary_token_ids(self) -> tuple[int, ...]:
        """The ids of tokens that stand for text, in ascending order."""
        special = set(self._tokenizer.all_special_ids)
        num_known = min(self.vocab_size, len(self._tokenizer))  # Models pad their vocabulary.
        return tuple(token for token in range(num_known) if token not in special)

    def check_vocabulary(self, ids: tuple[int, ...]) -> None:
        if (largest := max(ids)) >= self.vocab_size:
            raise InvalidRequest(
                f"token id {largest} is out of vocabulary: the largest id is {self.vocab_size - 1}"
            )
