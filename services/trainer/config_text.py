"""The text of a config, and where in it a mistake is: YAML or JSON ─▶ a pydantic model, or one
sentence with the line, the key and the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import SafeConstructor

from shared.errors import shown

Model = TypeVar("Model", bound=BaseModel)
MAX_CONFIG_BYTES = 1 << 20
_MAX_VALUES = 10_000  # Keys count too, and an alias as all that it stands for.
_MAX_DEPTH = 64
_MAX_NUMBER_CHARACTERS = 100  # To convert one in base 60, which YAML has, is quadratic work.
_MAX_PLACES = 2  # Suggested places for a misplaced key, at most.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_TEXT = "tag:yaml.org,2002:str"


def parse_config(text: str | bytes, model: type[Model], *, name: str) -> Model:
    """A `model` from YAML or JSON; `name` names it in errors. Raises ValueError in one sentence.

    Whatever the text is, the work is linear in its size, which MAX_CONFIG_BYTES bounds.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(
            f"the {name} has {len(text)} bytes, the limit is {MAX_CONFIG_BYTES}: send settings "
            "alone, and name data by its path"
        )
    root = None
    try:
        value = _from_json(text, name)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        root, value = _from_yaml(text, name)
    if not isinstance(value, Mapping):
        raise ValueError(f"the {name} must be a mapping of settings")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key is often the reason why another is missing.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        place = _Place.of(first["loc"], model)
        problem = _problem(first, place, model, name)
        line = _line(root, place.path)
        has_lines = len(text.splitlines()) > 1
        raise ValueError(f"{problem} (line {line})" if line and has_lines else problem) from error


def _from_json(text: str | bytes, name: str) -> Any:
    value = json.loads(text, object_pairs_hook=_mapping, parse_int=_integer)
    waiting, num_values = [value], 0
    while waiting:
        num_values += 1
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        if num_values + len(waiting) > _MAX_VALUES:
            raise _too_large(name)
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} is there twice: leave one out")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number has {len(digits)} digits: no setting takes such a number")
    return int(digits)


def _from_yaml(text: str | bytes, name: str) -> tuple[yaml.Node | None, Any]:
    """The tree of the text, and its value."""
    try:
        _refuse_large(text, name)
        root = yaml.compose(text, Loader=_LOADER)
        _refuse_unusable(root)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"the {name} is neither YAML nor JSON: {problem:.300}") from error
    try:
        return root, SafeConstructor().construct_document(root) if root else None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 31st of February.
        problem = " ".join(str(error).split())
        raise ValueError(f"the {name} has a value that YAML cannot read: {problem:.300}") from error


def _refuse_large(text: str | bytes, name: str) -> None:
    """Raise ValueError for more values or levels than a config can have.

    From the events, before there is a tree: libyaml would recurse until the stack ends, and aliases
    of aliases make a tree of 2^n values from n lines.
    """
    num_values = 0
    sizes: dict[str | None, int] = {}  # By anchor.
    opened: list[tuple[str | None, int]] = []  # The open collections, and the values before each.
    for event in yaml.parse(text, Loader=_LOADER):
        match event:
            case yaml.AliasEvent(anchor=anchor):
                if anchor not in sizes:  # PyYAML would close the circle.
                    raise ValueError(
                        f"the alias {shown(anchor)} {_where(event)} stands before the end of what "
                        "it names: write the value there"
                    )
                num_values += sizes[anchor]
            case yaml.ScalarEvent(anchor=anchor):
                sizes[anchor] = 1
                num_values += 1
            case yaml.CollectionStartEvent(anchor=anchor):
                sizes.pop(anchor, None)
                opened.append((anchor, num_values))
                num_values += 1
            case yaml.CollectionEndEvent():
                anchor, num_before = opened.pop()
                sizes[anchor] = num_values - num_before
        if num_values > _MAX_VALUES or len(opened) > _MAX_DEPTH:
            raise _too_large(name)
        if tag := getattr(event, "tag", None):
            raise ValueError(f"the tag {shown(tag)} {_where(event)} is not needed: remove it")


def _where(part: yaml.Event | yaml.Node) -> str:
    return f"in line {part.start_mark.line + 1}" if part.start_mark else "of the text"


def _too_large(name: str) -> ValueError:
    return ValueError(
        f"the {name} has more than {_MAX_VALUES} values or {_MAX_DEPTH} levels, counting what "
        "aliases repeat: send settings alone, and name data by its path"
    )


def _refuse_unusable(root: yaml.Node | None) -> None:
    """Raise ValueError for a duplicate key, of which YAML would take the last, and long numbers."""
    waiting = [root] if root else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, item in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in lines:
                    raise ValueError(
                        f"key {shown(key.value)} is there twice, in lines {lines[key.value]} and "
                        f"{line}: leave one out"
                    )
                if isinstance(key, yaml.ScalarNode):
                    lines[key.value] = line
                waiting += key, item
        elif node.tag != _TEXT and len(node.value) > _MAX_NUMBER_CHARACTERS:
            raise ValueError(
                f"the number {_where(node)} has {len(node.value)} characters: no setting takes "
                "such a number"
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where pydantic found a mistake, as the writer of the config sees it."""

    path: tuple[str | int, ...]  # Keys and indices, without the tags of unions.
    owner: type[BaseModel] | None  # Model that has the last of them as a field.
    tag: str | None  # Tag of that model when it is one of several.

    @classmethod
    def of(cls, location: Sequence[str | int], root: type[BaseModel]) -> _Place:
        path: list[str | int] = []
        choices: list[type[BaseModel]] = [root]
        owner: type[BaseModel] | None = None
        owner_tag: str | None = None
        tag: str | None = None
        for part in location:
            if isinstance(part, int):
                path.append(part)
            elif len(choices) > 1:
                choices, tag = [choice for choice in choices if part in _tags(choice)], part
            else:
                path.append(part)
                owner, owner_tag, tag = (choices[0] if choices else None), tag, None
                field = owner.model_fields.get(part) if owner else None
                choices = list(dict.fromkeys(_models(field.annotation))) if field else []
        return cls(tuple(path), owner, owner_tag)

    def __str__(self) -> str:
        return ".".join(str(part) for part in self.path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type; `tuple[A | B, ...] | None` has two."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _tags(model: type[BaseModel]) -> set[str]:
    """The values by which a union selects the model."""
    return {
        value
        for name in ("type", "name")
        if name in model.model_fields
        for value in get_args(model.model_fields[name].annotation)
        if get_origin(model.model_fields[name].annotation) is Literal
    }


def _problem(error: Any, place: _Place, model: type[BaseModel], name: str) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(place, model)
        case "missing":
            return f"{place} is missing: it has no default"
        case "union_tag_invalid":
            tags = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
            near = difflib.get_close_matches(context["tag"], tags, n=1)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            return (
                f"{place} has an unknown {_bare(context)} {shown(context['tag'])}: {hint} "
                f"{', '.join(tags)}"
            )
        case "union_tag_not_found":
            return f"{place} must be a mapping with a {_bare(context)}"
        case _:
            field, value = str(place) or name, error.get("input")
            if error["type"] != "value_error" and isinstance(value, str | int | float | None):
                field = f"{field} is {shown(value)}"
            return f"{field}: {error['msg'].removeprefix('Value error, ')}"


def _bare(context: Mapping[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


def _unknown_key(place: _Place, root: type[BaseModel]) -> str:
    """The complaint about the last key of a path, which its model does not have."""
    key, valid = str(place.path[-1]), list(place.owner.model_fields) if place.owner else []
    found = dict.fromkeys(path for path in _paths(root) if path.rpartition(".")[2] == key)
    # Places where other members of its union have it.
    elsewhere = [path for path in found if path != str(place)]
    kind = f" of {place.tag}" if place.tag else ""
    if near := difflib.get_close_matches(key, valid, n=1):
        hint = f"did you mean {near[0]!r}?"
    elif 1 <= len(elsewhere) <= _MAX_PLACES:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    else:
        hint = f"the keys there are {', '.join(valid)}"
    return f"unknown key {shown(str(place))}{kind}: {hint}"


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings below a model, except those in items of a list."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if get_origin(field.annotation) is not tuple:
            for inner in _models(field.annotation):
                yield from _paths(inner, f"{prefix}{name}.")


def _line(root: yaml.Node | None, path: Sequence[str | int]) -> int | None:
    """The line of the last existing part of `path`, from 1; None for the whole text."""
    node: Any = root
    line: int | None = None
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            items = [(item, item) for item in node.value[part : part + 1]]
        elif isinstance(node, yaml.MappingNode):
            items = [(key, item) for key, item in node.value if key.value == part]
        else:
            items = []
        if not items:
            break
        start, node = items[0]
        line = start.start_mark.line + 1
    return line
