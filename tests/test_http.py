"""Which requests a service without a key accepts: from web pages only those of its own page."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from services.http import prepare_app
from shared.errors import MEDIA_TYPE

pytestmark = pytest.mark.anyio
OWN = "http://127.0.0.1:8080"


async def answer(
    headers: dict[str, str], *, url: str = OWN, path: str = "/runs", api_key: str | None = None
) -> httpx.Response:
    """The answer of a service at `url`, whatever host the headers name."""
    app = FastAPI()
    prepare_app(
        app,
        api_key=api_key,
        max_body_bytes=1000,
        max_json_values=100,
        body_timeout_s=5.0,
        open_paths=frozenset({"/"}),
    )

    @app.post("/runs")
    @app.post("/")
    def run() -> str:
        return "started"

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=url) as http:
        return await http.post(path, content=b"num_steps: 1", headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},  # Not a browser.
        {"Origin": OWN, "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://LOCALHOST:8080", "Host": "localhost:8080"},
        {"Origin": "https://[::1]:8080", "Host": "[::1]:8080"},  # A proxy terminates TLS.
        {"Sec-Fetch-Site": "none"},  # The user typed the address.
        {"Host": "127.1.2.3"},
    ],
)
async def test_a_service_without_a_key_accepts_programs_and_its_own_page(
    headers: dict[str, str],
) -> None:
    assert (await answer(headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},  # A sandboxed page.
        {"Origin": "http://127.0.0.1:3000"},  # Another service on this machine.
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_a_service_without_a_key_refuses_pages_of_others(headers: dict[str, str]) -> None:
    refused = await answer({"Content-Type": "text/plain", **headers})
    assert refused.status_code == 403
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert refused.json()["title"] == "Forbidden"
    assert "a web page of another site" in refused.json()["detail"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "10.0.0.1", "["])
async def test_a_foreign_name_for_loopback_is_refused(host: str) -> None:
    """With DNS rebinding a page of that name has a matching Origin."""
    refused = await answer({"Host": host, "Origin": f"http://{host}"})
    assert refused.status_code == 403
    detail = refused.json()["detail"]
    assert f"listens on 127.0.0.1, but the request names the host {host}" in detail


async def test_a_service_with_a_key_accepts_any_name() -> None:
    """A browser does not add the key on its own."""
    headers = {"Host": "tandem.example", "Origin": "https://evil.example"}
    key = {"Authorization": "Bearer key"}
    assert (await answer({**headers, **key}, api_key="key")).status_code == 200
    assert (await answer(headers, api_key="key")).status_code == 401


async def test_a_link_leads_to_the_page_which_holds_no_data() -> None:
    link = {"Sec-Fetch-Site": "cross-site"}
    assert (await answer(link, path="/")).status_code == 200
