"""The `anthropic` package."""
from .harness import check, equal, expect

PATH = "/v1/messages"
BODY = {"model": "default", "max_tokens": 16, "messages": [{"role": "user", "content": "Tell me a story."}]}
# The package has no temperature any more; and some models would end at once.
LONG = {**BODY, "extra_body": {"temperature": 0, "ignore_eos": True}}
TOOLS = [{"name": "get_weather", "description": "The weather of a town", "input_schema": {
    "type": "object", "required": ["town"], "additionalProperties": False,
    "properties": {"town": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}}}}]


def client(context, **more):
    import anthropic
    return anthropic.Anthropic(base_url=context.server.url, api_key="none", max_retries=0, timeout=120, **more)


@check("anthropic: messages")
def messages(context):
    context.needs(PATH, BODY)
    whole = client(context).messages.create(**LONG, system="You are brief.")
    equal((whole.type, whole.role, whole.stop_reason), ("message", "assistant", "max_tokens"))
    expect(whole.content[0].type == "text" and whole.content[0].text, whole)
    equal(whole.usage.output_tokens, 16, "output_tokens")
    expect(whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) > 0, whole.usage)
    turns = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Go on"}]
    again = client(context).messages.create(**{**LONG, "messages": turns, "system": [{"type": "text", "text": "Brief."}]})
    equal(again.type, "message")
    text = client(context).messages.create(**LONG).content[0].text
    end = text[10:14]
    stopped = client(context).messages.create(**LONG, stop_sequences=[end])
    equal((stopped.stop_reason, stopped.stop_sequence), ("stop_sequence", end))
    equal("".join(block.text for block in stopped.content), text[:text.index(end)], "stopped text")


@check("anthropic: stream")
def stream(context):
    context.needs(PATH, BODY)
    text = client(context).messages.create(**LONG).content[0].text
    with client(context).messages.stream(**LONG) as events:
        equal("".join(events.text_stream), text, "streamed")
        final = events.get_final_message()
    equal((final.stop_reason, final.usage.output_tokens), ("max_tokens", 16))
    kinds = [event.type for event in client(context).messages.create(**LONG, stream=True)]
    kinds = [kind for kind in kinds if kind != "ping"]
    equal(kinds[:2], ["message_start", "content_block_start"])
    equal(kinds[-3:], ["content_block_stop", "message_delta", "message_stop"])
    expect(set(kinds[2:-3]) == {"content_block_delta"}, kinds)


@check("anthropic: tools")
def tools(context):
    context = context.caller
    context.needs(PATH, BODY)
    history = [*BODY["messages"], {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"town": "Oslo"}}]},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]}]}]
    context.needs(PATH, {**BODY, "tools": TOOLS})
    equal(client(context).messages.create(**{**BODY, "messages": history}, tools=TOOLS).type, "message")
    forced = {**BODY, "max_tokens": 300, "tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "extra_body": {"temperature": 0}}
    whole = client(context).messages.create(**forced)
    equal(whole.stop_reason, "tool_use", "stop_reason")
    calls = [block for block in whole.content if block.type == "tool_use"]
    expect(calls and calls[0].id and calls[0].name == "get_weather", whole)
    expect(calls[0].input["town"] in ("Paris", "Rome", "Oslo"), calls)
    with client(context).messages.stream(**forced) as events:
        final = events.get_final_message()
    equal([(b.name, b.input) for b in final.content if b.type == "tool_use"], [(b.name, b.input) for b in calls], "streamed")


@check("anthropic: count_tokens")
def count_tokens(context):
    context.needs(PATH + "/count_tokens", {"model": "default", "messages": BODY["messages"]})
    count = client(context).messages.count_tokens(model="default", messages=BODY["messages"]).input_tokens
    usage = client(context).messages.create(**LONG).usage
    equal(count, usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0), "tokens")


@check("anthropic: its errors")
def errors(context):
    import anthropic
    context.needs(PATH, BODY)
    for more, kind, expected in (({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
                                 ({"messages": [{"role": "wizard", "content": "x"}]}, anthropic.BadRequestError, "invalid_request_error"),
                                 ({"model": "nothing-of-that-name"}, anthropic.NotFoundError, "not_found_error")):
        try:
            client(context).messages.create(**{**BODY, **more})
        except kind as error:
            equal((error.body["type"], error.body["error"]["type"]), ("error", expected), "body")
        else:
            expect(False, f"{more} is taken")
