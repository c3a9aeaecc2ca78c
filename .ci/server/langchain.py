"""The `langchain-openai` package, through which many programs ask."""
from typing import Literal

from .harness import check, equal, expect
from .openai import TOOLS
from .structured import FORMAT


def model(context, **more):
    from langchain_openai import ChatOpenAI
    more = {"temperature": 0, "max_tokens": 16, "extra_body": {"ignore_eos": True}, **more}
    return ChatOpenAI(base_url=context.server.url + "/v1", api_key="none", model=context.model_id, max_retries=0, **more)


@check("langchain: invoke")
def invoke(context):
    answer = model(context).invoke([("system", "You are brief."), ("human", "Tell me a story.")])
    expect(answer.content, answer)
    equal(answer.usage_metadata["output_tokens"], 16, "output_tokens")
    equal(answer.response_metadata["finish_reason"], "length")


@check("langchain: stream")
def stream(context):
    whole = model(context).invoke("Tell me a story.").content
    chunks = list(model(context, stream_usage=True).stream("Tell me a story."))
    equal("".join(chunk.content for chunk in chunks), whole, "streamed")
    equal(sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata), 16, "usage")


@check("langchain: bind_tools")
def bind_tools(context):
    context = context.caller
    from langchain_core.tools import tool
    context.needs_chat(tools=TOOLS)

    @tool
    def get_weather(town: str) -> str:
        """The weather of a town."""
        return "rain in " + town

    answer = model(context).bind_tools([get_weather]).invoke("What is the weather in Paris?")
    expect(answer.content or answer.tool_calls, answer)


def pet():
    import pydantic

    class Pet(pydantic.BaseModel):
        """A pet."""
        kind: Literal["cat", "dog", "mouse"]
        brave: bool

    return Pet


@check("langchain: with_structured_output by a schema")
def by_schema(context):
    context.needs_chat(response_format=FORMAT)
    Pet = pet()
    answer = model(context, max_tokens=100, extra_body={}).with_structured_output(Pet, method="json_schema").invoke("A brave mouse.")
    expect(isinstance(answer, Pet), answer)


@check("langchain: with_structured_output by a call")
def by_call(context):
    context = context.caller
    context.needs_chat(tools=TOOLS, tool_choice="required")
    Pet = pet()
    answer = model(context, max_tokens=300, extra_body={}).with_structured_output(Pet, method="function_calling", strict=True).invoke("A brave mouse.")
    expect(isinstance(answer, Pet), answer)
