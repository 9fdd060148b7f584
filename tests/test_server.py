"""How a service process takes connections, and how it stops, from its clients' point of view."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from examples.demo.processes import free_ports

# The app forks a process that briefly outlives the service, as an engine does.
SERVICE = """
import asyncio, os, resource, sys, time
from fastapi import FastAPI, Response
from services.server import Server

app = FastAPI()

@app.get("/")
async def root() -> int:
    return os.getpid()

@app.get("/healthz")
async def healthz() -> int:
    return os.getpid()

port, num_descriptors, head_timeout_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (num_descriptors, num_descriptors))
server = Server(
    app,
    host="127.0.0.1",
    port=port,
    on_stop=lambda: server.exit(0),
    head_timeout_s=head_timeout_s,
    unread_timeout_s=2.0,
)

@app.get("/large")
async def large() -> Response:
    return Response(bytes(64 << 20))

@app.get("/num-connections")
async def num_connections() -> int:
    return len(server.server_state.connections)

@app.get("/slow")
async def slow() -> None:
    await asyncio.sleep(60)

@app.get("/fork")
async def fork() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    return pid

sys.exit(server.run_until_exit())
"""


@contextlib.contextmanager
def running(
    *, num_descriptors: int = 1024, head_timeout_s: float = 30.0, source: str = SERVICE
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The service and its port. It answers when this returns, and is stopped in the end."""
    (port,) = free_ports(1)
    arguments = [str(port), str(num_descriptors), str(head_timeout_s)]
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments], stderr=subprocess.PIPE, text=True
    ) as service:
        try:
            transport = httpx.HTTPTransport(retries=10)  # Until the service listens.
            with httpx.Client(transport=transport, trust_env=False, timeout=20) as http:
                assert http.get(f"http://127.0.0.1:{port}/").status_code == 200
            yield service, port
        finally:
            service.kill()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_a_stopping_service_answers_or_refuses_its_clients() -> None:
    """No request is cut off, even though a forked process also holds the listening socket."""
    results: Counter[str] = Counter()
    ended = threading.Event()

    with running() as (service, port):
        url = f"http://127.0.0.1:{port}"

        def client() -> None:
            while not ended.is_set():
                try:
                    results[str(httpx.get(url, timeout=5, trust_env=False).status_code)] += 1
                except httpx.HTTPError as error:
                    results[type(error).__name__] += 1

        child = httpx.get(f"{url}/fork", trust_env=False).json()
        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
        for _ in range(3):
            results[type(httpx_error(url)).__name__] += 1
        ended.set()
        for thread in clients:
            thread.join()
        os.kill(child, signal.SIGKILL)
    assert results.pop("ConnectError") >= 3
    assert set(results) <= {"200"}


def test_a_stopping_service_answers_a_slow_client_that_had_connected() -> None:
    with running() as (service, port), connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost:")
        service.send_signal(signal.SIGTERM)
        time.sleep(1)  # Longer than a stop takes when nobody is connected.
        client.sendall(b" service\r\nConnection: close\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")
        assert service.wait(20) == 0


def test_a_second_ctrl_c_exits_at_once_with_one_sentence() -> None:
    with running(source=SERVICE.replace("server.exit(0)", "None")) as (service, port):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.get(f"http://127.0.0.1:{port}/slow", timeout=0.5, trust_env=False)
        service.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert service.poll() is None  # It waits for the running request.
        service.send_signal(signal.SIGINT)
        _, errors = service.communicate(timeout=20)
    assert service.returncode == 1
    assert errors.splitlines()[-1] == (
        "second stop signal: exiting without waiting for running requests"
    )


@pytest.mark.parametrize("name", [b"X-One: ", b"X: 1\r\n"], ids=["one header", "many headers"])
def test_a_long_head_is_refused_before_it_has_arrived(name: bytes) -> None:
    """Fault S5: one header of 200 MB, or 60 MB of small ones, held the event loop for seconds."""
    with running() as (_, port), connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: service\r\n")
        with contextlib.suppress(ConnectionError):
            client.sendall(name * ((1 << 20) // len(name)))
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close")
    problem = json.loads(body)
    assert problem["title"] == "HeadTooLarge"
    assert problem["detail"].startswith("the request line and headers are over 65536 bytes")


def test_a_long_address_is_refused_too() -> None:
    with running() as (_, port), connect(port) as client:
        client.sendall(b"GET /" + b"a" * (1 << 17) + b" HTTP/1.1\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 431 ")


def test_headers_and_a_large_body_are_no_long_head() -> None:
    """The bound is on the head, whatever comes with it in one packet or after it."""
    with running() as (_, port), httpx.Client(trust_env=False, timeout=20) as connection:
        for _ in range(3):  # Over one connection.
            content, headers = b"a" * (1 << 20), {"X": "1" * 60000}
            answer = connection.post(f"http://127.0.0.1:{port}/", content=content, headers=headers)
            assert answer.status_code == 405  # The route takes GET only.


def test_a_client_that_sends_nothing_is_disconnected() -> None:
    """Fault S5: it stayed for ever."""
    with running(head_timeout_s=1.0) as (_, port), connect(port) as silent:
        assert read_all(silent) == b""


def test_a_head_that_comes_byte_by_byte_is_refused_by_name() -> None:
    """Fault S5: a byte a second kept a connection for ever."""
    with running(head_timeout_s=1.0) as (_, port), connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        for _ in range(8):
            time.sleep(0.2)
            client.sendall(b"a")
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 504 Gateway Timeout")
    assert json.loads(body)["detail"].startswith("the headers did not arrive within 1 s")


def test_a_connection_that_waits_between_requests_outlives_the_head_timeout() -> None:
    with running(head_timeout_s=1.0) as (_, port):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(2):
            client.request("GET", "/")
            answer = client.getresponse()
            assert answer.status == 200
            answer.read()
            connected = client.sock
            time.sleep(1.5)
        assert client.sock is connected
        client.close()


def test_a_client_that_reads_nothing_of_its_answer_is_disconnected() -> None:
    """It held its connection, and what was buffered for it, for ever."""
    with running() as (_, port), connect(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: service\r\n\r\n")

        def others() -> int:
            url = f"http://127.0.0.1:{port}/num-connections"
            return int(httpx.get(url, trust_env=False, timeout=20).json()) - 1

        deadline = time.monotonic() + 60
        while others():
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_more_clients_than_descriptors_are_all_answered() -> None:
    """Fault S5: with few descriptors, hundreds of ordinary requests got connection errors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed if soft < allowed else soft, hard))
    num_clients = min(2000, allowed - 256)
    results: Counter[str] = Counter()

    async def ask(port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n")
            results[(await reader.read()).split(b" ", 2)[1].decode()] += 1
            writer.close()
        except OSError as error:
            results[type(error).__name__] += 1

    async def ask_all(port: int) -> None:
        await asyncio.gather(*(ask(port) for _ in range(num_clients)))

    with running(num_descriptors=512) as (service, port):
        asyncio.run(asyncio.wait_for(ask_all(port), 120))
        service.terminate()
        _, errors = service.communicate(timeout=30)
    assert set(results) <= {"200", "503"}
    assert results.total() == num_clients
    assert results["200"] > 0
    assert "the limit of open files is 512, which permits 256 connections at a time" in errors


def test_a_crowded_service_refuses_by_name_and_answers_health_checks() -> None:
    with running(num_descriptors=256 + 32) as (_, port), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(port)) for _ in range(29)]
        url = f"http://127.0.0.1:{port}"
        refused = httpx.get(url, trust_env=False, timeout=20)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["detail"].startswith("this service has almost no free connection")
        assert httpx.get(f"{url}/healthz", trust_env=False, timeout=20).status_code == 200
        for client in silent:
            client.close()
        deadline = time.monotonic() + 20
        while httpx.get(url, trust_env=False, timeout=20).status_code != 200:
            assert time.monotonic() < deadline


def httpx_error(url: str) -> Exception:
    try:
        httpx.get(url, timeout=2, trust_env=False)
    except httpx.HTTPError as error:
        return error
    raise AssertionError("it answered")
