"""`python load.py STOP_FILE`, in a container of the stack: sends requests until stopped.

Like a load balancer, it sends every request to one address of the name `rollout`, and to another
one if the first refuses. Prints counts of the outcomes as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
from collections import Counter
from pathlib import Path

from shared.errors import NotReady, ServiceError
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, SamplingParams

_NUM_CLIENTS = 4
_PAUSE_S = 0.05


async def request(rng: random.Random, results: Counter[str]) -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo("rollout", 8000, socket.AF_INET)}
    body = GenerateRequest(prompts=("s53812=",), sampling=SamplingParams(n=2, max_tokens=8))
    key = os.environ["TANDEM_API_KEY"]
    for address in rng.sample(sorted(addresses), len(addresses)):
        async with RolloutClient(f"http://{address}:8000", api_key=key, timeout_s=30) as replica:
            try:
                answer = await replica.generate(body)
            except ServiceError as error:
                if isinstance(error, NotReady) or "ConnectError" in str(error):  # never accepted
                    results["refused there"] += 1
                    continue
                results[f"failed: {error}"] += 1
                return
        results["answered"] += 1
        assert all(len(group.completions) == 2 for group in answer.groups)
        return
    results["failed: no replica"] += 1


async def client(seed: int, stop_file: Path, results: Counter[str]) -> None:
    rng = random.Random(seed)
    while not stop_file.exists():
        await request(rng, results)
        await asyncio.sleep(_PAUSE_S)


async def main(stop_file: Path) -> None:
    results: Counter[str] = Counter()
    async with asyncio.TaskGroup() as clients:
        for seed in range(_NUM_CLIENTS):
            clients.create_task(client(seed, stop_file, results))
    print(json.dumps(results))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
