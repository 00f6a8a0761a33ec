"""LangChain's chat model and embeddings for servers with OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.clients.script import A_CITY, QUESTION_OF_FORM, QUESTION_OF_LENGTH, QUESTION_OF_WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served


class City(BaseModel):
    """A city."""

    name: str
    population: int


@tool
def get_weather(city: str) -> str:
    """Tell the weather."""
    return f"sunny in {city}"


@pytest.fixture
def model(server: Served) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL_NAME, base_url=f"{server.url}/v1", api_key=SecretStr("unused"), max_retries=0)


def test_a_chat(model: ChatOpenAI) -> None:
    answer = model.invoke("Hi")
    assert answer.content == "You said: Hi"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 13


def test_a_stream(model: ChatOpenAI) -> None:
    assert "".join(str(chunk.content) for chunk in model.stream("Hi")) == "You said: Hi"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["auto", "any"])
def test_a_tool(model: ChatOpenAI, choice: str, *, streamed: bool) -> None:
    with_tools = model.bind_tools([get_weather], tool_choice=choice)
    question = HumanMessage(QUESTION_OF_WEATHER)
    if streamed:
        whole = AIMessageChunk("")
        for chunk in with_tools.stream([question]):
            whole = whole + chunk
        answer = whole
    else:
        answer = with_tools.invoke([question])
    (call,) = answer.tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.bind_tools([get_weather]).invoke([question, answer, result]).content == "It is sunny in Köln."


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_an_answer_in_a_given_form(model: ChatOpenAI, method: str) -> None:
    assert model.with_structured_output(City, method=method).invoke(QUESTION_OF_FORM) == City(**A_CITY)


def test_embeddings(server: Served) -> None:
    url, key = f"{server.url}/v1", SecretStr("unused")
    embeddings = OpenAIEmbeddings(model=MODEL_NAME, base_url=url, api_key=key, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["Hi", "Hello"])
    assert [sum(value * value for value in vector) for vector in vectors] == pytest.approx([1, 1])
    assert embeddings.embed_query("Hi") == pytest.approx(vectors[0])


def test_several_at_once(model: ChatOpenAI) -> None:
    answers = model.batch([f"number {i}" for i in range(6)])
    assert [answer.content for answer in answers] == [f"You said: number {i}" for i in range(6)]


def test_errors(model: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        model.bind(temperature=3).invoke("Hi")


def test_leaving_a_stream_ends_the_work(model: ChatOpenAI, stops_working: Callable[[], None]) -> None:
    stream = model.stream(QUESTION_OF_LENGTH)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    stops_working()
