// The list of conversations.

import { action, el } from "./view.js";

const DAY = 24 * 3600 * 1000;

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "Past week" : "Earlier";
}

/** Fills `root`; `running` tells of a conversation whether an answer is being written. */
export function showList(root, conversations, current, running) {
  if (root.querySelector(".rename")) return; // a list drawn anew would take the field away
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  const at = focused && [focused.closest("li")?.dataset.id, focused.dataset.action];
  const groups = new Map();
  for (const conversation of [...conversations].sort((a, b) => b.updated - a.updated)) {
    const name = groupOf(conversation.updated);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(row(conversation, conversation.id === current, running(conversation.id)));
  }
  root.replaceChildren(...[...groups].flatMap(([name, rows]) => [el("h2", { className: "label", textContent: name }), el("ul", {}, ...rows)]));
  if (at) root.querySelector(`li[data-id="${at[0]}"] [data-action="${at[1]}"]`)?.focus();
}

function row({ id, title }, current, running) {
  const open = el("button", { type: "button", className: "open", title, textContent: title, dataset: { action: "open" } });
  if (current) open.setAttribute("aria-current", "page");
  if (running) open.append(el("span", { className: "sr", textContent: " (answering)" }));
  const tools = el("span", { className: "tools" }, action("rename", "edit", `Rename ${title}`), action("export", "save", `Export ${title}`), action("delete", "bin", `Delete ${title}`));
  return el("li", { dataset: { id }, className: `${current ? "current" : ""} ${running ? "busy" : ""}` }, open, tools);
}

/** Turns the title of a row into a field; `done(title)` gets the new one, or null if it stays. */
export function rename(item, title, done) {
  const field = el("input", { className: "rename", value: title, maxLength: 200, aria: { label: "Title of the conversation" } });
  let open = true;
  const end = (keep) => {
    if (!open) return;
    open = false;
    field.remove();
    done(keep && field.value.trim() ? field.value.trim() : null);
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
    event.stopPropagation();
    event.preventDefault();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  item.replaceChildren(field);
  field.select();
  field.focus();
}
