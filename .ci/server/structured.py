"""Answers that have to look like something: schemas, grammars, required calls. Here the smallest model must obey."""
import json
import re
import time
from typing import Literal

from .harness import check, equal, expect
from .openai import PLAIN, TOOLS, assembled

SCHEMA = {"type": "object", "additionalProperties": False, "required": ["colour", "sizes", "old"], "properties": {
    "colour": {"type": "string", "enum": ["red", "green", "dark blue"]}, "old": {"type": "boolean"},
    "sizes": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "integer", "minimum": 1, "maximum": 20}}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
REQUIRED = {"tools": TOOLS, "tool_choice": "required"}


def fits(text):
    value = json.loads(text)
    equal(set(value), {"colour", "sizes", "old"}, "fields")
    expect(value["colour"] in ("red", "green", "dark blue") and isinstance(value["old"], bool), value)
    expect(1 <= len(value["sizes"]) <= 3 and all(isinstance(n, int) and 1 <= n <= 20 for n in value["sizes"]), value)


@check("structured: a schema, whole and streamed")
def schema(context):
    context.needs_chat(response_format=FORMAT)
    for temperature, seed in ((0, 1), (1.5, 2), (1.5, 3)):
        # Room for all the white space that a schema lets a model choose.
        body = {**PLAIN, "max_tokens": 400, "temperature": temperature, "seed": seed, "response_format": FORMAT}
        choice = context.openai.chat.completions.create(**body).choices[0]
        equal(choice.finish_reason, "stop", "finish_reason")
        fits(choice.message.content)
        streamed = "".join(c.choices[0].delta.content or "" for c in context.openai.chat.completions.create(**body, stream=True))
        equal(streamed, choice.message.content, "streamed")


@check("structured: parse with pydantic")
def parse(context):
    import pydantic
    context.needs_chat(response_format=FORMAT)

    class Pet(pydantic.BaseModel):
        kind: Literal["cat", "dog", "mouse"]
        brave: bool
        friends: list[Literal["Ann", "Ben"]] = pydantic.Field(max_length=2)

    answer = context.openai.chat.completions.parse(**{**PLAIN, "max_tokens": 400}, response_format=Pet)
    expect(isinstance(answer.choices[0].message.parsed, Pet), answer)
    with context.openai.chat.completions.stream(**{**PLAIN, "max_tokens": 400}, response_format=Pet) as events:
        equal(events.get_final_completion().choices[0].message.parsed, answer.choices[0].message.parsed, "streamed")


@check("structured: json_object")
def json_object(context):
    context.needs_chat(response_format={"type": "json_object"})
    body = {**PLAIN, "messages": [{"role": "user", "content": "A JSON object, please."}], "max_tokens": 200}
    choice = context.openai.chat.completions.create(**body, response_format={"type": "json_object"}).choices[0]
    if choice.finish_reason == "stop":
        expect(isinstance(json.loads(choice.message.content), dict), choice)
    else:
        equal(choice.finish_reason, "length")
        expect(choice.message.content.lstrip().startswith("{"), choice)


@check("structured: regex, lark and gbnf")
def grammars(context):
    grammars = [("regex", r"[a-c]{3}-[0-9]{4}"), ("lark", 'start: /[a-c]{3}/ "-" /[0-9]{4}/'),
                ("gbnf", 'root ::= [a-c] [a-c] [a-c] "-" [0-9] [0-9] [0-9] [0-9]')]
    context.needs_chat(grammar={"type": "regex", "value": grammars[0][1]})
    for kind, value in grammars:
        for path, prompt in (("chat/completions", {"messages": PLAIN["messages"]}), ("completions", {"prompt": "Code: "})):
            body = {**prompt, "max_tokens": 40, "temperature": 1, "seed": 4, "grammar": {"type": kind, "value": value}}
            response = context.server.post(f"/v1/{path}", body)
            equal(response.status_code, 200, f"{kind}: {response.text[:500]}")
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            expect(re.fullmatch(grammars[0][1], text) and choice["finish_reason"] == "stop", kind, choice)
    for grammar in ({"type": "regex", "value": "("}, {"type": "lark", "value": "start: nothing"}, {"type": "gbnf", "value": "root ::= x"},
                    {"type": "lark", "value": "start: start"}, {"type": "gbnf", "value": "root ::= root"}):
        response = context.server.post("/v1/completions", {"prompt": "a", "grammar": grammar})
        equal(response.status_code, 400, f"{grammar}: {response.text[:300]}")


@check("structured: required calls, streamed")
def required(context):
    context = context.caller
    context.needs_chat(**REQUIRED)
    # The embedded model would never stop to call.
    body = {**PLAIN, "max_tokens": 300, "parallel_tool_calls": False, **REQUIRED}
    choice = context.openai.chat.completions.create(**body).choices[0]
    equal(choice.finish_reason, "tool_calls", "finish_reason")
    content, calls = assembled(context.openai.chat.completions.create(**body, stream=True))
    equal(content, choice.message.content or "", "content, streamed")
    whole = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    equal([(call["name"], call["arguments"]) for call in calls], whole, "calls, streamed")
    for name, arguments in whole:
        arguments = json.loads(arguments)
        expect(name == "get_weather" and arguments["town"] in ("Paris", "Rome", "Oslo"), name, arguments)
    named = {"type": "function", "function": {"name": "get_weather"}}
    one = context.openai.chat.completions.create(**{**body, "tool_choice": named, "parallel_tool_calls": False}).choices[0]
    equal(len(one.message.tool_calls), 1, "calls without parallel_tool_calls")


@check("structured: keywords are obeyed or refused")
def keywords(context):
    context.needs_chat(response_format=FORMAT)
    cases = {"uniqueItems": {"type": "array", "minItems": 3, "maxItems": 3, "uniqueItems": True, "items": {"enum": [1, 2, 3]}}, "not": {"not": {}},
             "if": {"type": "string", "maxLength": 3, "if": {"type": "string"}, "then": {"enum": ["abc"]}},
             "format": {"type": "string", "maxLength": 10, "format": "no-such-format"},
             "multipleOf": {"type": "integer", "minimum": 1, "maximum": 20, "multipleOf": 7}}
    obeyed = {"uniqueItems": lambda v: len(set(v)) == 3, "not": lambda v: False, "if": lambda v: v == "abc", "format": lambda v: False,
              "multipleOf": lambda v: v % 7 == 0}
    for name, value in cases.items():
        response = context.server.chat("Hi", max_tokens=200, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})
        if response.status_code != 400:
            text = response.json()["choices"][0]["message"]["content"]
            expect(obeyed[name](json.loads(text)), f"{name} is taken and not obeyed: {text!r}")


@check("structured: schemas that are wrong or too much")
def wrong(context):
    context.needs_chat(response_format=FORMAT)
    deep = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(25_000)}}
    bomb = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(((a{1,30}){1,30}){1,30}){1,30}$"}}}
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for name, value in (("type", {"type": "nonsense"}), ("deep", deep), ("wide", wide), ("bomb", bomb), ("endless", endless)):
        start = time.monotonic()
        response = context.server.chat("Hi", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})
        seconds = time.monotonic() - start
        expect(response.status_code in (200, 400), f"{name}: {response.status_code} {response.text[:300]}")
        expect(seconds < 2 or name == "bomb" and seconds < 6, f"{name}: {seconds:.1f} s")
        expect(context.server.alive(), f"{name} ended the server")
