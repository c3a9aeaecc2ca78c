// Markdown as models write it, to DOM nodes. Text only ever becomes text nodes, and elements come
// from the fixed set below, so nothing in an answer can run. Every scan is linear or bounded: an
// answer of 100,000 asterisks must not stop the page.
//
// Differences from CommonMark, all for answers: a line break stays one; `---` is always a rule;
// HTML is text (except <br>); indented text is no code; images are links; two spaces nest a list;
// `**` beside CJK punctuation works; TeX between \( \), \[ \] and $$ $$ is kept as it is.

const MAX_DEPTH = 16; // of quotes and lists
const MAX_NESTING = 32; // of emphasis
const MAX_DELIMITERS = 2000; // of one paragraph; what follows is text

const FENCE = /^( *)(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const QUOTE = /^ {0,3}>/;

const blank = (line) => line.trim() === "";

function indentOf(line) {
  let columns = 0;
  for (const c of line) {
    if (c === " ") columns += 1;
    else if (c === "\t") columns += 4;
    else break;
  }
  return columns;
}

function dedent(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && (line[at] === " " || line[at] === "\t"); at++) {
    left -= line[at] === "\t" ? 4 : 1;
  }
  return line.slice(at);
}

/** Blocks of a text; `raw` is the source of each, which tells whether it changed. */
export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function fenceOf(line) {
  const found = FENCE.exec(line);
  // A backtick after the opening run makes it a code span.
  return found && !(found[2][0] === "`" && found[3].includes("`")) ? found : null;
}

function startsBlock(line) {
  return fenceOf(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  const add = (block, end) => {
    block.raw = lines.slice(at, end).join("\n");
    found.push(block);
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (blank(line)) {
      at += 1;
      continue;
    }
    const deep = depth >= MAX_DEPTH;
    const fence = fenceOf(line);
    const heading = HEADING.exec(line);
    if (fence) {
      const [block, end] = codeBlock(lines, at, fence);
      add(block, end);
    } else if (heading) {
      add({ type: "heading", level: heading[1].length, text: headingText(heading[2]) }, at + 1);
    } else if (RULE.test(line)) {
      add({ type: "rule" }, at + 1);
    } else if (QUOTE.test(line) && !deep) {
      let end = at + 1;
      while (end < lines.length && !blank(lines[end]) && (QUOTE.test(lines[end]) || !startsBlock(lines[end]))) end++;
      const inner = lines.slice(at, end).map((l) => l.replace(/^ {0,3}> ?/, ""));
      add({ type: "quote", blocks: blocks(inner, depth + 1) }, end);
    } else if (ITEM.test(line) && !deep) {
      const [block, end] = listBlock(lines, at, depth);
      add(block, end);
    } else if (tableAligns(lines, at)) {
      const [block, end] = tableBlock(lines, at);
      add(block, end);
    } else {
      let end = at + 1;
      while (end < lines.length && !blank(lines[end]) && (deep || !startsBlock(lines[end])) && !tableAligns(lines, end)) end++;
      const text = lines.slice(at, end).map((l) => l.trimStart()).join("\n").trimEnd();
      add({ type: "paragraph", text }, end);
    }
  }
  return found;
}

function headingText(text) {
  text = text.trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function codeBlock(lines, at, [, indent, mark, info]) {
  const body = [];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end].trim();
    // The closing run: the same character, at least as long, nothing else.
    if (line.length >= mark.length && line.startsWith(mark) && line === mark[0].repeat(line.length)) {
      end++;
      break;
    }
    body.push(dedent(lines[end], indent.length));
  }
  const language = info.trim().split(/[\s{,]/, 1)[0].slice(0, 40);
  return [{ type: "code", language, text: body.join("\n") }, end];
}

function listBlock(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const ordered = first[2].length > 1;
  const kind = first[2].at(-1);
  const base = indentOf(lines[start]);
  const items = [];
  let loose = false;
  let at = start;
  while (at < lines.length) {
    const marker = ITEM.exec(lines[at]);
    if (!marker || indentOf(lines[at]) > base + 1 || marker[2].at(-1) !== kind || RULE.test(lines[at])) break;
    const content = base + marker[2].length + Math.min(marker[3]?.length ?? 1, 4);
    const inner = [marker[4] ?? ""];
    let afterBlank = false;
    let fence = null;
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const indent = indentOf(line);
      if (blank(line)) {
        inner.push("");
        afterBlank = !fence;
        continue;
      }
      const inside = indent >= content || (indent >= base + 2 && (ITEM.test(line) || fenceOf(line) || fence));
      // A line that opens nothing continues the paragraph above it, however little it is indented.
      if (!inside && (afterBlank || fence || startsBlock(line))) break;
      const body = dedent(line, content);
      const mark = fenceOf(body);
      if (mark && !fence) fence = mark[2];
      else if (mark && mark[2].startsWith(fence) && blank(mark[3])) fence = null;
      if (afterBlank && inside) loose = true;
      afterBlank = false;
      inner.push(body);
    }
    if (afterBlank && at < lines.length && ITEM.exec(lines[at])?.[2].at(-1) === kind) loose = true;
    const task = /^\[([ xX])\][ \t]+/.exec(inner[0]);
    if (task) inner[0] = inner[0].slice(task[0].length);
    items.push({ blocks: blocks(inner, depth + 1), checked: task ? task[1] !== " " : null });
  }
  return [{ type: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, loose, items }, at];
}

function cells(line) {
  const found = [""];
  line = line.trim();
  for (let i = line[0] === "|" ? 1 : 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") found[found.length - 1] += line[++i];
    else if (line[i] !== "|") found[found.length - 1] += line[i];
    else if (i < line.length - 1) found.push("");
  }
  return found.map((cell) => cell.trim());
}

function tableAligns(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return null;
  const row = cells(lines[at + 1]);
  if (!row.every((cell) => /^:?-+:?$/.test(cell)) || row.length !== cells(lines[at]).length) return null;
  return row.map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "right") : "left"));
}

function tableBlock(lines, at) {
  const aligns = tableAligns(lines, at);
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && !blank(lines[end]) && lines[end].includes("|"); end++) {
    const row = cells(lines[end]).slice(0, aligns.length);
    rows.push([...row, ...Array(aligns.length - row.length).fill("")]);
  }
  return [{ type: "table", aligns, header: cells(lines[at]), rows }, end];
}

// Inline text: a list of strings and {tag, nodes, …}.

const PLAIN = /[^\\`*_~[\]!<&h$\n]+/y;
const LINK = /\(\s{0,9}(?:<([^<>\n]{0,2000})>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.){0,2000}\)){0,2000}))(?:\s{1,9}(?:"[^"]{0,500}"|'[^']{0,500}'))?\s{0,9}\)/y;
const BARE = /https?:\/\/[^\s<>"`\\]{1,2000}/y;
const ANGLE = /<(https?:\/\/[^\s<>]{1,2000}|mailto:[^\s<>]{1,300}|br ?\/?)>/iy;
const ENTITY = /&(amp|lt|gt|quot|apos|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" };
const WORD = /[\p{L}\p{N}_]/u;

/** The address if its scheme is harmless, else null. Relative ones would point into the server. */
export function safeLink(address) {
  // Browsers drop tabs and newlines inside a scheme, so they are refused rather than parsed.
  return /^(?:https?:\/\/|mailto:)[^\s\u0000-\u001f]+$/i.test(address) ? address : null;
}

const unescape = (text) => text.replace(/\\([!-/:-@[-`{-~])/g, "$1");

export function inline(text) {
  let nodes = [];
  const brackets = [];
  let delimiters = 0;
  let ticks = null;
  let at = 0;
  const push = (node) => {
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += node;
    else nodes.push(node);
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  const math = (close) => {
    const end = text.slice(at, at + 2000).indexOf(close, 2);
    if (end < 0) return false;
    push({ tag: "math", nodes: [text.slice(at, at + end + 2)] });
    at += end + 2;
    return true;
  };
  while (at < text.length) {
    const plain = match(PLAIN);
    if (plain) {
      push(plain[0]);
      at += plain[0].length;
      continue;
    }
    const c = text[at];
    const next = text[at + 1];
    let found;
    if (c === "\n" || (c === "\\" && next === "\n")) {
      at += c === "\n" ? 1 : 2;
      push({ tag: "br", nodes: [] });
    } else if ((c === "\\" && ((next === "(" && math("\\)")) || (next === "[" && math("\\]")))) || (c === "$" && next === "$" && math("$$"))) {
      continue;
    } else if (c === "\\" && next !== undefined && /[!-/:-@[-`{-~]/.test(next)) {
      push(next);
      at += 2;
    } else if (c === "`") {
      ticks ??= tickRuns(text);
      const run = ticks.at.get(at);
      const close = ticks.next(run, at);
      if (close < 0) push("`".repeat(run));
      else push({ tag: "code", nodes: [codeText(text.slice(at + run, close))] });
      at = close < 0 ? at + run : close + run;
    } else if (c === "<" && (found = match(ANGLE))) {
      at += found[0].length;
      if (/^br/i.test(found[1])) push({ tag: "br", nodes: [] });
      else push({ tag: "a", href: found[1], nodes: [found[1].replace(/^mailto:/i, "")] });
    } else if (c === "&" && (found = match(ENTITY))) {
      at += found[0].length;
      push(ENTITIES[found[1]]);
    } else if (c === "h" && !WORD.test(text[at - 1] ?? "") && !brackets.length && (found = match(BARE))) {
      const address = trimAddress(found[0]);
      push({ tag: "a", href: address, nodes: [address] });
      at += address.length;
    } else if (c === "[" || (c === "!" && next === "[")) {
      const mark = c === "[" ? "[" : "![";
      if (++delimiters > MAX_DELIMITERS) push(mark);
      else {
        brackets.push(nodes.length);
        nodes.push({ bracket: mark });
      }
      at += mark.length;
    } else if (c === "]" && brackets.length) {
      const open = brackets.pop();
      at += 1;
      found = match(LINK);
      const href = found && safeLink(unescape(found[1] ?? found[2]));
      const inner = href ? nodes.slice(open + 1) : [];
      if (href && !inner.some((node) => node.tag === "a")) {
        nodes.length = open;
        push({ tag: "a", href, nodes: inner.length ? emphasis(inner) : [href] });
        at += found[0].length;
      } else {
        nodes[open] = nodes[open].bracket;
        push("]");
      }
    } else if ((c === "*" || c === "_" || c === "~") && delimiters < MAX_DELIMITERS) {
      let end = at + 1;
      while (text[end] === c) end++;
      const before = text[at - 1] ?? " ";
      const after = text[end] ?? " ";
      // Underscores bind at the edges of words only, so that snake_case stays.
      let open = !/\s/.test(after);
      let close = !/\s/.test(before);
      if (c === "_") [open, close] = [open && !WORD.test(before), close && !WORD.test(after)];
      delimiters++;
      if (c === "~" && end - at !== 2) push(text.slice(at, end));
      else nodes.push({ mark: c, count: end - at, size: end - at, open, close });
      at = end;
    } else {
      push(c);
      at += 1;
    }
  }
  for (const open of brackets) nodes[open] = nodes[open].bracket;
  return emphasis(nodes);
}

function tickRuns(text) {
  const at = new Map();
  const byLength = new Map();
  for (const run of text.matchAll(/`+/g)) {
    at.set(run.index, run[0].length);
    if (!byLength.has(run[0].length)) byLength.set(run[0].length, []);
    byLength.get(run[0].length).push(run.index);
  }
  // Positions only grow, so what lies behind is dropped and the search stays linear. An escaped
  // backtick shortens a run, which then has no entry of its own.
  const next = (length, from) => {
    const list = byLength.get(length) ?? [];
    while (list.length && list[0] <= from) list.shift();
    return list.length ? list[0] : -1;
  };
  return { at: { get: (i) => at.get(i) ?? runAt(text, i) }, next };
}

function runAt(text, at) {
  let end = at;
  while (text[end] === "`") end++;
  return end - at;
}

function codeText(text) {
  text = text.replace(/\n/g, " ");
  return text.startsWith(" ") && text.endsWith(" ") && text.trim() ? text.slice(1, -1) : text;
}

/** A bare address without the punctuation of the sentence around it. */
function trimAddress(address) {
  for (;;) {
    const last = address.at(-1);
    const unbalanced = last === ")" && address.split(")").length > address.split("(").length;
    if (!".,;:!?'*_~]|".includes(last) && !unbalanced) return address;
    address = address.slice(0, -1);
  }
}

function emphasis(items) {
  const out = [];
  const openers = [];
  const depthOf = (nodes) => Math.max(0, ...nodes.slice(0, 5000).map((node) => node.depth ?? 0));
  for (const item of items) {
    if (!item.mark) {
      out.push(item);
      continue;
    }
    let from = openers.length - 1;
    while (item.close && item.count > 0 && from >= 0) {
      const opener = out[openers[from]];
      const either = opener.close || item.open;
      const three = either && (opener.size + item.size) % 3 === 0 && (opener.size % 3 || item.size % 3);
      if (opener.mark !== item.mark || three) {
        from--;
        continue;
      }
      const nodes = out.slice(openers[from] + 1);
      const depth = 1 + depthOf(nodes);
      if (!nodes.length || depth > MAX_NESTING) break;
      const count = Math.min(2, opener.count, item.count);
      out.length = openers[from] + 1;
      opener.count -= count;
      item.count -= count;
      openers.length = from + 1;
      if (opener.count === 0) {
        out.pop();
        openers.pop();
        from--;
      }
      const tag = item.mark === "~" ? "del" : count === 2 ? "strong" : "em";
      out.push({ tag, nodes: settle(nodes), depth });
    }
    if (item.count > 0) {
      if (item.open) openers.push(out.length);
      out.push(item);
    }
  }
  return settle(out);
}

/** Delimiters that matched nothing are text. */
function settle(nodes) {
  return nodes.map((node) => (node.mark ? node.mark.repeat(node.count) : node.bracket ?? node));
}

// DOM.

function el(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function spans(text) {
  const build = (node) => {
    if (typeof node === "string") return node;
    const element = el(node.tag === "math" ? "span" : node.tag, node.tag === "math" ? "math" : "", ...node.nodes.map(build));
    if (node.tag === "a") {
      element.href = safeLink(node.href) ?? "";
      element.rel = "noopener noreferrer";
      element.target = "_blank";
    }
    return element;
  };
  return inline(text).map(build);
}

export function render(block) {
  switch (block.type) {
    case "heading":
      // The page has its own h1 and h2.
      return el(`h${Math.min(6, block.level + 2)}`, `h${block.level}`, ...spans(block.text));
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", "", ...block.blocks.map(render));
    case "code": {
      const copy = el("button", "quiet", "Copy");
      copy.type = "button";
      copy.dataset.action = "copy-code";
      copy.setAttribute("aria-label", block.language ? `Copy the ${block.language} code` : "Copy the code");
      const code = el("code", "", document.createTextNode(block.text));
      return el("figure", "code", el("figcaption", "", el("span", "", block.language || "text"), copy), el("pre", "", code));
    }
    case "list": {
      const list = el(block.ordered ? "ol" : "ul", block.loose ? "loose" : "");
      if (block.ordered && block.start !== 1) list.start = block.start;
      for (const item of block.items) {
        const entry = el("li");
        if (item.checked !== null) {
          const box = el("input");
          box.type = "checkbox";
          box.checked = item.checked;
          box.disabled = true;
          box.setAttribute("aria-label", item.checked ? "done" : "not done");
          entry.className = "task";
          entry.append(box);
        }
        for (const part of item.blocks) {
          const tight = part.type === "paragraph" && !block.loose;
          entry.append(...(tight ? spans(part.text) : [render(part)]));
        }
        list.append(entry);
      }
      return list;
    }
    case "table": {
      const cell = (tag) => (text, column) => el(tag, block.aligns[column], ...spans(text));
      const head = el("thead", "", el("tr", "", ...block.header.map(cell("th"))));
      const rows = block.rows.map((row) => el("tr", "", ...row.map(cell("td"))));
      return el("div", "table", el("table", "", head, el("tbody", "", ...rows)));
    }
    default:
      return el("p", "", ...spans(block.text));
  }
}

/** Keeps an element showing a growing text, touching only the blocks that changed. */
export class MarkdownView {
  #shown = [];
  #text = "";

  constructor(root) {
    this.root = root;
  }

  update(text) {
    if (text === this.#text) return;
    this.#text = text;
    const wanted = parse(text);
    wanted.forEach((block, i) => {
      const old = this.#shown[i];
      if (old && old.raw === block.raw) return;
      const node = this.root.childNodes[i];
      if (old?.type === "code" && block.type === "code" && old.language === block.language) {
        // Keeps the copy button, which may have the focus, and the selection.
        node.querySelector("code").firstChild.data = block.text;
      } else if (node) node.replaceWith(render(block));
      else this.root.append(render(block));
    });
    while (this.root.childNodes.length > wanted.length) this.root.lastChild.remove();
    this.#shown = wanted;
  }
}
