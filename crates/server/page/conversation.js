// A conversation is a tree of messages: an edited question or a second answer is a sibling of the
// first, so nothing written is lost. `head` is the last message of the branch that is shown.
//
// A message: {id, parent, role, content} and, of an assistant, {reasoning, tool_calls, model,
// finish_reason, usage, state, error, timing}. `state` is running, done, stopped or failed.

export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export function newId() {
  // crypto.randomUUID needs HTTPS or localhost; a server in the local network has neither.
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36).padStart(2, "0")).join("");
}

export function create(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, messages: [], head: null };
}

export function append(conversation, parent, fields) {
  const message = { id: newId(), parent, content: "", created: Date.now(), ...fields };
  conversation.messages.push(message);
  conversation.head = message.id;
  conversation.updated = message.created;
  if (!conversation.title && fields.role === "user") conversation.title = titleOf(fields.content);
  return message;
}

export function remove(conversation, message) {
  conversation.messages = conversation.messages.filter((one) => one !== message);
  if (conversation.head === message.id) conversation.head = message.parent;
}

/** The branch that is shown, from the first message to the last; or the one that ends at `head`. */
export function branch(conversation, head = conversation.head) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const path = [];
  for (let at = byId.get(head); at && path.length < byId.size; at = byId.get(at.parent)) path.push(at);
  return path.reverse();
}

export function siblings(conversation, message) {
  return conversation.messages.filter((one) => one.parent === message.parent && one.role === message.role);
}

/** Shows the branch through a message, down to the latest message below it. */
export function select(conversation, message) {
  let head = message;
  for (let next = head; next; next = conversation.messages.findLast((one) => one.parent === head.id)) head = next;
  conversation.head = head.id;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "Untitled";
}

/** Body of POST /v1/chat/completions for an answer to the branch that ends at `head`. */
export function requestBody(conversation, model, head) {
  const { settings } = conversation;
  const messages = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const message of branch(conversation, head)) {
    const { role, content } = message;
    if (role === "assistant") {
      const calls = message.tool_calls ?? [];
      const tool_calls = calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
      if (calls.length) messages.push({ role, content: content || null, tool_calls });
      else if (content) messages.push({ role, content });
    } else if (role === "tool") messages.push({ role, tool_call_id: message.tool_call_id, content });
    else messages.push({ role, content });
  }
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  // A field left empty is not sent: the server's and the model's own defaults hold.
  for (const name of NUMBERS) if (settings[name] !== "" && settings[name] != null) body[name] = Number(settings[name]);
  const stop = (settings.stop ?? "").split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  if (settings.tools?.trim()) body.tools = JSON.parse(settings.tools);
  return body;
}

/** What is wrong with the tools somebody wrote, or "". */
export function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    if (!Array.isArray(tools)) return "Tools are a JSON list.";
    const bad = tools.findIndex((tool) => tool?.type !== "function" || typeof tool.function?.name !== "string");
    return bad < 0 ? "" : `Tool ${bad + 1} needs "type": "function" and a function with a name.`;
  } catch (error) {
    return `Tools are not valid JSON: ${error.message}`;
  }
}
