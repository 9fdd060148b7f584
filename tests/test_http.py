"""Who may ask a service that has no key: nobody's web page but its own."""

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
    """Of a service that is reached at `url`, whatever the headers say."""
    app = FastAPI()
    prepare_app(
        app,
        api_key=api_key,
        max_body_bytes=1000,
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
        {},  # no browser
        {"Origin": OWN, "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://LOCALHOST:8080", "Host": "localhost:8080"},
        {"Origin": "https://[::1]:8080", "Host": "[::1]:8080"},  # TLS ends before the service
        {"Sec-Fetch-Site": "none"},  # the user typed it
        {"Host": "127.1.2.3"},
    ],
)
async def test_programs_and_its_own_page_may_ask_a_service_without_a_key(
    headers: dict[str, str],
) -> None:
    assert (await answer(headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},  # a page in a sandbox
        {"Origin": "http://127.0.0.1:3000"},  # another service of this machine
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_pages_of_other_sites_may_not(headers: dict[str, str]) -> None:
    refused = await answer({"Content-Type": "text/plain", **headers})
    assert refused.status_code == 403
    assert refused.headers["content-type"] == MEDIA_TYPE
    assert refused.json()["title"] == "Forbidden"
    assert "a web page of another site" in refused.json()["detail"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "10.0.0.1", "["])
async def test_a_name_that_leads_to_loopback_is_not_the_service(host: str) -> None:
    """A page of that name has the right Origin: DNS rebinding."""
    refused = await answer({"Host": host, "Origin": f"http://{host}"})
    assert refused.status_code == 403
    assert f"listens on 127.0.0.1, but the request names the host {host}" in refused.json()["detail"]


async def test_a_service_with_a_key_is_behind_any_name() -> None:
    """No browser adds the key by itself."""
    headers = {"Host": "tandem.example", "Origin": "https://evil.example"}
    key = {"Authorization": "Bearer key"}
    assert (await answer({**headers, **key}, api_key="key")).status_code == 200
    assert (await answer(headers, api_key="key")).status_code == 401


async def test_a_link_leads_to_the_page_which_holds_no_data() -> None:
    link = {"Sec-Fetch-Site": "cross-site"}
    assert (await answer(link, path="/")).status_code == 200
