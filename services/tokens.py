"""From prompts and answers as text to token ids, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import InvalidRequest
from shared.schemas import ChatMessage, PromptInput


class PromptEncoder:
    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, model_dir: Path) -> PromptEncoder:
        from transformers import AutoConfig, AutoTokenizer

        text_config = AutoConfig.from_pretrained(model_dir).get_text_config()
        return cls(AutoTokenizer.from_pretrained(model_dir), text_config.vocab_size)

    def encode(self, prompt: PromptInput) -> tuple[int, ...]:
        """The token ids of a prompt. A chat is rendered up to the start of the assistant's answer.

        Raises InvalidRequest for a token id out of vocabulary and a chat that cannot be rendered.
        """
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        if isinstance(prompt[0], ChatMessage):
            return self._encode_chat(
                [
                    message.model_dump(mode="json", exclude_none=True)
                    for message in prompt
                    if isinstance(message, ChatMessage)
                ]
            )
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

    def _encode_chat(self, messages: list[dict[str, Any]]) -> tuple[int, ...]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequest(
                "this model has no chat template: send the prompt as text or token ids"
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:  # For example if roles do not alternate.
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

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
