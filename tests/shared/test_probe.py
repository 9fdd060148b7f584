"""The health check of containers says what the service says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shared import probe


class Service(HTTPServer):
    status: int
    authorizations: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.authorizations.append(self.headers["Authorization"])
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(b"loading the engine")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), Handler)
    server.status, server.authorizations = 200, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(service: Service) -> str:
    return f"http://127.0.0.1:{service.server_port}/readyz"


def test_a_ready_service_is_reached_without_the_proxy_of_the_environment(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault R4."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TANDEM_API_KEY", "key")
    assert probe.main(url(service)) == 0
    assert service.authorizations == ["Bearer key"]


def test_a_service_that_is_not_ready_is_quoted(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.status = 503
    assert probe.main(url(service)) == 1
    assert capsys.readouterr().err == "503 loading the engine\n"


def test_a_service_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main("http://127.0.0.1:9/readyz") == 1
    assert capsys.readouterr().err.startswith("http://127.0.0.1:9/readyz: ")
