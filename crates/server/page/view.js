// One message on the page.

import { MarkdownView } from "./markdown.js";

export function el(tag, fields = {}, ...children) {
  const { dataset = {}, aria = {}, ...rest } = fields;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function action(name, picture, label) {
  return el("button", { type: "button", className: "icon", title: label, dataset: { action: name }, aria: { label } }, icon(picture));
}

const seconds = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`);
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** Figures under an answer. Before the server's own count comes, a piece of text counts as a token. */
export function figures({ timing, usage, state }, now) {
  if (!timing) return "";
  const { sent, first, last, pieces } = timing;
  if (!first) return state === "running" ? `waiting ${(Math.max(0, now - sent) / 1000).toFixed(1)} s` : "";
  const tokens = usage?.completion_tokens ?? pieces;
  const about = usage ? "" : "≈ ";
  const parts = [about + count(tokens, "token")];
  if (tokens > 1 && last > first) {
    const rate = ((tokens - 1) * 1000) / (last - first);
    parts.unshift(`${about}${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  }
  parts.push(`first token ${seconds(first - sent)}`);
  if (usage?.prompt_tokens) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} in prompt${cached ? `, ${cached} cached` : ""}`);
  }
  return parts.join(" · ");
}

const ENDS = {
  length: "Cut off: the limit of tokens was reached. Max tokens in the settings raises it, up to the context.",
  content_filter: "Cut off by the server's content filter.",
};

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still arriving, or not JSON: shown as it came
  }
}

export class MessageView {
  #calls = [];

  constructor(message) {
    this.message = message;
    const names = { user: "You", assistant: message.model ?? "Answer", tool: "Tool result" };
    const name = names[message.role];
    this.element = el("article", { className: `message ${message.role}`, dataset: { id: message.id }, aria: { label: name } });
    this.body = el("div", { className: message.role === "assistant" ? "prose" : "text" });
    if (message.role === "assistant") {
      this.prose = new MarkdownView(this.body);
      this.thought = new MarkdownView(el("div", { className: "prose" }));
      this.thoughtTitle = el("summary", { textContent: "Reasoning" });
      this.details = el("details", { className: "reasoning", hidden: true }, this.thoughtTitle, this.thought.root);
      this.thoughtTitle.addEventListener("click", () => (this.touched = true));
      this.calls = el("div", { className: "calls" });
      this.notice = el("div", { className: "notice", hidden: true });
      this.element.append(this.details, this.body, this.calls, this.notice);
    } else {
      if (message.role === "tool") this.element.append(el("p", { className: "label", textContent: `Result of ${message.name}` }));
      this.element.append(this.body);
    }
    this.figures = el("span", { className: "figures" });
    this.branches = el("span", { className: "branches" });
    this.actions = el("span", { className: "actions" });
    this.element.append(el("footer", {}, this.branches, this.actions, this.figures));
    const buttons = { user: [["copy", "copy", "Copy"], ["edit", "edit", "Edit"]], assistant: [["copy", "copy", "Copy"], ["again", "again", "Regenerate"]] };
    for (const button of buttons[message.role] ?? []) this.actions.append(action(...button));
  }

  /** `place` is `{index, total, last}`: which of its siblings is shown, and whether it ends the branch. */
  update(place) {
    if (place) this.#placed(place);
    const { message } = this;
    const running = message.state === "running";
    this.element.classList.toggle("running", running);
    if (message.role !== "assistant") {
      this.body.textContent = message.content;
      return;
    }
    this.prose.update(message.content);
    const { reasoning } = message;
    this.details.hidden = !reasoning;
    if (reasoning) {
      this.thought.update(reasoning);
      const thinking = running && !message.content && !message.tool_calls.length;
      if (!this.touched) this.details.open = thinking;
      this.thoughtTitle.textContent = thinking ? "Reasoning…" : "Reasoning";
    }
    this.#showCalls();
    this.#showNotice();
    this.actions.hidden = running || !(message.content || message.tool_calls.length || this.notice.hidden);
    this.tick();
  }

  tick(now = performance.now()) {
    const { model, state } = this.message;
    const text = figures(this.message, now);
    this.figures.textContent = text && model && state !== "running" ? `${text} · ${model}` : text;
  }

  #placed({ index, total, last }) {
    this.last = last;
    const step = (name, picture, label, off) => Object.assign(action(name, picture, label), { disabled: off });
    const focused = this.branches.contains(document.activeElement) && document.activeElement.dataset.action;
    this.branches.replaceChildren();
    if (total < 2) return;
    this.branches.append(
      step("previous", "left", "Previous version", index === 0),
      el("span", { textContent: `${index + 1} / ${total}` }),
      step("next", "right", "Next version", index === total - 1),
    );
    if (focused) this.branches.querySelector("button:enabled").focus();
  }

  #showCalls() {
    const { tool_calls: calls, state } = this.message;
    calls.forEach((call, i) => {
      if (!call) return;
      const view = (this.#calls[i] ??= this.#newCall(i));
      view.name.textContent = call.name;
      view.block.setAttribute("aria-label", `Tool call: ${call.name}`);
      view.text.textContent = pretty(call.arguments || "{}");
    });
    const open = calls.length > 0 && this.last && state !== "running";
    for (const view of this.#calls) if (view) view.answer.hidden = !open;
    if (open && !this.give) {
      this.give = el("button", { type: "button", className: "plain", textContent: "Send results", dataset: { action: "results" } });
      this.calls.append(this.give);
    }
    if (this.give) this.give.hidden = !open;
  }

  #newCall(i) {
    const id = `result-${this.message.id}-${i}`;
    const view = { name: el("strong"), text: el("code") };
    view.result = el("textarea", { id, rows: 1, className: "mono", spellcheck: false });
    view.answer = el("div", { hidden: true }, el("label", { htmlFor: id, textContent: "Result" }), view.result);
    view.block = el("section", { className: "call" }, el("p", { className: "label" }, icon("tool"), view.name), el("pre", {}, view.text), view.answer);
    this.calls.insertBefore(view.block, this.give ?? null);
    return view;
  }

  /** What the reader wrote as results, `{tool_call_id, name, content}` each. */
  results() {
    return this.#calls.map((view, i) => {
      const { id, name } = this.message.tool_calls[i];
      return { tool_call_id: id, name, content: view.result.value };
    });
  }

  #showNotice() {
    const { state, error, finish_reason: end } = this.message;
    const lines = [];
    if (state === "failed") {
      lines.push(el("p", {}, el("strong", { textContent: error.message })));
      const facts = [error.status && `status ${error.status}`, error.type, error.code, error.param && `field ${error.param}`].filter(Boolean);
      if (facts.length) lines.push(el("p", { className: "note", textContent: facts.join(" · ") }));
      if (error.retryAfter) lines.push(el("p", { className: "note", textContent: `The server asks to wait ${error.retryAfter} s.` }));
      lines.push(el("button", { type: "button", className: "plain", textContent: "Try again", dataset: { action: "again" } }));
    } else if (state === "stopped") lines.push(el("p", { textContent: "Stopped." }));
    else if (state === "done" && ENDS[end]) lines.push(el("p", { textContent: ENDS[end] }));
    else if (state === "done" && !this.message.content && !this.message.tool_calls.length) {
      lines.push(el("p", { textContent: "The model ended without an answer." }));
    }
    this.notice.hidden = !lines.length;
    this.notice.classList.toggle("failed", state === "failed");
    const now = `${state} ${end} ${error?.message}`;
    if (this.notice.dataset.shows === now) return;
    this.notice.dataset.shows = now;
    this.notice.replaceChildren(...lines);
  }

  /** Replaces the text by a field; `send(text)` is called with what was written. */
  edit(send) {
    if (this.form) return;
    const field = el("textarea", { value: this.message.content, rows: 1, aria: { label: "Edit the message" } });
    const buttons = el("div", { className: "row end" },
      el("button", { type: "button", className: "plain", textContent: "Cancel", onclick: () => this.endEdit() }),
      el("button", { className: "primary", textContent: "Send" }));
    this.form = el("form", { className: "edit" }, field, buttons);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      this.endEdit();
      send(field.value);
    });
    this.body.hidden = true;
    this.body.after(this.form);
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  }

  endEdit() {
    this.form?.remove();
    this.form = null;
    this.body.hidden = false;
    this.actions.querySelector("[data-action=edit]")?.focus();
  }
}
