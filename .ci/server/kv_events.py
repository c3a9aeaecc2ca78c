"""What routers hear of the cache, through libzmq and msgpack as they do."""
import contextlib
import re
import time

import httpx

from .harness import check, equal, expect

BLOCK = 16


class Router:
    """Keeps what it is told, as a router does: blocks by hash, with the text down to the beginning."""

    def __init__(self, endpoint, topic):
        import zmq
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        # libzmq then sends pings, which must be answered.
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, 200)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1000)
        self.socket.connect(endpoint)
        self.texts, self.salts, self.next, self.removed, self.cleared = {}, {}, 0, 0, 0

    def hear(self, seconds):
        """Takes what comes within so many seconds of silence; the topics."""
        import msgpack
        topics = set()
        while self.socket.poll(int(seconds * 1000)):
            topic, number, body = self.socket.recv_multipart()
            topics.add(topic.decode())
            equal(int.from_bytes(number, "big"), self.next, "number of the message")
            self.next += 1
            seconds_now, events, rank = msgpack.unpackb(body)
            expect(abs(seconds_now - time.time()) < 60 and rank == 0, seconds_now, rank)
            for event in events:
                getattr(self, event.pop("type"))(**event)
        return topics

    def BlockStored(self, block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name, extra_keys=None):
        equal((block_size, len(token_ids), lora_id, lora_name, medium), (BLOCK, BLOCK * len(block_hashes), None, None, "GPU"), "BlockStored")
        text, salt = (self.texts[parent_block_hash], self.salts[parent_block_hash]) if parent_block_hash else ((), None)
        if extra_keys:
            equal((parent_block_hash, len(extra_keys), extra_keys[1:]), (None, len(block_hashes), [None] * (len(block_hashes) - 1)), "extra_keys")
            salt = extra_keys[0][0]
        for index, block in enumerate(block_hashes):
            expect(block not in self.texts and 0 < block < 1 << 64, "told twice", block)
            text += tuple(token_ids[index * BLOCK:(index + 1) * BLOCK])
            self.texts[block], self.salts[block] = text, salt

    def BlockRemoved(self, block_hashes, medium):
        equal(medium, "GPU", "medium")
        for block in block_hashes:
            del self.texts[block], self.salts[block]
            self.removed += 1

    def AllBlocksCleared(self):
        self.texts.clear()
        self.cleared += 1

    def expects(self, tokens, salt=None):
        """Tokens of a prompt that the cache holds, all but the last at most."""
        known = {text for block, text in self.texts.items() if self.salts[block] == salt}
        count = 0
        while (count + 1) * BLOCK < len(tokens) and tuple(tokens[:(count + 1) * BLOCK]) in known:
            count += 1
        return count * BLOCK

    def close(self):
        self.socket.close(linger=0)


@contextlib.contextmanager
def listening(context, *options, topic=""):
    with context.start("--context", "512", "--cache-tokens", "1024", "--kv-events", "tcp://127.0.0.1:0", *options) as server:
        endpoint = next(found[1] for line in server.lines if (found := re.match(r"cache events: (tcp://\S+)", line)))
        router = Router(endpoint, topic)
        try:
            start = time.monotonic()
            while server.metric("marlin:kv_event_subscribers") < 1:
                expect(time.monotonic() - start < 10, "libzmq does not connect")
                time.sleep(0.02)
            time.sleep(0.3)
            yield server, router
        finally:
            router.close()


@check("kv_events: a router knows what a prompt will find")
def known(context):
    with listening(context) as (server, router):
        asked, found = [], 0
        # Too short for a block; the metrics of a model begin with its first request.
        server.post("/v1/completions", {"prompt": [5], "max_tokens": 1})
        for index in range(24):
            prompt = [1000 + (index % 5) * 50 + place // 7 for place in range(40 + index * 11 % 90)]
            salt = "tenant" if index % 4 == 0 else None
            expected = router.expects(prompt, salt)
            body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0, **({"cache_salt": salt} if salt else {})}
            before = server.metric("marlin:prefix_cache_hits_total")
            equal(server.post("/v1/completions", body).status_code, 200, "status")
            hits = server.metric("marlin:prefix_cache_hits_total") - before
            asked.append((hits, expected))
            found += hits > 0
            router.hear(0.2)
        expect(all(hits == expected for hits, expected in asked), asked)
        expect(found > 3 and router.removed > 0 and router.cleared == 0, found, router.removed, router.cleared)
        equal(server.metric("marlin:kv_event_messages_total"), router.next, "messages")
        equal(server.metric("marlin:kv_event_messages_missed_total"), 0, "missed")
        return f"{router.next} messages, {router.removed} blocks given up"


@check("kv_events: topics, and who may not read them")
def topics(context):
    with listening(context, "--kv-events-topic", "kv@pod@{model}", topic="kv@pod@") as (server, router):
        model = server.get("/v1/models").json()["data"][0]["id"]
        server.chat("Hello there, " * 20, max_tokens=4)
        equal(router.hear(0.5), {f"kv@pod@{model}"}, "topics")
        port = router.socket.getsockopt_string(__import__("zmq").LAST_ENDPOINT).rstrip("\0").rsplit(":", 1)[1]
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
            raise AssertionError(f"HTTP is answered there: {answer}")
        except httpx.HTTPError:
            pass
        equal(server.chat("Hi").status_code, 200, "status")


@check("kv_events: options that make no sense are refused")
def refused(context):
    for options, told in ((["--kv-events", "udp://1.2.3.4:5"], "tcp://"), (["--kv-events", "tcp://127.0.0.1"], "tcp://"),
                          (["--kv-events-topic", "x"], "--kv-events"), (["--kv-events", "tcp://*:0", "--no-prefix-cache"], "--no-prefix-cache")):
        done = context.run("serve", "--port", "0", *options)
        equal(done.returncode, 2, f"{options}: {done.stderr[-300:]}; exit code")
        expect(told in done.stderr, options, done.stderr)
