// The settings drawer, and moving conversations out of and into the browser.

import { NUMBERS, newId, toolsProblem } from "./conversation.js";

const TEXTS = ["system", "stop", "tools"];
const $ = (id) => document.getElementById(id);

/** Shows `settings` in the drawer; `changed(settings)` is called with every valid change. */
export function openSettings(settings, changed) {
  const fields = [...NUMBERS, ...TEXTS].map($);
  const problem = () => {
    const found = fields.map((field) => {
      let text = field.validationMessage;
      if (field.id === "tools") text = toolsProblem(field.value);
      if (field.id === "stop" && field.value.split("\n").filter(Boolean).length > 4) text = "At most four.";
      field.setAttribute("aria-invalid", Boolean(text));
      return text && `${field.labels[0].textContent}: ${text}`;
    });
    return found.filter(Boolean).join(" ");
  };
  const read = () => {
    const text = problem();
    $("settings-problem").textContent = text && `${text} Changes wait until this is right.`;
    if (!text) changed(Object.fromEntries(fields.map((field) => [field.id, field.value])));
  };
  for (const field of fields) {
    field.value = settings[field.id] ?? "";
    field.oninput = read;
  }
  $("reset").onclick = () => {
    for (const field of fields) field.value = "";
    read();
  };
  $("settings-problem").textContent = problem();
  $("settings").showModal();
}

/** Saves conversations as a file. */
export function exportFile(conversations, name) {
  const text = JSON.stringify({ format: "marlin-conversations", version: 1, conversations }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const string = (value, fallback = "") => (typeof value === "string" ? value : fallback);

/** Conversations of an exported file, under new names, or an error that says what is wrong. */
export function importText(text) {
  const file = JSON.parse(text);
  if (file?.format !== "marlin-conversations" || !Array.isArray(file.conversations)) {
    throw new Error('it has no "format": "marlin-conversations"');
  }
  return file.conversations.map((given, i) => {
    if (!Array.isArray(given?.messages)) throw new Error(`conversation ${i + 1} has no list of messages`);
    const messages = given.messages.map((message, j) => {
      const { id, role, content } = message ?? {};
      if (typeof id !== "string" || typeof content !== "string" || !["user", "assistant", "tool"].includes(role)) {
        throw new Error(`message ${j + 1} of conversation ${i + 1} lacks an id, a content or a known role`);
      }
      const kept = { id, parent: string(message.parent, null), role, content };
      if (role === "tool") return { ...kept, name: string(message.name), tool_call_id: string(message.tool_call_id) };
      if (role === "user") return kept;
      const calls = Array.isArray(message.tool_calls) ? message.tool_calls : [];
      const tool_calls = calls.map((call) => ({ id: string(call?.id), name: string(call?.name), arguments: string(call?.arguments) }));
      return { ...kept, reasoning: string(message.reasoning), model: string(message.model), tool_calls, state: "done" };
    });
    const settings = Object.fromEntries(["model", ...NUMBERS, ...TEXTS].map((name) => [name, string(given.settings?.[name])]));
    const updated = Number(given.updated) || Date.now();
    return { id: newId(), title: string(given.title, "Untitled"), created: updated, updated, settings, messages, head: string(given.head, messages.at(-1)?.id ?? null) };
  });
}
