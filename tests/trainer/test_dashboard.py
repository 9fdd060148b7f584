"""The page's files: what is served without a key, and where the chart library came from."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx
import pytest

from services.trainer import dashboard
from services.trainer.app import create_app
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.schemas import StepRecord

pytestmark = pytest.mark.anyio
FOLDER = Path(dashboard.__file__).parent
VENDORED = FOLDER / "vendor"


def client(api_key: str | None) -> httpx.AsyncClient:
    app = create_app(Trainer(TrainerSettings(model="tiny", TANDEM_API_KEY=api_key)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://trainer")


def test_the_chart_library_is_the_one_that_npm_has() -> None:
    lines = (VENDORED / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest, name


async def test_the_page_needs_no_key_and_its_data_does() -> None:
    async with client("secret") as http:
        for path in dashboard.page_files(needs_key=True):
            assert (await http.get(path)).status_code == 200, path
        for path in ("/status", "/replicas", "/runs/current/completions", "/runs/current/config"):
            assert (await http.get(path)).status_code == 401, path
        for path in ("/page", "/page/", "/page/../app.py", "/page/__init__.py"):
            assert (await http.get(path)).status_code == 401, path


async def test_only_the_page_of_a_trainer_with_a_key_asks_for_one() -> None:
    for api_key, asks in (("secret", True), (None, False)):
        async with client(api_key) as http:
            assert ("data-key" in (await http.get("/")).text) == asks


async def test_everything_the_page_loads_is_served_with_its_policy() -> None:
    text = (FOLDER / "index.html").read_text()
    text += "".join(path.read_text() for path in FOLDER.glob("*.js"))
    asked = {path.lstrip(".") for path in re.findall(r'(?:href|src)="(/page/[^"]+)"', text)}
    asked |= {f"/page{path}" for path in re.findall(r'from "\.(/[^"]+)"', text)}
    assert "/page/vendor/uPlot.esm.js" in asked
    async with client(None) as http:
        for path in asked:
            answer = await http.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    async with client(None) as http:
        first = await http.get("/page/style.css")
        again = await http.get("/page/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_elements_that_the_modules_use_are_in_the_page_with_the_declared_types() -> None:
    """The type checker knows index.html only from the typedef Elements in text.js."""
    classes = {
        "button": "HTMLButtonElement",
        "dialog": "HTMLDialogElement",
        "form": "HTMLFormElement",
        "input": "HTMLInputElement",
        "progress": "HTMLProgressElement",
        "select": "HTMLSelectElement",
        "textarea": "HTMLTextAreaElement",
    }
    tags = re.findall(r'<(\w+)\b[^>]*? id="([\w-]+)"', (FOLDER / "index.html").read_text())
    (declared,) = re.findall(
        r"@typedef {object} Elements\n(.*?)\*/", (FOLDER / "text.js").read_text(), re.DOTALL
    )
    types = {name: cls for cls, name in re.findall(r"@property {(\w+)} ([\w-]+)", declared)}
    assert types == {name: classes[tag] for tag, name in tags if tag in classes}
    modules = "".join(path.read_text() for path in FOLDER.glob("*.js"))
    used = set(re.findall(r'\$\("([\w-]+)"\)', modules))
    assert len(used) > 40
    assert used <= {name for _, name in tags}


def test_every_number_that_the_page_plots_is_one_of_a_step() -> None:
    listed = re.search(
        r"STEP_COLUMNS = [^[]*\[(.*?)\]", (FOLDER / "history.js").read_text(), re.DOTALL
    )
    assert listed
    names = re.findall(r'"(\w+)"', listed[1])
    assert len(names) > 20
    assert set(names) <= StepRecord.model_fields.keys()
