"""What a client of OpenAI's API would get, asked of the service itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from edge.openai import Answer, parse_chat, parse_completion, prepare
from edge.service import Service, events


def answer_body(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The complete answer to a chat, or to a completion where ``body`` has a prompt."""
    request = parse_completion(body) if "prompt" in body else parse_chat(body)
    generations = prepare(service.model, request)
    answer = Answer(service.model, request, generations)

    async def collect() -> None:
        async for index, event in events(service, generations):
            answer.chunks(index, event)

    asyncio.run(collect())
    return answer.body()


def first_choice(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of :func:`answer_body`."""
    choice: dict[str, Any] = answer_body(service, body)["choices"][0]
    return choice
