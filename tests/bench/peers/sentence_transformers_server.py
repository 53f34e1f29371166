"""What people write who serve sentence-transformers themselves: FastAPI, one model, one thread that runs it.

    python sentence_transformers_server.py --model FOLDER --port N

The thread is there because the library is not made to be called by several at once and uses all cores anyway; requests
wait their turn, and are not put together into batches.
"""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
runner = ThreadPoolExecutor(1)
models: dict[str, SentenceTransformer] = {}


class Request(BaseModel):
    """The part of OpenAI's embeddings request that is used."""

    input: list[str]


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/embeddings")
async def embeddings(request: Request) -> JSONResponse:
    def encode() -> Any:
        return models["text"].encode(request.input, batch_size=32, normalize_embeddings=True)

    vectors = await asyncio.get_running_loop().run_in_executor(runner, encode)
    data = [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
    return JSONResponse({"object": "list", "model": "all-MiniLM-L6-v2", "data": data})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    chosen = parser.parse_args()
    models["text"] = SentenceTransformer(chosen.model, device="cpu")
    uvicorn.run(app, host="127.0.0.1", port=chosen.port, log_level="warning")
