"""Datasets become prompts; the stream is a function of seed and position."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from jinja2 import TemplateError

from services.tokens import PromptEncoder
from services.trainer.data.datasets import load_pairs, load_prompts
from services.trainer.data.rows import Consumed, ConsumedState, Prompt, RowStream
from services.trainer.run.pairs import PairsInOrder
from services.trainer.run_config import FileDataset, PreferenceDataset, SortDigitsDataset
from shared.errors import InvalidRequest
from shared.schemas import ChatMessage, PreferencePair

PROMPTS = [Prompt(str(i), (i,), {}) for i in range(10)]


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(tiny_checkpoint)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_an_epoch_has_every_prompt_once_in_an_order_of_its_own() -> None:
    stream = RowStream(PROMPTS, seed=0)
    first, second = (texts([stream.at(10 * epoch + i) for i in range(10)]) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(texts(PROMPTS))
    assert first != second


def test_the_prompt_at_a_position_depends_on_the_seed_alone() -> None:
    """trl#7036: resuming past the end of an epoch. Any position can be asked for first."""
    whole = [RowStream(PROMPTS, seed=3).at(position) for position in range(45)]
    stream = RowStream(PROMPTS, seed=3)
    assert [stream.at(position) for position in reversed(range(45))] == whole[::-1]
    assert [RowStream(PROMPTS, seed=4).at(position) for position in range(45)] != whole


def test_a_late_group_holds_back_no_position_but_its_own() -> None:
    """trl#7274: one group that was dropped pinned the resume position for the rest of the run."""
    consumed = Consumed()
    consumed.add([0, 2, 3])
    assert (consumed.next, consumed.beyond, len(consumed)) == (1, {2, 3}, 3)
    assert [position in consumed for position in range(5)] == [True, False, True, True, False]
    consumed.add([1])
    assert (consumed.next, consumed.beyond, len(consumed)) == (4, set(), 4)


@pytest.mark.parametrize("positions", [[0], [2], [5, 3], [4, 4]])
def test_no_position_is_consumed_twice(positions: list[int]) -> None:
    consumed = Consumed()
    consumed.add([0, 1, 3])
    with pytest.raises(ValueError, match="were consumed already"):
        consumed.add([*positions, 2])
    assert consumed.state == ConsumedState(next=2, beyond=(3,))


def test_what_was_consumed_survives_as_json() -> None:
    consumed = Consumed()
    consumed.add([0, 4, 2])
    state = ConsumedState.model_validate_json(consumed.state.model_dump_json())
    assert Consumed(state).state == consumed.state
    assert consumed.state == ConsumedState(next=1, beyond=(2, 4))


def test_the_demo_task_never_trains_on_a_held_out_prompt(encoder: PromptEncoder) -> None:
    config = SortDigitsDataset(num_prompts=2000)
    train = load_prompts(config, encoder, seed=0)
    held_out = load_prompts(config, encoder, seed=0, held_out=True)
    assert len(train) == 2000
    assert len(held_out) == 256
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert all("".join(sorted(p.text[1:-1])) == p.columns["answer"] for p in [*train, *held_out])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_give_text_or_chat_prompts_and_their_other_columns(
    kind: str, encoder: PromptEncoder, tmp_path: Path
) -> None:
    rows = [{"prompt": "s12=", "answer": "12"}, {"prompt": "s31=", "answer": "13"}]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    prompts = load_prompts(FileDataset(type=kind, path=str(path)), encoder, seed=0)
    assert texts(prompts) == ["s12=", "s31="]
    assert prompts[0].token_ids == (1, 15, 4, 5, 14)
    assert prompts[1].columns == {"answer": "13"}


def test_a_chat_prompt_is_rendered_by_the_template(encoder: PromptEncoder, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "s12"}]}) + "\n")
    config = FileDataset(type="jsonl", path=str(path), prompt_column="messages")
    (prompt,) = load_prompts(config, encoder, seed=0)
    assert prompt.token_ids == encoder.encode("s12=")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "s1="}', "row 0 of .* has no column 'prompt'; it has question"),
        ('{"prompt": 5}', "row 0 of .* must be a text or a list of chat messages"),
        ('{"prompt": ""}', "row 0 of .* at least 1 character"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    line: str, message: str, encoder: PromptEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(FileDataset(type="jsonl", path=str(path)), encoder, seed=0)


def test_a_missing_file_is_named(encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match=r"dataset nowhere.jsonl does not exist"):
        load_prompts(FileDataset(type="jsonl", path="nowhere.jsonl"), encoder, seed=0)


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        ("jsonl", '{"prompt": "a"}\n{{{', "cannot be read as jsonl: JSON parse error"),
        ("jsonl", "", "has no rows"),
        ("parquet", "prompt", "cannot be read as parquet: Parquet file size is 6 bytes"),
    ],
)
def test_a_file_of_another_format_is_named(
    kind: str, content: str, complaint: str, encoder: PromptEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"dataset {path} {complaint}"):
        load_prompts(FileDataset(type=kind, path=str(path)), encoder, seed=0)


# --- pairs --------------------------------------------------------------------------------------


def pairs_of(
    row: dict[str, object], encoder: PromptEncoder, folder: Path, *, max_positions: int = 512
) -> list[PreferencePair]:
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = PreferenceDataset(type="preferences", path=str(path))
    return load_pairs(config, encoder, max_positions=max_positions)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [message("user", "s12")]
EOS = 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "s12=", "chosen": "12", "rejected": "21"},
        {"prompt": "s12=", "chosen": "12<eos>", "rejected": "21"},
        {"prompt": CHAT, "chosen": "12", "rejected": "21"},
        {
            "prompt": CHAT,
            "chosen": [message("assistant", "12")],
            "rejected": [*CHAT, message("assistant", "21")],
        },
    ],
    ids=["text", "ended", "chat", "messages"],
)
def test_an_answer_is_a_text_or_a_last_message_and_ends_with_eos(
    row: dict[str, object], encoder: PromptEncoder, tmp_path: Path
) -> None:
    (pair,) = pairs_of(row, encoder, tmp_path)
    assert pair == PreferencePair(
        prompt_token_ids=encoder.encode("s12="),
        chosen_token_ids=(4, 5, EOS),
        rejected_token_ids=(5, 4, EOS),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": None}, "row 0 of .*: chosen must be a text or a list of chat messages"),
        ({"rejected": ""}, "row 0 of .*: rejected must be a text"),
        ({"rejected": []}, "row 0 of .*: rejected must be a text"),
        ({"rejected": CHAT}, "row 0 of .*: the last message of rejected must be the assistant's"),
        (
            {"rejected": [message("user", "s99"), message("assistant", "99")]},
            "row 0 of .*: the messages of rejected before the answer are not the prompt's",
        ),
        ({"prompt": "s" * 510}, "row 0 of .* has 514 tokens .* the model has 512 positions"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(
    changes: dict[str, object], message: str, encoder: PromptEncoder, tmp_path: Path
) -> None:
    row = {"prompt": "s12=", "chosen": "12", "rejected": "21", **changes}
    with pytest.raises(ValueError, match=message):
        pairs_of(row, encoder, tmp_path)


def test_a_pair_without_its_columns_says_which_there_are(
    encoder: PromptEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no column 'chosen'; it has prompt, good"):
        pairs_of({"prompt": "s12=", "good": "12"}, encoder, tmp_path)


def test_a_tokenizer_without_eos_cannot_end_an_answer() -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(InvalidRequest, match="has no EOS token"):
        PromptEncoder(Endless(), 16).encode_answer("12")


@pytest.mark.anyio
async def test_pairs_come_in_the_order_of_the_stream_except_those_that_are_consumed() -> None:
    rows = [
        PreferencePair(prompt_token_ids=(i,), chosen_token_ids=(1,), rejected_token_ids=(2,))
        for i in range(4)
    ]
    stream = RowStream(rows, seed=0)
    source = PairsInOrder(stream, Consumed(ConsumedState(next=1, beyond=(2,))), batch_size=3)
    batch = await source.take()
    assert batch.positions == [1, 3, 4]
    assert batch.pairs == [stream.at(position) for position in batch.positions]


def test_messages_that_the_chat_template_refuses_are_an_invalid_request(
    encoder: PromptEncoder,
) -> None:
    class Refusing:
        chat_template = "{{ raise_exception('roles must alternate') }}"

        def apply_chat_template(self, *_: object, **__: object) -> str:
            raise TemplateError("roles must alternate")

    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        PromptEncoder(Refusing(), 16).encode((ChatMessage(role="user", content="a"),))


def test_a_pair_of_equal_answers_is_named(tmp_path: Path, encoder: PromptEncoder) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "s21=", "chosen": "12", "rejected": "12"}\n')
    config = PreferenceDataset(type="preferences", path=str(path))
    with pytest.raises(ValueError, match=r"row 0 of .* has the same answer twice"):
        load_pairs(config, encoder, max_positions=64)
