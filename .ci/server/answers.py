"""The same question gets the same answer: alone, in company, with a small cache, with a prefix that is known."""
import time
from concurrent.futures import ThreadPoolExecutor

from .harness import check, equal, expect, streamed_text

CLIENTS = 32
CONTEXT = 256


def bodies():
    """Every third one chooses by a seed, the others take the likeliest token."""
    for i in range(CLIENTS):
        text = f"Story {i}. " + "Tell me about the old mill and the river. " * (i % 7)
        more = {"temperature": 1, "seed": i, "top_p": 0.95} if i % 3 == 2 else {"temperature": 0}
        yield {"messages": [{"role": "user", "content": text}], "max_tokens": 16 + 12 * (i % 4), "ignore_eos": True, **more}


_alone = {}


def alone(context):
    """Answers of a server that has one client."""
    if not _alone:
        with context.start("--context", str(CONTEXT), "--cache-tokens", "4096", "--no-prefix-cache") as server:
            _alone["texts"] = [streamed_text(server, body) for body in bodies()]
            counts = [server.post("/tokenize", {"messages": body["messages"], "add_generation_prompt": True}).json()["count"] for body in bodies()]
            _alone["demand"] = sum(count + body["max_tokens"] for count, body in zip(counts, bodies()))
    return _alone["texts"], _alone["demand"]


def together(server):
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda body: streamed_text(server, body), bodies()))


def compare(found, expected):
    wrong = [i for i in range(CLIENTS) if found[i] != expected[i]]
    expect(not wrong, f"{len(wrong)} of {CLIENTS} answers differ, the first, {wrong[0] if wrong else ''}:\n{[(found[i], expected[i]) for i in wrong[:1]]}")


@check("answers: 32 clients at once get what each gets alone")
def company(context):
    expected, demand = alone(context)
    with context.start("--context", str(CONTEXT), "--cache-tokens", str(2 * demand)) as server:
        compare(together(server), expected)
        # And once more, with every prompt known.
        compare(together(server), expected)
        server.idle()
        return f"{demand} tokens"


@check("answers: the same with a cache of a quarter of the demand")
def small_cache(context):
    expected, demand = alone(context)
    tokens = max(CONTEXT, demand // 4)
    with context.start("--context", str(CONTEXT), "--cache-tokens", str(tokens)) as server:
        compare(together(server), expected)
        server.idle()
        return f"{tokens} of {demand} tokens, {server.metric('marlin:num_preemptions_total'):.0f} preemptions"


@check("answers: a known prefix is not computed again")
def prefix(context):
    server = context.server
    limit = server.get("/v1/models").json()["data"][0]["max_model_len"]
    text = f"{time.time_ns()} " + " ".join(f"The {i}th mouse lived in the {i * 7 % 97}th house." for i in range(limit // 18))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}

    def ask(**more):
        start = time.monotonic()
        response = server.post("/v1/chat/completions", {**body, **more})
        equal(response.status_code, 200, response.text[:300])
        answer = response.json()
        return time.monotonic() - start, answer["usage"], answer["choices"]

    cold, usage, first = ask()
    equal(usage["prompt_tokens_details"]["cached_tokens"], 0, "cached_tokens of the first")
    expect(usage["prompt_tokens"] > limit // 3, usage)
    warm, again, second = min((ask() for _ in range(3)), key=lambda one: one[0])
    cached = again["prompt_tokens_details"]["cached_tokens"]
    expect(usage["prompt_tokens"] - 32 <= cached < usage["prompt_tokens"], f"cached {cached} of {usage['prompt_tokens']}")
    equal(second, first, "the answer of a known prompt")
    expect(warm < 0.5 * cold, f"{cold:.3f} s cold, {warm:.3f} s warm")
    _, salted, _ = ask(cache_salt="another tenant")
    equal(salted["prompt_tokens_details"]["cached_tokens"], 0, "cached_tokens under another salt")
    return f"{usage['prompt_tokens']} tokens: {cold * 1e3:.0f} ms, known {warm * 1e3:.0f} ms"
