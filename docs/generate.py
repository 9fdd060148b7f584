"""The reference pages, from the code that they describe: `python -m docs.generate` writes them.

    pydantic models and the comments of their fields  ──▶ settings.md
    both services' OpenAPI, shared/schemas.py, errors ──▶ wire.md
    both services' Prometheus registries              ──▶ the end of metrics.md
    shared/schemas.py, what the live page asks for    ──▶ services/trainer/dashboard/wire.js

What a field means is the comment beside or above it in the source, so it is written once; where a
class replaces an inherited field, the inherited comment stays. A test holds the pages against the
code (tests/docs/test_generated.py).
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from docs.page_types import ROOTS, page_types
from services.rollout import openai_types
from services.rollout.app import create_app as rollout_app
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings
from services.trainer import dashboard
from services.trainer.app import create_app as trainer_app
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared import errors, schemas
from shared.metrics import RolloutMetrics, TrainerMetrics

DOCS = Path(__file__).parent
_PAGE_TYPES = Path(dashboard.__file__).with_name("wire.js")
_NOTE = "<!-- Made by `python -m docs.generate`: edit the code that it comes from. -->\n"
_GENERATED_METRICS = "## Step\n"
_TABLE = "| --- | --- | --- | --- |\n"
_RECORDS = (schemas.StepRecord, schemas.EvalRecord)
Model = type[BaseModel]


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(DOCS.parent))


def pages() -> dict[Path, str]:
    """What each generated page has to hold."""
    metrics = DOCS / "metrics.md"
    by_hand = metrics.read_text().partition(_GENERATED_METRICS)[0].rstrip() + "\n\n"
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "wire.md": wire_page(),
        metrics: by_hand + records_section() + prometheus_section(),
        _PAGE_TYPES: page_types(dict.fromkeys(m for root in ROOTS for m in reachable(root))),
    }


# --- what a field means: its comment -------------------------------------------------------------


def meanings(model: Model) -> dict[str, str]:
    """The comment of each field that has one."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls.__module__.startswith(("services.", "shared.")):
            module = inspect.getmodule(cls)
            assert module
            comments = _comments(inspect.getsource(module))
            found |= {name: text for name, text in comments[cls.__name__].items() if text}
    return found


@cache
def _comments(source: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment on its lines, else those on the lines right above it."""
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {number for number in comments if lines[number - 1].lstrip().startswith("#")}

    def of(field: ast.AnnAssign) -> str:
        assert field.end_lineno
        own = [n for n in range(field.lineno, field.end_lineno + 1) if n in comments]
        above = list(takewhile(alone.__contains__, range(field.lineno - 1, 0, -1)))
        return " ".join(comments[number] for number in own or reversed(above))

    return {
        cls.name: {
            field.target.id: of(field)
            for field in cls.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for cls in ast.parse(source).body
        if isinstance(cls, ast.ClassDef)
    }


# --- types and defaults, readable ----------------------------------------------------------------

_NAMES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    Any: "anything",
    object: "anything",
    NoneType: "none",
    dict[str, Any]: "object",
}


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as a reader of YAML or JSON says it; models are links."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], [*arguments[1:], *metadata])
    bounds = "".join(_bounds(metadata))
    if origin in (Union, UnionType):
        texts = [type_text(item) for item in arguments if item is not NoneType]
        return " or ".join(texts) + bounds + (" or none" if NoneType in arguments else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if not arguments:
            return "empty list"
        if arguments[-1] is Ellipsis:
            limits = [m.max_length for m in metadata if isinstance(m, annotated_types.MaxLen)]
            most = "".join(f", {limit} at most" for limit in limits)
            item = type_text(arguments[0])
            return f"list of ({item}){most}" if " or " in item else f"list of {item}{most}"
        return " and ".join(map(type_text, arguments))
    if origin is dict and annotation not in _NAMES:
        return f"{type_text(arguments[0])} to {type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _NAMES[annotation] + bounds


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for item in metadata:
        for name, sign in signs.items():
            if (bound := getattr(item, name, None)) is not None:
                yield f" {sign} {bound}"
        if isinstance(item, FieldInfo):  # Field() within Annotated
            yield from _bounds(item.metadata)


def default_text(name: str, field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "–"
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_unset=True)
        return ", ".join(f"`{key}: {item}`" for key, item in given.items()) or "its defaults"
    if value is None or value == () or value == {}:
        return "none"
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if name.endswith("_bytes") and value % (1 << 20) == 0:
        return f"{value >> 20} MiB"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _row(*cells: str) -> str:
    text = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return re.sub(r"\b(None|True|False)\b", lambda word: word[0].lower(), text)  # as in YAML


def _fields(model: Model, names: Iterable[str]) -> str:
    said = meanings(model)
    rows = [
        _row(
            f"`{name}`",
            type_text(field.annotation, field.metadata),
            default_text(name, field),
            said.get(name) or ("chooses this one" if _is_tag(name, field) else ""),
        )
        for name, field in model.model_fields.items()
        if name in names
    ]
    return _row("name", "type", "default", "meaning") + _TABLE + "".join(rows)


def _is_tag(name: str, field: FieldInfo) -> bool:
    """Whether the field tells one type of a union from the others."""
    return name in ("name", "type", "kind") and get_origin(field.annotation) is Literal


def _doc(thing: Any) -> str:
    """Its own docstring, one line per paragraph."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return "".join(f"\n{' '.join(part.split())}\n" for part in text.split("\n\n") if part)


def _model_section(model: Model) -> str:
    """Its docstring and fields; those of a base class that is more than a border are there."""
    base = model.__mro__[1]
    is_shown = base.__module__ == model.__module__ and not base.__name__.startswith("_")
    inherits = is_shown and bool(getattr(base, "model_fields", None))
    names = list(model.__annotations__) if inherits else list(model.model_fields)
    more = f"\nAnd all of {type_text(base)}.\n" if inherits else ""
    table = _fields(model, names) if set(names) & set(model.model_fields) else "No fields.\n"
    return f"\n### {model.__name__}\n{_doc(model)}\n{table}{more}"


# --- settings.md ---------------------------------------------------------------------------------


def settings_page() -> str:
    return (
        f"{_NOTE}# Settings\n\n"
        "What the services read from their environment, and every field of a run config. A service "
        "or a run that\nis given something else says in one sentence what, and does not start.\n\n"
        "## Rollout service\n\n" + _environment(RolloutSettings) + "\n"
        "## Trainer service\n\n" + _environment(TrainerSettings) + "\n"
        "## Run config\n\n"
        "YAML or JSON, the body of `POST /runs`. What may be left out has a default.\n"
        + "".join(map(_model_section, reachable(RunConfig)))
    )


def _environment(settings: type[BaseSettings]) -> str:
    prefix, said = settings.model_config.get("env_prefix", ""), meanings(settings)
    rows = [
        _row(
            f"`{field.validation_alias or prefix + name.upper()}`",
            type_text(field.annotation, field.metadata).replace("list of text", "text"),
            default_text(name, field),
            said.get(name, ""),
        )
        for name, field in settings.model_fields.items()
    ]
    return _row("variable", "type", "default", "meaning") + _TABLE + "".join(rows)


def reachable(model: Model) -> list[Model]:
    """`model`, and all models that its fields hold or inherit from, each once."""
    found: list[Model] = []

    def visit(annotation: Any) -> None:
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            for argument in get_args(annotation):
                visit(argument)
        elif annotation.model_fields and annotation not in found:
            if annotation.__mro__[1].__module__ == annotation.__module__:
                visit(annotation.__mro__[1])
            found.append(annotation)
            for field in annotation.model_fields.values():
                visit(field.annotation)

    visit(model)
    return found


# --- wire.md -------------------------------------------------------------------------------------


def wire_page() -> str:
    models = [
        item
        for module in (schemas, openai_types)
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, schemas.Wire)
        and item.__module__ == module.__name__
        and not item.__name__.startswith("_")
        and item is not schemas.Wire
        and item not in (schemas.UpdateStats, *_RECORDS)
    ]
    return (
        f"{_NOTE}# The wire\n\n"
        "JSON, except the adapter file. With `TANDEM_API_KEY` set every route but `/healthz` wants "
        "the header\n`Authorization: Bearer <key>`. Fields that are not listed are refused, as are "
        "numbers that are not finite.\n`GET /openapi.json` of each service says the same to a "
        "program.\n\n"
        "## Rollout routes\n"
        + _routes(rollout_app(Replica(RolloutSettings(model="any"))))
        + "\n## Trainer routes\n"
        + _routes(trainer_app(Trainer(TrainerSettings(model="any"))))
        + "\n## Errors\n\n"
        "Every error is `application/problem+json` (RFC 9457): `type`, `title`, `status` and a "
        "`detail` of one\nsentence, `retry_after_s` where another try may help. `type` is "
        f"`{errors.TYPE_PREFIX}` and a name of this table; the\nPython clients raise the class "
        "of that name ([shared/errors.py](../shared/errors.py)).\n\n" + _errors() + "\n## Types\n\n"
        "`StepRecord` and `EvalRecord`, the numbers of a step and of an evaluation, are in "
        "[metrics.md](metrics.md#step).\n"
        + "".join(map(_model_section, models))
        .replace("(#steprecord)", "(metrics.md#step)")
        .replace("(#evalrecord)", "(metrics.md#evaluation)")
    )


def _routes(app: FastAPI) -> str:
    api = app.openapi()
    return "".join(
        _route(path, method, operation)
        for path, operations in api["paths"].items()
        for method, operation in operations.items()
    )


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    text = f"\n### {method.upper()} {path}\n\n{operation['description']}\n"
    if parameters := operation.get("parameters"):
        rows = [
            _row(
                f"`{item['name']}`",
                item["in"],
                _schema(item["schema"]),
                f"`{item['schema']['default']}`" if "default" in item["schema"] else "–",
            )
            for item in parameters
        ]
        text += "\n" + _row("parameter", "in", "type", "default") + _TABLE + "".join(rows)
    parts = []
    if body := operation.get("requestBody"):
        parts += [
            f"Body: {_schema(content['schema']) if content['schema'] else media_type}"
            for media_type, content in body["content"].items()
        ]
    for status, answer in operation["responses"].items():
        if status != "default":
            schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
            said = answer["description"].replace("Successful Response", "")
            parts.append(f"{status}: {_schema(schema) if schema else said or 'not JSON'}")
    return text + "\n" + " · ".join(parts) + "\n"


def _schema(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    return str(schema.get("type", "object"))


def _errors() -> str:
    """The classes, with what the tree at the head of shared/errors.py says of each."""
    said = dict(re.findall(r"─ (\w+)(?: \d+)?(?:  +(.*))?$", errors.__doc__ or "", re.MULTILINE))

    def rows(parent: type[errors.ServiceError]) -> Iterator[str]:
        for cls in parent.__subclasses__():
            name = cls.__name__
            kind = "" if parent is errors.ServiceError else f"[{parent.__name__}](#errors)"
            yield _row(f"`{name}`", str(cls.status), kind, said[name])
            yield from rows(cls)

    return _row("name", "status", "is a", "meaning") + _TABLE + "".join(rows(errors.ServiceError))


# --- metrics.md ----------------------------------------------------------------------------------


def records_section() -> str:
    """The numbers of a step and of an evaluation, as shared/schemas.py declares them."""
    return (
        f"{_GENERATED_METRICS}\n{_NOTE}\n"
        f"{_paragraphs(schemas.StepRecord)}\n\n{_paragraphs(schemas.UpdateStats)}\n\n"
        f"{_statistics(schemas.StepRecord)}\n## Evaluation\n\n"
        f"{_paragraphs(schemas.EvalRecord)}\n\n{_statistics(schemas.EvalRecord)}\n"
    )


def _paragraphs(model: Model) -> str:
    return inspect.cleandoc(model.__doc__ or "")


def _statistics(model: Model) -> str:
    """The fields of a record in the order of its own, then those of the update."""
    own = [name for name in model.model_fields if name in model.__annotations__]
    names = dict.fromkeys([*own, *model.model_fields])
    rows = []
    for name in names:
        field = model.model_fields[name]
        extra = field.json_schema_extra
        unit = extra["unit"] if isinstance(extra, dict) else "–"
        meaning = field.description or f"`{field.default}`"
        rows.append(_row(f"`{name}`", str(unit), meaning))
    return _row("name", "unit", "meaning") + "| --- | --- | --- |\n" + "".join(rows)


def prometheus_section() -> str:
    return (
        "## Prometheus\n\n"
        "What `GET /metrics` of each service has. The numbers of the latest step and evaluation "
        "are the trainer's\ngauges `tandem_trainer_<name>`, with the names, units and meanings of "
        "above, and `tandem_trainer_policy_version`.\nA replica has vLLM's own besides (`vllm:…`). "
        "A unit is in the name, else it is a count, or 0 or 1.\n"
        "[Alerts](../deploy/prometheus/alerts.yml) and a [dashboard](../deploy/README.md#watch) "
        "are made of these.\n\n"
        f"{_metrics(TrainerMetrics().registry)}\n{_metrics(RolloutMetrics().registry)}"
    )


def _metrics(registry: CollectorRegistry) -> str:
    rows = []
    for collector in registry._collector_to_names:
        (family,) = collector.collect()
        suffix = "_total" if family.type == "counter" else ""
        labels = ", ".join(f"`{name}`" for name in getattr(collector, "_labelnames", ()))
        rows.append(
            _row(f"`{family.name}{suffix}`", family.type, labels or "–", family.documentation)
        )
    return _row("name", "kind", "labels", "meaning") + _TABLE + "".join(rows)


if __name__ == "__main__":
    main()
