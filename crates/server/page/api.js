// What the page asks of the server: /v1/models, /v1/chat/completions as a stream, /metrics.
// Addresses are relative, so that the page also works under a path of a reverse proxy.

import { EventStream } from "./sse.js";
import { storage } from "./store.js";

const KEY = "marlin.key";
const session = storage("sessionStorage");

/** `status` is 0 where none tells of the failure; the other fields are those of OpenAI's error shape. */
export class ApiError extends Error {
  constructor(status, message, fields = {}) {
    super(message);
    this.status = status;
    this.type = fields.type ?? null;
    this.param = fields.param ?? null;
    this.code = fields.code ?? null;
    this.retryAfter = fields.retryAfter ?? null;
  }
}

// The key lives as long as the tab, and is never written beside the conversations.
export const key = {
  get: () => session.getItem(KEY) ?? "",
  set: (value) => (value ? session.setItem(KEY, value) : session.removeItem(KEY)),
};

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  throw errorOf(response.status, await response.text().catch(() => ""), response.headers.get("Retry-After"));
}

function errorOf(status, text, retryAfter) {
  try {
    const { error } = JSON.parse(text);
    if (error?.message) return new ApiError(status, String(error.message), { ...error, retryAfter });
  } catch {
    // Not ours: a proxy's page, say. Its status is what can be told.
  }
  return new ApiError(status, `The server answered with status ${status} and no explanation.`, { retryAfter });
}

/** Ids of the models that the server offers. */
export async function models(signal) {
  const body = await (await request("v1/models", { signal })).json();
  return (body.data ?? []).map((model) => String(model.id));
}

/** Yields the chunks of a streamed completion. Ends normally only where the server said `[DONE]`. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", { body, signal });
  const type = response.headers.get("Content-Type") ?? "nothing";
  if (!type.startsWith("text/event-stream")) {
    throw new ApiError(response.status, `The server sent ${type} where a stream of events was expected.`);
  }
  const reader = response.body.getReader();
  const stream = new EventStream();
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection was lost before the answer ended.");
      }
      if (part.done) throw new ApiError(0, "The server closed the connection before the answer ended.");
      for (const { data } of stream.push(part.value)) {
        if (data === "[DONE]") return;
        const chunk = parsed(data);
        if (chunk.error) throw new ApiError(0, String(chunk.error.message ?? data), chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    throw new ApiError(0, `The server sent an event that is not JSON: ${data.slice(0, 200)}`);
  }
}

/** Adds a chunk to a message. True if the chunk brought something of the answer. */
export function accumulate(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage;
  if (chunk.model) message.model = chunk.model;
  const choice = chunk.choices?.find((one) => (one.index ?? 0) === 0);
  if (!choice) return false;
  if (choice.finish_reason) message.finish_reason = choice.finish_reason;
  const delta = choice.delta ?? {};
  message.content += delta.content ?? "";
  message.content += delta.refusal ?? "";
  message.reasoning += delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (message.tool_calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  return Boolean(delta.content || delta.refusal || delta.reasoning_content || delta.tool_calls?.length);
}

/** Samples of the Prometheus text format as `[name, labels, value]`. */
export function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (match) found.push([match[1], match[2] ?? "", Number(match[3])]);
  }
  return found;
}

/** Load of the server, or null where it publishes none: `{cache, running}`, cache from 0 to 1. */
export async function load(model) {
  const all = samples(await (await request("metrics")).text());
  const of = (name) => {
    const found = all.filter((sample) => sample[0] === name);
    const own = found.filter((sample) => sample[1].includes(`model_name=${JSON.stringify(model)}`));
    return (own.length ? own : found).map((sample) => sample[2]).filter(Number.isFinite);
  };
  const cache = of("vllm:kv_cache_usage_perc");
  if (!cache.length) return null;
  return { cache: Math.max(...cache), running: of("vllm:num_requests_running").reduce((a, b) => a + b, 0) };
}
