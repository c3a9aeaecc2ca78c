// The page: what is shown, what runs, and what the keys and buttons do.

import { accumulate, ApiError, chat, key, load, models } from "./api.js";
import { append, branch, create, remove, requestBody, select, siblings, toolsProblem } from "./conversation.js";
import { exportFile, importText, openSettings } from "./settings.js";
import { rename, showList } from "./sidebar.js";
import { lastSettings, openStore, storage } from "./store.js";
import { el, MessageView } from "./view.js";

const $ = (id) => document.getElementById(id);
const input = $("input");
const scroller = $("scroll");
const local = storage("localStorage");
const small = matchMedia("(max-width: 48rem)");
const touch = matchMedia("(hover: none) and (pointer: coarse)");

let store;
let current; // the conversation that is shown; stored once it has a message
let offered = []; // ids of the server's models
let metered = true; // the server has metrics, as far as is known
let pinned = true; // the view follows the end of the answer
let followUp = null; // what to do once a key was given
const conversations = new Map();
const runs = new Map(); // conversation id -> {conversation, message, abort, saved}
const views = new WeakMap(); // message -> MessageView
const warned = new Set(); // conversations whose model is gone, once told
const drafts = new Map(); // conversation id -> text not sent yet
const others = new BroadcastChannel("marlin"); // other tabs of this page

// Showing.

const viewOf = (message) => {
  if (!views.has(message)) views.set(message, new MessageView(message));
  return views.get(message);
};

function draw() {
  const path = branch(current);
  let at = $("messages").firstChild;
  for (const message of path) {
    const view = viewOf(message);
    const all = siblings(current, message);
    view.update({ index: all.indexOf(message), total: all.length, last: message === path.at(-1) });
    if (view.element === at) at = at.nextSibling;
    else $("messages").insertBefore(view.element, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
  $("welcome").hidden = path.length > 0;
  const busy = runs.has(current.id);
  $("messages").setAttribute("aria-busy", busy);
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  $("send").classList.toggle("stop", busy);
  $("send").querySelector("use").setAttribute("href", busy ? "#i-stop" : "#i-send");
  document.title = current.title ? `${current.title} · Marlin` : "Marlin";
  drawList();
  drawModels();
  drawSettings();
  follow();
}

function drawSettings() {
  const { model, ...rest } = current.settings;
  const set = Object.values(rest).some((value) => value?.trim());
  $("open-settings").classList.toggle("set", set);
  $("open-settings").setAttribute("aria-label", set ? "Settings, some are set" : "Settings");
}

const drawList = () => showList($("conversations"), conversations.values(), current.id, (id) => runs.has(id));

function drawModels() {
  const model = modelOf(current);
  const ids = offered.length ? offered : [model];
  if ($("model").dataset.ids !== JSON.stringify(ids)) {
    $("model").replaceChildren(...ids.map((id) => el("option", { value: id, textContent: id })));
    $("model").dataset.ids = JSON.stringify(ids);
  }
  $("model").value = model;
  const wanted = current.settings.model;
  if (wanted && wanted !== model && !warned.has(current.id + wanted)) {
    warned.add(current.id + wanted);
    toast(`${wanted} is not served here; ${model} answers instead.`);
  }
  $("welcome-model").textContent = offered.length ? `${model} answers.` : "";
}

function follow() {
  if (pinned) scroller.scrollTop = scroller.scrollHeight;
  $("latest").hidden = pinned;
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function show(id) {
  if (current) drafts.set(current.id, input.value);
  current = conversations.get(id) ?? create(lastSettings.get());
  input.value = drafts.get(current.id) ?? "";
  fit(input);
  pinned = true;
  draw();
  closeNav();
  focusInput();
}

function go(id) {
  history.pushState(null, "", id ? `#${id}` : location.pathname + location.search);
  show(id);
}

function focusInput() {
  if (!touch.matches) input.focus(); // on a phone it would open the keyboard
}

function toast(text, label, run) {
  const close = () => $("toast").replaceChildren();
  const button = (name, then) => el("button", { type: "button", className: "plain", textContent: name, onclick: () => (close(), then?.()) });
  $("toast").replaceChildren(el("span", { textContent: text }), ...(label ? [button(label, run)] : []), button("Dismiss"));
  clearTimeout(toast.timer);
  toast.timer = setTimeout(close, 20000);
}

// Keeping.

async function keep(conversation) {
  conversations.set(conversation.id, conversation);
  try {
    await store.put(conversation);
    others.postMessage(conversation.id);
  } catch (error) {
    toast(`This conversation could not be saved in the browser: ${error.message}`);
  }
}

async function drop(conversation) {
  runs.get(conversation.id)?.abort.abort();
  conversations.delete(conversation.id);
  await store.remove(conversation.id);
  others.postMessage(conversation.id);
  if (conversation === current) go("");
  else drawList();
  $("new").focus();
  toast(`Deleted “${conversation.title}”.`, "Undo", async () => {
    await keep(conversation);
    go(conversation.id);
  });
}

others.onmessage = async ({ data: id }) => {
  if (runs.has(id)) return; // this tab writes it
  const stored = await store.get(id);
  if (stored) conversations.set(id, stored);
  else conversations.delete(id);
  if (id === current.id && stored) {
    current = stored;
    draw();
  } else drawList();
};

// The server.

function modelOf({ settings }) {
  if (!offered.length || offered.includes(settings.model)) return settings.model || "default";
  return offered[0];
}

function banner(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
}

/** Asks for the models, again and again while the server is away. */
async function connect() {
  clearTimeout(connect.timer);
  try {
    offered = await models();
    connect.delay = 0;
    banner("");
    drawModels();
  } catch (error) {
    if (error.status === 401) return askKey(error, connect);
    connect.delay = Math.min((connect.delay || 500) * 2, 15000);
    connect.timer = setTimeout(connect, connect.delay);
    banner(error.status === 503 ? `The server is not ready: ${error.message}` : `${error.message} Trying again…`);
  }
}

function askKey(error, then) {
  followUp = then;
  $("ask-key-problem").textContent = key.get() ? `The key was refused: ${error.message}` : "";
  $("key").value = "";
  if (!$("ask-key").open) $("ask-key").showModal();
  banner("The server asks for an API key. The settings take it.");
}

async function pollLoad() {
  if (!metered) return;
  try {
    const figures = await load(modelOf(current));
    $("load").hidden = !figures;
    if (!figures) return;
    const percent = Math.round(figures.cache * 100);
    $("load-text").textContent = `KV ${percent} %`;
    $("load-running").textContent = ` · ${figures.running} running`;
    $("load-bar").setAttribute("aria-valuenow", percent);
    $("load-bar").firstChild.style.width = `${Math.max(percent, figures.cache > 0 ? 2 : 0)}%`;
  } catch (error) {
    $("load").hidden = true;
    metered = error.status !== 404; // switched off
  }
}

// Answering.

async function answer(conversation, parent) {
  if (runs.has(conversation.id)) return;
  const problem = toolsProblem(conversation.settings.tools ?? "");
  if (problem) return toast(`Not sent. ${problem} The settings have them.`);
  const model = modelOf(conversation);
  const body = requestBody(conversation, model, parent);
  const timing = { sent: performance.now(), first: 0, last: 0, pieces: 0 };
  const message = append(conversation, parent, { role: "assistant", reasoning: "", tool_calls: [], model, state: "running", timing });
  const run = { conversation, message, abort: new AbortController(), saved: timing.sent };
  runs.set(conversation.id, run);
  if (runs.size === 1) ticking();
  keep(conversation);
  pinned = true;
  draw();
  announce("Waiting for the answer.");
  let frame = 0;
  let failure = null;
  try {
    for await (const chunk of chat(body, run.abort.signal)) {
      if (accumulate(message, chunk)) {
        timing.last = performance.now();
        timing.first ||= timing.last;
        timing.pieces += 1;
      }
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        viewOf(message).update();
        if (conversation === current) follow();
      });
    }
    message.state = "done";
  } catch (error) {
    failure = error;
    message.state = run.abort.signal.aborted ? "stopped" : "failed";
    const { status = 0, type, code, param, retryAfter } = error;
    message.error = { message: error.message, status, type, code, param, retryAfter };
  }
  cancelAnimationFrame(frame);
  runs.delete(conversation.id);
  if (conversations.has(conversation.id)) {
    if (failure?.status === 401) remove(conversation, message);
    await keep(conversation);
  }
  viewOf(message).update();
  draw();
  if (conversation === current) ended(message);
  else announce(`The answer in ${conversation.title} has ended.`);
  if (message.state !== "failed") return;
  if (failure.status === 401) askKey(failure, () => (connect(), answer(conversation, parent)));
  else if (!(failure instanceof ApiError)) console.error(failure);
  else if (failure.status === 0 || failure.status === 503) connect();
}

function announce(text) {
  $("announce").textContent = text;
}

/** Screen readers hear an answer once, whole, rather than every token. */
function ended({ state, error, tool_calls, id }) {
  const view = $("messages").querySelector(`[data-id="${id}"]`);
  const calls = tool_calls.map((call) => ` Calls the tool ${call.name}.`).join("");
  if (state === "failed") announce(`Failed: ${error.message}`);
  else announce(`${state === "stopped" ? "Stopped" : "Answer"}: ${view?.querySelector(":scope > .prose").innerText ?? ""}${calls}`);
}

/** While anything runs: waiting times, load, and a copy of what came so far. */
function ticking() {
  let turn = 0;
  const timer = setInterval(() => {
    turn += 1;
    const now = performance.now();
    for (const run of runs.values()) {
      viewOf(run.message).tick(now);
      if (now - run.saved < 2000 || !conversations.has(run.conversation.id)) continue;
      run.saved = now;
      keep(run.conversation);
    }
    if (turn % 8 === 1 || !runs.size) pollLoad();
    if (!runs.size) clearInterval(timer);
  }, 250);
}

function send() {
  const text = input.value;
  if (!text.trim() || runs.has(current.id)) return;
  input.value = "";
  fit(input);
  if (!conversations.has(current.id)) history.replaceState(null, "", `#${current.id}`);
  answer(current, append(current, current.head, { role: "user", content: text }).id);
}

const stop = () => runs.get(current.id)?.abort.abort();

// Buttons of messages.

const onMessage = {
  copy: (message, button) => copy(message.content, button),
  "copy-code": (message, button) => copy(button.closest("figure").querySelector("code").textContent, button),
  edit(message) {
    viewOf(message).edit((text) => {
      if (runs.has(current.id)) return toast("Stop the answer before you send another message.");
      answer(current, append(current, message.parent, { role: "user", content: text }).id);
      focusInput();
    });
  },
  again(message) {
    if (runs.has(current.id)) return;
    const empty = !message.content && !message.reasoning && !message.tool_calls.length;
    if (empty) remove(current, message);
    answer(current, message.parent);
    focusInput();
  },
  results(message) {
    let parent = message.id;
    for (const result of viewOf(message).results()) {
      parent = append(current, parent, { role: "tool", ...result, content: result.content }).id;
    }
    answer(current, parent);
    focusInput();
  },
  previous: (message) => step(message, -1),
  next: (message) => step(message, 1),
};

function step(message, by) {
  const all = siblings(current, message);
  const other = all[all.indexOf(message) + by];
  if (!other || runs.has(current.id)) return;
  select(current, other);
  pinned = false;
  keep(current);
  draw();
  $("messages").querySelector(`[data-id="${other.id}"] .branches button:enabled`)?.focus();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS or localhost there is no clipboard; the old way still works.
    const area = el("textarea", { value: text, className: "sr" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  announce("Copied.");
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (!button) return;
  const { id } = button.closest("article").dataset;
  onMessage[button.dataset.action](current.messages.find((message) => message.id === id), button);
});

// Buttons of the list.

const onList = {
  open: (conversation) => go(conversation.id),
  rename(conversation, button) {
    rename(button.closest("li"), conversation.title, (title) => {
      if (title) conversation.title = title;
      if (title) keep(conversation);
      draw();
      $("conversations").querySelector(`li[data-id="${conversation.id}"] .open`)?.focus();
    });
  },
  export: (conversation) => exportFile([conversation], conversation.title),
  delete: drop,
};

$("conversations").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) onList[button.dataset.action](conversations.get(button.closest("li").dataset.id), button);
});

// The frame: navigation, theme, settings, keys.

function closeNav() {
  $("nav").classList.remove("open");
  $("page").inert = false;
}

$("menu").onclick = () => {
  if (!small.matches) return $("nav").classList.toggle("closed");
  $("nav").classList.add("open");
  $("page").inert = true;
  $("new").focus();
};
$("nav-close").onclick = () => {
  closeNav();
  $("menu").focus();
};
small.onchange = closeNav;
$("new").onclick = () => go("");
$("skip").onclick = (event) => {
  event.preventDefault();
  input.focus();
};
window.addEventListener("popstate", () => show(location.hash.slice(1)));

const THEMES = { auto: "as the system", light: "light", dark: "dark" };
function theme(name) {
  const root = document.documentElement;
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[name]}`);
  $("theme").title = `Theme: ${THEMES[name]}`;
  $("theme").querySelector("use").setAttribute("href", `#i-${name}`);
  local.setItem("marlin.theme", name);
}
$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % names.length]);
};

function changeSettings(changes) {
  Object.assign(current.settings, changes);
  lastSettings.set(current.settings);
  drawSettings();
  clearTimeout(changeSettings.timer);
  const conversation = current;
  changeSettings.timer = setTimeout(() => conversations.has(conversation.id) && keep(conversation), 400);
}
$("model").onchange = () => {
  changeSettings({ model: $("model").value });
  drawModels();
};
$("open-settings").onclick = () => {
  $("settings-key").value = key.get();
  openSettings(current.settings, changeSettings);
};
$("settings-key").onchange = () => {
  key.set($("settings-key").value.trim());
  connect();
};
$("export-all").onclick = () => exportFile([...conversations.values()], "marlin-conversations");
$("import").onclick = () => $("file").click();
$("file").onchange = async () => {
  const [file] = $("file").files;
  $("file").value = "";
  try {
    const found = importText(await file.text());
    for (const conversation of found) await keep(conversation);
    $("settings").close();
    drawList();
    toast(`Imported ${found.length} conversation${found.length === 1 ? "" : "s"}.`);
  } catch (error) {
    $("settings-problem").textContent = `${file.name} was not imported: ${error.message}.`;
  }
};

$("key-cancel").onclick = () => $("ask-key").close();
$("ask-key").querySelector("form").onsubmit = () => {
  key.set($("key").value.trim());
  const then = followUp;
  followUp = null;
  if (key.get()) then?.();
};

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (runs.has(current.id)) stop();
  else send();
};
document.addEventListener("input", (event) => {
  if (event.target.matches("#input, .edit textarea, .call textarea")) fit(event.target);
});
document.addEventListener("keydown", (event) => {
  const { target } = event;
  if (event.isComposing) return;
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.code === "KeyO") {
    event.preventDefault();
    if (!document.querySelector("dialog[open]")) go("");
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if ($("nav").classList.contains("open")) $("nav-close").click();
    else if (target.closest(".edit")) viewOf(current.messages.find((one) => one.id === target.closest("article").dataset.id)).endEdit();
    else stop();
  } else if (event.key === "Enter" && !event.shiftKey && !touch.matches && target.matches("#input, .edit textarea")) {
    event.preventDefault();
    if (!runs.has(current.id)) target.form.requestSubmit();
  }
});
// Whoever scrolls up stays there, however fast the answer grows; whoever comes back follows again.
let top = 0;
scroller.addEventListener("scroll", () => {
  const gap = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  pinned = gap < 2 || (scroller.scrollTop >= top ? pinned || gap < 48 : false);
  top = scroller.scrollTop;
  $("latest").hidden = pinned;
}, { passive: true });
for (const event of ["wheel", "touchmove"]) {
  scroller.addEventListener(event, ({ deltaY = -1 }) => (pinned &&= deltaY >= 0), { passive: true });
}
$("latest").onclick = () => {
  pinned = true;
  follow();
  focusInput();
};
new ResizeObserver(follow).observe(scroller);
for (const event of ["online", "focus"]) {
  window.addEventListener(event, () => $("ask-key").open || connect()); // the server may have started again with another model
}

store = await openStore();
if (!store.persistent) $("kept").textContent = "This browser forbids storage: conversations end with this tab.";
for (const conversation of await store.all()) {
  // What still ran when the page closed did not end.
  for (const message of conversation.messages) if (message.state === "running") message.state = "stopped";
  conversations.set(conversation.id, conversation);
}
input.enterKeyHint = touch.matches ? "enter" : "send";
theme(document.documentElement.dataset.theme ?? "auto");
show(location.hash.slice(1));
connect();
