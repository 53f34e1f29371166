"""Calls at a steady rate, each with a text of its own, until stdin ends; a JSON line for each on stdout.

python hosts_load.py ADDRESS CALLS_A_SECOND
"""

import asyncio
import json
import sys
import time

import embedmesh


async def load(address: str, rate: float) -> None:
    calls: set[asyncio.Task[None]] = set()
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    async with embedmesh.AsyncClient(address) as client:

        async def call(number: int) -> None:
            start, error = time.monotonic(), ""
            try:
                await client.embed([f"text {number}"])
            except embedmesh.EmbedMeshError as failure:
                error = repr(failure)
            sys.stdout.write(json.dumps([start, time.monotonic() - start, error]) + "\n")
            sys.stdout.flush()

        begin = time.monotonic()
        number = 0
        while not ended.done():
            task = asyncio.create_task(call(number))
            calls.add(task)
            task.add_done_callback(calls.discard)
            number += 1
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
        await asyncio.gather(*calls)


asyncio.run(load(sys.argv[1], float(sys.argv[2])))
