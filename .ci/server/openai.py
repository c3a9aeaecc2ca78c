"""The `openai` package: what it asks for and how it reads answers."""
import base64
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

from .harness import EMBEDDED, check, equal, expect

MESSAGES = [{"role": "user", "content": "Tell me a story about a mouse."}]
PLAIN = {"messages": MESSAGES, "model": "default", "max_tokens": 16, "temperature": 0}
# Some models would end at once.
GREEDY = {**PLAIN, "extra_body": {"ignore_eos": True}}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a town", "strict": True,
    "parameters": {"type": "object", "additionalProperties": False, "required": ["town", "unit"], "properties": {
        "town": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]}}}}}]


@check("openai: chat")
def chat(context):
    answer = context.openai.chat.completions.create(**GREEDY)
    equal(answer.object, "chat.completion")
    expect(answer.id.startswith("chatcmpl-"), answer.id)
    equal(answer.model, context.model_id, "model")
    choice = answer.choices[0]
    equal((choice.index, choice.message.role, choice.finish_reason), (0, "assistant", "length"))
    expect(choice.message.content and choice.message.tool_calls is None, choice)
    usage = answer.usage
    equal(usage.completion_tokens, 16, "completion_tokens")
    equal(usage.total_tokens, usage.prompt_tokens + 16, "total_tokens")
    expect(usage.prompt_tokens_details.cached_tokens >= 0 and usage.completion_tokens_details.reasoning_tokens == 0, usage)
    raw = context.openai.chat.completions.with_raw_response.create(**GREEDY)
    expect(raw.headers["x-request-id"], "no request id")
    equal(raw.parse().choices[0].message.content, choice.message.content, "greedy, asked again")


@check("openai: stream with usage")
def stream(context):
    whole = context.openai.chat.completions.create(**GREEDY)
    chunks = list(context.openai.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    equal(chunks[0].choices[0].delta.role, "assistant", "role of the first chunk")
    equal({chunk.id for chunk in chunks}, {chunks[0].id}, "ids")
    equal({chunk.object for chunk in chunks}, {"chat.completion.chunk"}, "objects")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    equal(text, whole.choices[0].message.content, "text")
    equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], ["length"])
    expect(all(chunk.usage is None for chunk in chunks[:-1]), "usage before the end")
    equal(chunks[-1].choices, [], "choices of the chunk with usage")
    equal((chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens),
          (whole.usage.prompt_tokens, whole.usage.completion_tokens), "usage")
    without = list(context.openai.chat.completions.create(**GREEDY, stream=True))
    expect(all(chunk.choices and chunk.usage is None for chunk in without), "usage nobody asked for")
    # The helper takes an answer that max_tokens cut for an error.
    with context.openai.chat.completions.stream(**GREEDY, stop=text[9:13]) as events:
        final = events.get_final_completion().choices[0]
    equal((final.message.content, final.finish_reason), (text[:text.index(text[9:13])], "stop"), "by the stream helper")


@check("openai: several answers")
def several(context):
    body = {**GREEDY, "n": 3, "temperature": 1, "seed": 5, "max_tokens": 8}
    whole = context.openai.chat.completions.create(**body)
    equal([choice.index for choice in whole.choices], [0, 1, 2], "indexes")
    equal(whole.usage.completion_tokens, 24, "completion_tokens")
    texts = {}
    for chunk in context.openai.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    equal([texts[i] for i in range(3)], [choice.message.content for choice in whole.choices], "same seed, streamed")
    expect(len(set(texts.values())) > 1, "three answers at temperature 1 are one", texts)


@check("openai: logprobs")
def logprobs(context):
    # Without special tokens in the answer, whose text is not shown: the joined tokens are to be the text.
    # A penalty, which a model may bring, decides what is chosen and not how likely it was.
    body = {**PLAIN, "logprobs": True, "top_logprobs": 4, "max_tokens": 8, "extra_body": {"repetition_penalty": 1}}
    choice = context.openai.chat.completions.create(**body).choices[0]
    content = choice.logprobs.content
    equal(len(content), 8, "entries")
    for entry in content:
        equal(len(entry.top_logprobs), 4, "top_logprobs")
        expect(entry.logprob <= 0 and entry.logprob == max(t.logprob for t in entry.top_logprobs), entry)
        expect(sum(math.exp(t.logprob) for t in entry.top_logprobs) < 1.0001, entry)
        equal([t.logprob for t in entry.top_logprobs], sorted((t.logprob for t in entry.top_logprobs), reverse=True), "order")
    joined = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    equal(joined.strip(), choice.message.content.strip(), "bytes of the tokens")
    streamed = []
    for chunk in context.openai.chat.completions.create(**body, stream=True):
        for part in chunk.choices:
            streamed += part.logprobs.content if part.logprobs else []
    equal([e.token for e in streamed], [e.token for e in content], "tokens, streamed")
    expect(all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(streamed, content)), "logprobs differ when streamed")


@check("openai: stop strings do not show")
def stop(context):
    text = context.openai.chat.completions.create(**{**GREEDY, "max_tokens": 24}).choices[0].message.content
    for begin, length in ((12, 3), (20, 9)):
        end = text[begin:begin + length]
        expected = text[:text.index(end)]
        body = {**GREEDY, "max_tokens": 24, "stop": [end, "\0never"], "logprobs": True}
        choice = context.openai.chat.completions.create(**body).choices[0]
        equal((choice.message.content, choice.finish_reason), (expected, "stop"), f"stopped at {end!r}")
        told = "".join(entry.token for entry in choice.logprobs.content)
        expect(end not in told, f"logprobs hold the tokens of the stop string {end!r}: {told!r}")
        streamed = "".join(c.choices[0].delta.content or "" for c in context.openai.chat.completions.create(**body, stream=True))
        equal(streamed, expected, f"stopped at {end!r}, streamed")


@check("openai: tools that are not needed")
def tools_auto(context):
    context = context.caller
    context.needs_chat(tools=TOOLS)
    body = {**PLAIN, "messages": [{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
            "tools": TOOLS, "max_tokens": 48}
    message = context.openai.chat.completions.create(**body).choices[0]
    content, calls = assembled(context.openai.chat.completions.create(**body, stream=True))
    equal(content, message.message.content or "", "content, streamed")
    equal([(c["name"], c["arguments"]) for c in calls], [(c.function.name, c.function.arguments) for c in message.message.tool_calls or []])
    if not calls:
        return "the model called none"
    equal(message.finish_reason, "tool_calls", "finish_reason")
    equal(calls[0]["name"], "get_weather")
    json.loads(calls[0]["arguments"])
    return f"it called {calls[0]['name']}({calls[0]['arguments']})"


def assembled(chunks):
    """Content and calls of a stream; fails where a delta of a call is not as clients expect it."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        for choice in chunk.choices:
            expect(reason is None, "a chunk after finish_reason", chunk)
            content += choice.delta.content or ""
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(calls):
                    expect(delta.id and delta.type == "function" and delta.function.name, "first delta of a call", delta)
                    calls.append({"id": delta.id, "name": delta.function.name, "arguments": delta.function.arguments or ""})
                    continue
                equal(delta.index, len(calls) - 1, "index of a further delta")
                expect(not delta.id and not delta.function.name, "a further delta repeats id or name", delta)
                calls[-1]["arguments"] += delta.function.arguments or ""
            reason = choice.finish_reason or reason
    expect(reason is not None, "no finish_reason")
    equal(reason == "tool_calls", bool(calls), "finish_reason is tool_calls")
    equal(len({call["id"] for call in calls}), len(calls), "ids of calls are their own")
    return content, calls


@check("openai: results of tools as messages")
def tool_results(context):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"town":"Oslo","unit":"kelvin"}'}}
    messages = [{"role": "system", "content": "You are brief."}, *MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "271"}]
    answer = context.openai.chat.completions.create(**{**GREEDY, "messages": messages, "max_tokens": 4})
    equal(len(answer.choices), 1)



@check("openai: completions")
def completions(context):
    body = {"model": "default", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = context.openai.completions.create(**body)
    equal((whole.object, whole.choices[0].finish_reason), ("text_completion", "length"))
    text = "".join(chunk.choices[0].text for chunk in context.openai.completions.create(**body, stream=True))
    equal(text, whole.choices[0].text, "streamed")
    echoed = context.openai.completions.create(**body, echo=True).choices[0].text
    equal(echoed, "Once upon a time" + text, "echoed")
    several = context.openai.completions.create(**{**body, "prompt": ["One", "Two"], "n": 2, "max_tokens": 3, "logprobs": 2})
    equal([choice.index for choice in several.choices], [0, 1, 2, 3])
    chances = several.choices[2].logprobs
    equal((len(chances.tokens), len(chances.token_logprobs), len(chances.text_offset)), (3, 3, 3), "logprobs")
    equal("".join(chances.tokens).strip(), several.choices[2].text.strip(), "tokens")


@check("openai: embeddings, float and base64")
def embeddings(context):
    texts = ["A brave mouse.", "A brave little mouse.", "Tax law of 1954"]
    plain = context.openai.embeddings.create(model="default", input=texts, encoding_format="float")
    equal([item.index for item in plain.data], [0, 1, 2])
    # Left out, the package asks for base64 and decodes it.
    coded = context.openai.embeddings.create(model="default", input=texts)
    as_float = lambda vector: [struct.unpack("f", struct.pack("f", v))[0] for v in vector]  # noqa: E731
    for a, b in zip(plain.data, coded.data):
        equal(as_float(a.embedding), as_float(b.embedding), "base64 is the same vector")
        expect(abs(sum(v * v for v in a.embedding) - 1) < 1e-4, "not of length 1")
    raw = context.server.post("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"}).json()
    size = len(base64.b64decode(raw["data"][0]["embedding"], validate=True))
    equal(size, 4 * len(plain.data[0].embedding), "bytes")
    near, far = (sum(a * b for a, b in zip(plain.data[0].embedding, plain.data[i].embedding)) for i in (1, 2))
    expect(near > far, f"likeness {near} of near texts, {far} of far ones")


@check("openai: embeddings of a model that says how they are made")
def declared_pooling(context):
    import openai
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stories"
        shutil.copytree(EMBEDDED, copy)
        config = copy / "1_Pooling/config.json"
        config.parent.mkdir()
        for way, taken in (("lasttoken", "last"), ("mean_tokens", "mean"), ("cls_token", None)):
            config.write_text(json.dumps({"word_embedding_dimension": 128, f"pooling_mode_{way}": True}))
            with context.start("-m", str(copy)) as server:
                client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
                ask = lambda **more: client.embeddings.create(model="stories", input="A brave mouse.", extra_body=more).data[0].embedding  # noqa: E731
                for pooling in ("mean", "last"):
                    try:
                        vector = ask(pooling=pooling)
                    except openai.BadRequestError as error:
                        expect(pooling != taken and error.param == "pooling", way, error)
                    else:
                        equal((pooling, vector), (taken, ask()), f"{way}: the way taken, and its vector")


@check("openai: models")
def models(context):
    import openai
    ids = [model.id for model in context.openai.models.list()]
    equal(context.openai.models.retrieve(ids[0]).id, ids[0])
    for call in (lambda: context.openai.models.retrieve("nothing-of-that-name"),
                 lambda: context.openai.chat.completions.create(**{**GREEDY, "model": "nothing-of-that-name"})):
        try:
            call()
        except openai.NotFoundError as error:
            equal(error.code, "model_not_found", "code")
        else:
            expect(False, "an unknown model is taken")


@check("openai: its errors")
def errors(context):
    import openai
    for more, kind, param in (({"max_tokens": 10 ** 6}, openai.BadRequestError, "messages"),
                              ({"temperature": 101}, openai.BadRequestError, "temperature")):
        try:
            context.openai.chat.completions.create(**{**GREEDY, **more})
        except kind as error:
            equal(error.param, param, "param")
        else:
            expect(False, f"{more} is taken")


@check("openai: responses")
def responses(context):
    plain = {"model": "default", "input": "Tell me a story.", "max_output_tokens": 16, "temperature": 0}
    context.needs("/v1/responses", plain)
    body = {**plain, "extra_body": {"ignore_eos": True}}
    whole = context.openai.responses.create(**body, instructions="You are brief.")
    equal(whole.object, "response")
    equal(whole.status, "incomplete", "status at max_output_tokens")
    equal(whole.incomplete_details.reason, "max_output_tokens")
    expect(whole.output_text, whole)
    equal(whole.usage.output_tokens, 16, "output_tokens")
    events = list(context.openai.responses.create(**body, stream=True))
    kinds = [event.type for event in events]
    equal(kinds[:2], ["response.created", "response.in_progress"])
    equal(kinds[-1], "response.incomplete", "last event")
    equal([event.sequence_number for event in events], list(range(len(events))), "sequence numbers")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    done = [event.text for event in events if event.type == "response.output_text.done"]
    equal(done, [text], "output_text.done")
    equal(events[-1].response.output_text, text, "text of the last event")
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
             {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}, {"role": "user", "content": "Go on"}]
    equal(context.openai.responses.create(**{**body, "input": turns}).object, "response")
    refused = context.server.post("/v1/responses", {**plain, "previous_response_id": "resp_1"})
    equal(refused.status_code, 400, "previous_response_id without a store")
