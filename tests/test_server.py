"""How a service process stops, from its clients' point of view."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx

from examples.demo.processes import free_ports

# The app forks a process that briefly outlives the service, as an engine does.
SERVICE = """
import asyncio, os, sys, time
from fastapi import FastAPI
from services.server import Server

app = FastAPI()

@app.get("/")
async def root() -> int:
    return os.getpid()

server = Server(app, host="127.0.0.1", port=int(sys.argv[1]), on_stop=lambda: server.exit(0))

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


def test_a_stopping_service_answers_or_refuses_its_clients() -> None:
    """No request is cut off, even though a forked process also holds the listening socket."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    results: Counter[str] = Counter()
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            try:
                results[str(httpx.get(url, timeout=5, trust_env=False).status_code)] += 1
            except httpx.HTTPError as error:
                results[type(error).__name__] += 1

    with subprocess.Popen([sys.executable, "-c", SERVICE, str(port)]) as service:
        transport = httpx.HTTPTransport(retries=10)  # Until the service listens.
        with httpx.Client(transport=transport, trust_env=False, timeout=20) as http:
            child = http.get(f"{url}/fork").json()
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
    (port,) = free_ports(1)
    with subprocess.Popen([sys.executable, "-c", SERVICE, str(port)]) as service:
        with httpx.Client(transport=httpx.HTTPTransport(retries=10), trust_env=False) as http:
            http.get(f"http://127.0.0.1:{port}/", timeout=20)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost:")
            service.send_signal(signal.SIGTERM)
            time.sleep(1)  # Longer than a stop takes when nobody is connected.
            client.sendall(b" service\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert service.wait(20) == 0
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_a_second_ctrl_c_exits_at_once_with_one_sentence() -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", SERVICE.replace("server.exit(0)", "None"), str(port)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service,
        httpx.Client(transport=httpx.HTTPTransport(retries=10), trust_env=False) as http,
    ):
        assert http.get(f"http://127.0.0.1:{port}/", timeout=20).status_code == 200
        with contextlib.suppress(httpx.TimeoutException):
            http.get(f"http://127.0.0.1:{port}/slow", timeout=0.5)
        service.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert service.poll() is None  # It waits for the running request.
        service.send_signal(signal.SIGINT)
        _, errors = service.communicate(timeout=20)
    assert service.returncode == 1
    assert errors == "second stop signal: exiting without waiting for running requests\n"


def httpx_error(url: str) -> Exception:
    try:
        httpx.get(url, timeout=2, trust_env=False)
    except httpx.HTTPError as error:
        return error
    raise AssertionError("it answered")
