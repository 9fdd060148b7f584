"""The JSON that the live page receives, as JSDoc types: shared/schemas.py ─▶ dashboard/wire.js."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared import schemas

Model = type[BaseModel]
ROOTS: tuple[Model, ...] = (  # What the page asks for.
    schemas.TrainerStatus,
    schemas.ReplicasResponse,
    schemas.CompletionsResponse,
    *get_args(get_args(schemas.RunEvent)[0]),
)
_JAVASCRIPT_NAMES = {str: "string", int: "number", float: "number", bool: "boolean"}


def page_types(models: Iterable[Model]) -> str:
    """The module with a typedef for each of the models, for TypeScript's checker."""
    # StepRecord has the fields of UpdateStats.
    typedefs = [_typedef(model) for model in models if model is not schemas.UpdateStats]
    return (
        "// The types of what the trainer sends: docs/wire.md and docs/metrics.md explain them.\n"
        "// Made by `python -m docs.generate` from shared/schemas.py.\n\n"
        + "".join(typedefs)
        + f"/** @typedef {{{_javascript_type(schemas.RunEvent)}}} RunEvent */\n\nexport {{}};\n"
    )


def _typedef(model: Model) -> str:
    fields = "".join(_property(name, field) for name, field in model.model_fields.items())
    return f"/**\n * @typedef {{object}} {model.__name__}\n{fields} */\n\n"


def _property(name: str, field: FieldInfo) -> str:
    is_absent = not field.is_required() and field.exclude_if and field.exclude_if(field.default)
    text = _javascript_type(field.annotation)
    if is_absent:
        text, name = text.removesuffix(" | null"), f"[{name}]"
    return f" * @property {{{text}}} {name}\n"


def _javascript_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _javascript_type(arguments[0])
    if origin in (Union, UnionType):
        texts = [_javascript_type(item) for item in arguments if item is not NoneType]
        return " | ".join(texts) + (" | null" if NoneType in arguments else "")
    if origin is Literal:
        return " | ".join(f'"{value}"' for value in arguments)
    if origin is tuple:
        assert arguments[1:] == (Ellipsis,), annotation
        item = _javascript_type(arguments[0])
        return f"({item})[]" if " | " in item else f"{item}[]"
    if origin is dict:  # Keys of JSON objects are strings.
        return f"Record<string, {_javascript_type(arguments[1])}>"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return _JAVASCRIPT_NAMES[annotation]
