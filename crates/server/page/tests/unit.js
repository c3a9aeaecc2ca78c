// Unit tests of the page's modules. Run by .ci/check_page.py, or open tests/unit.html on
// tests/mock_server.py. The outcome is in window.outcome and on the page.

import { accumulate, samples } from "../api.js";
import { append, branch, create, requestBody, select, siblings, toolsProblem } from "../conversation.js";
import { inline, MarkdownView, parse, render, safeLink } from "../markdown.js";
import { importText } from "../settings.js";
import { EventStream } from "../sse.js";
import { figures } from "../view.js";

const failed = [];
let passed = 0;

function same(name, found, wanted) {
  const [a, b] = [found, wanted].map((value) => JSON.stringify(value));
  if (a === b) passed += 1;
  else failed.push(`${name}\n  wanted ${b}\n  found  ${a}`);
}

function throws(name, run, part) {
  try {
    run();
    failed.push(`${name}: nothing thrown`);
  } catch (error) {
    same(name, error.message.includes(part) || error.message, true);
  }
}

// Server-sent events. Every body is read whole, byte by byte and in random pieces.

const EVENTS = [
  ["one", "data: a\n\n", [["message", "a"]]],
  ["no space", "data:a\n\n", [["message", "a"]]],
  ["one space is stripped, a second stays", "data:  a\n\n", [["message", " a"]]],
  ["CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", [["message", "a"], ["message", "b"]]],
  ["CR", "data: a\r\rdata: b\r\r", [["message", "a"], ["message", "b"]]],
  ["mixed ends", "data: a\r\n\ndata: b\n\r\n", [["message", "a"], ["message", "b"]]],
  ["several lines", "data: a\ndata: b\ndata:\n\n", [["message", "a\nb\n"]]],
  ["several lines, CRLF", "data: a\r\ndata: b\r\n\r\n", [["message", "a\nb"]]],
  ["comments", ": ping\n\n:\ndata: a\n: in between\n\n", [["message", "a"]]],
  ["named", "event: error\ndata: a\n\ndata: b\n\n", [["error", "a"], ["message", "b"]]],
  ["other fields", "id: 1\nretry: 5\nnonsense\ndata: a\n\n", [["message", "a"]]],
  ["a field without colon", "data\n\n", [["message", ""]]],
  ["no data, no event", "event: x\n\ndata: a\n\n", [["message", "a"]]],
  ["an unfinished event is none", "data: a\n\ndata: b\n", [["message", "a"]]],
  ["a byte order mark", "\ufeffdata: a\n\n", [["message", "a"]]],
  ["characters of every width", "data: aé漢🐟ß\n\ndata: 👩‍🚀\n\n", [["message", "aé漢🐟ß"], ["message", "👩‍🚀"]]],
  ["colons", "data: {\"a\": \"b:c\"}\n\n", [["message", "{\"a\": \"b:c\"}"]]],
];

function read(bytes, cut) {
  const stream = new EventStream();
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const end = at + cut();
    for (const { event, data } of stream.push(bytes.slice(at, end))) found.push([event, data]);
    at = end;
  }
  return found;
}

let seed = 7;
const random = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;

for (const [name, text, wanted] of EVENTS) {
  const bytes = new TextEncoder().encode(text);
  same(`events, ${name}, whole`, read(bytes, () => bytes.length), wanted);
  same(`events, ${name}, bytes`, read(bytes, () => 1), wanted);
  for (let i = 0; i < 20; i++) same(`events, ${name}, random ${i}`, read(bytes, () => 1 + random(4)), wanted);
}

// Markdown, as the HTML that the nodes amount to.

function html(text) {
  const root = document.createElement("div");
  root.append(...parse(text).map(render));
  for (const figure of root.querySelectorAll("figure")) {
    figure.replaceWith(Object.assign(document.createElement("pre"), { className: figure.querySelector("span").textContent, textContent: figure.querySelector("code").textContent }));
  }
  for (const link of root.querySelectorAll("a")) {
    link.removeAttribute("rel");
    link.removeAttribute("target");
  }
  for (const node of root.querySelectorAll("[class='']")) node.removeAttribute("class");
  return root.innerHTML;
}

const MARKDOWN = [
  ["a", "<p>a</p>"],
  ["", ""],
  ["a\nb", "<p>a<br>b</p>"],
  ["a\n\n\nb", "<p>a</p><p>b</p>"],
  ["a\r\n\r\nb", "<p>a</p><p>b</p>"],
  ["# One #\n## Two\n###### Six", '<h3 class="h1">One</h3><h4 class="h2">Two</h4><h6 class="h6">Six</h6>'],
  ["#hash", "<p>#hash</p>"],
  ["####### seven", "<p>####### seven</p>"],
  ["a\n***\nb\n---\n_ _ _", "<p>a</p><hr><p>b</p><hr><hr>"],
  ["> a\n> b\nc\n\nd", "<blockquote><p>a<br>b<br>c</p></blockquote><p>d</p>"],
  ["> > a", "<blockquote><blockquote><p>a</p></blockquote></blockquote>"],
  ["- a\n- b", "<ul><li>a</li><li>b</li></ul>"],
  ["- a\n\n- b", '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>'],
  ["- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"],
  ["1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"],
  ["3) a\n4) b", '<ol start="3"><li>a</li><li>b</li></ol>'],
  ["- a\n+ b", "<ul><li>a</li></ul><ul><li>b</li></ul>"],
  ["- a\nlazy\n\nout", "<ul><li>a<br>lazy</li></ul><p>out</p>"],
  ["1. a\n\n   b", '<ol class="loose"><li><p>a</p><p>b</p></li></ol>'],
  ["1. a\n   ```sh\n   x\n\n     y\n   ```\n2. b", '<ol><li>a<pre class="sh">x\n\n  y</pre></li><li>b</li></ol>'],
  ["- [x] a\n- [ ] b", '<ul><li class="task"><input type="checkbox" disabled="" aria-label="done">a</li><li class="task"><input type="checkbox" disabled="" aria-label="not done">b</li></ul>'],
  ["```py\nx = 1 < 2\n```\na", '<pre class="py">x = 1 &lt; 2</pre><p>a</p>'],
  ["```\nopen", '<pre class="text">open</pre>'],
  ["~~~\n```\n~~~", '<pre class="text">```</pre>'],
  ["````\n```\n````", '<pre class="text">```</pre>'],
  ["```js title=x\n1\n```", '<pre class="js">1</pre>'],
  ["``` a`b", "<p>``` a`b</p>"],
  ["a\n```\nb\n```", '<p>a</p><pre class="text">b</pre>'],
  ["|a|b|\n|:-:|--:|\n|1|2|\n|3|", '<div class="table"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody><tr><td class="center">1</td><td class="right">2</td></tr><tr><td class="center">3</td><td class="right"></td></tr></tbody></table></div>'],
  ["a | b\n- | -\n`x\\|y` | *z*", '<div class="table"><table><thead><tr><th class="left">a</th><th class="left">b</th></tr></thead><tbody><tr><td class="left"><code>x|y</code></td><td class="left"><em>z</em></td></tr></tbody></table></div>'],
  ["a | b\nc", "<p>a | b<br>c</p>"],
  ["*a* **b** ***c*** ~~d~~ _e_ __f__", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del> <em>e</em> <strong>f</strong></p>"],
  ["**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"],
  ["*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"],
  ["snake_case_name and __init__.py", "<p>snake_case_name and <strong>init</strong>.py</p>"],
  ["2 * 3 * 4, a*b", "<p>2 * 3 * 4, a*b</p>"],
  ["**“强调”**文本", "<p><strong>“强调”</strong>文本</p>"],
  ["**open", "<p>**open</p>"],
  ["~a~", "<p>~a~</p>"],
  ["`a` ``b`c`` `d", "<p><code>a</code> <code>b`c</code> `d</p>"],
  ["`<b>*x*`", "<p><code>&lt;b&gt;*x*</code></p>"],
  ["\\*a\\* \\`b\\` \\\\", "<p>*a* `b` \\</p>"],
  ["[a](http://x.y/z)", '<p><a href="http://x.y/z">a</a></p>'],
  ["[**a** b](<https://x.y/z> 'title')", '<p><a href="https://x.y/z"><strong>a</strong> b</a></p>'],
  ["[a](https://x.y/z_(w) \"t\")", '<p><a href="https://x.y/z_(w)">a</a></p>'],
  ["[a [b](http://x.y)](http://z.w)", '<p>[a <a href="http://x.y/">b</a>](<a href="http://z.w/">http://z.w</a>)</p>'],
  ["![fish](https://x.y/z.png)", '<p><a href="https://x.y/z.png">fish</a></p>'],
  ["see https://x.y/a_b_c. (http://z.w)", '<p>see <a href="https://x.y/a_b_c">https://x.y/a_b_c</a>. (<a href="http://z.w">http://z.w</a>)</p>'],
  ["<https://x.y> <mailto:a@b.c>", '<p><a href="https://x.y/">https://x.y</a> <a href="mailto:a@b.c">a@b.c</a></p>'],
  ["[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"],
  ["[a](JaVaScRiPt:alert(1)) [b](data:text/html,x) [c](vbscript:x) [d](/x) [e](//x.y)", "<p>[a](JaVaScRiPt:alert(1)) [b](data:text/html,x) [c](vbscript:x) [d](/x) [e](//x.y)</p>"],
  ["<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"],
  ["<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"],
  ["a<br>b<br/>c", "<p>a<br>b<br>c</p>"],
  ["a &lt;b&gt; &amp;amp; &copy;", "<p>a &lt;b&gt; &amp;amp; &amp;copy;</p>"],
  ["\\(a_1 * b_2 * c\\) and $$x_1^2$$ costs $5", '<p><span class="math">\\(a_1 * b_2 * c\\)</span> and <span class="math">$$x_1^2$$</span> costs $5</p>'],
];

// The parser of HTML writes addresses as the page gave them; `href` shows them normalised.
const normal = (text) => text.replace(/href="(https?:\/\/[^/"]+)"/g, 'href="$1/"');
for (const [text, wanted] of MARKDOWN) same(`markdown ${JSON.stringify(text)}`, normal(html(text)), normal(wanted));

// However a text is cut, the view ends where the whole text ends, and it keeps what did not change.
const everything = MARKDOWN.map(([text]) => text).join("\n\n");
const whole = document.createElement("div");
new MarkdownView(whole).update(everything);
for (let round = 0; round < 5; round++) {
  const root = document.createElement("div");
  const view = new MarkdownView(root);
  for (let at = 0; at < everything.length; at += 1 + random(40)) view.update(everything.slice(0, at));
  view.update(everything);
  same(`view, round ${round}`, root.innerHTML === whole.innerHTML, true);
}
{
  const root = document.createElement("div");
  const view = new MarkdownView(root);
  view.update("first\n\n```js\none");
  const [first, figure] = root.children;
  const button = figure.querySelector("button");
  view.update("first\n\n```js\none\ntwo\n```\n\nlast");
  same("view keeps finished blocks", root.children[0] === first, true);
  same("view keeps the copy button of growing code", root.querySelector("button") === button, true);
  same("view grows code", root.querySelector("code").textContent, "one\ntwo");
}

for (const [address, safe] of [["https://a.b", 1], ["HTTP://a.b", 1], ["mailto:a@b", 1], ["javascript:x", 0], [" https://a.b", 0], ["java\nscript:x", 0], ["ftp://a", 0], ["#a", 0], ["", 0]]) {
  same(`link ${JSON.stringify(address)}`, Boolean(safeLink(address)), Boolean(safe));
}

// Random soup of everything that means something: never an exception, never a foreign element.
const SOUP = ["*", "**", "_", "~~", "`", "```", "\n", "\n\n", "[", "](", ")", "![", "<", ">", "- ", "1. ", "# ", "> ", "|", "\n|-|\n", "a", " ", "\\", "$$", "\\(", "http://x", "<script>", "javascript:", "&lt;", "  ", "漢", "\t"];
const ALLOWED = new Set("P BR EM STRONG DEL CODE A SPAN H3 H4 H5 H6 HR BLOCKQUOTE UL OL LI INPUT FIGURE FIGCAPTION PRE BUTTON DIV TABLE THEAD TBODY TR TH TD".split(" "));
const foreign = new Set();
for (let round = 0; round < 3000; round++) {
  let text = "";
  for (let i = random(60); i >= 0; i--) text += SOUP[random(SOUP.length)];
  try {
    const root = document.createElement("div");
    root.append(...parse(text).map(render));
    for (const node of root.querySelectorAll("*")) if (!ALLOWED.has(node.tagName)) foreign.add(node.tagName);
    for (const link of root.querySelectorAll("a")) if (!/^(https?|mailto):/.test(link.href)) foreign.add(link.href);
  } catch (error) {
    failed.push(`soup ${JSON.stringify(text)}: ${error.message}`);
  }
}
same("soup, foreign elements", [...foreign], []);

// Texts that make careless parsers slow or deep.
const N = 50000;
const BOMBS = { stars: "*", "open emphasis": "*a ", pairs: "*a* ", nested: "**a *b ", brackets: "[", links: "[a](", images: "![", backticks: "`a``b", hashes: "# " + "#".repeat(N) + "x", quotes: ">", "quote lines": "> ".repeat(200) + "\n", lists: "- ", pipes: "|", spaces: " ", math: "\\(", dollars: "$$ $", angle: "<http://", "bare links": "http://a ", "link titles": '[a](b "', underscores: "_a_", tildes: "~~a", newlines: "a\n", dashes: "a|-\n" };
for (const [name, unit] of Object.entries(BOMBS)) {
  const text = unit.length > 1000 ? unit : unit.repeat(Math.ceil(N / unit.length));
  const start = performance.now();
  try {
    document.createElement("div").append(...parse(text).map(render));
  } catch (error) {
    failed.push(`bomb of ${name}: ${error.message}`);
  }
  const ms = Math.round(performance.now() - start);
  if (ms > 3000) failed.push(`bomb of ${name}: ${ms} ms for ${text.length} characters`);
  else passed += 1;
}
{
  let node = render(parse("*a ".repeat(900) + "a* ".repeat(900))[0]);
  let depth = 0;
  while ((node = node.querySelector(":scope > em, :scope > strong"))) depth += 1;
  same("emphasis nests so far and no further", depth > 20 && depth <= 40, true);
}
same("deep lists", parse(Array.from({ length: 500 }, (_, i) => `${"  ".repeat(i)}- x`).join("\n")).length, 1);
same("inline gives data only", inline("a **b**"), ["a ", { tag: "strong", nodes: ["b"], depth: 1 }]);

// Chunks of a completion.

const message = { content: "", reasoning: "", tool_calls: [] };
const CHUNKS = [
  { choices: [{ index: 0, delta: { role: "assistant", content: "" } }] },
  { choices: [{ index: 0, delta: { reasoning_content: "hm" } }] },
  { choices: [{ index: 0, delta: { content: "a" } }] },
  { choices: [{ index: 1, delta: { content: "another choice" } }] },
  { choices: [{ index: 0, delta: { content: null, tool_calls: [{ index: 0, id: "c0", type: "function", function: { name: "f", arguments: "" } }] } }] },
  { choices: [{ index: 0, delta: { tool_calls: [{ index: 0, function: { arguments: "{\"x\"" } }, { index: 1, id: "c1", function: { name: "g", arguments: "{}" } }] } }] },
  { choices: [{ index: 0, delta: { tool_calls: [{ index: 0, function: { arguments: ":1}" } }] } }] },
  { choices: [{ index: 0, delta: {}, finish_reason: "tool_calls" }] },
  { choices: [], usage: { prompt_tokens: 3, completion_tokens: 9 } },
];
same("accumulate tells what is an answer", CHUNKS.map((chunk) => accumulate(message, chunk)), [false, true, true, false, true, true, true, false, false]);
same("accumulate", message, {
  content: "a",
  reasoning: "hm",
  tool_calls: [{ id: "c0", name: "f", arguments: "{\"x\":1}" }, { id: "c1", name: "g", arguments: "{}" }],
  finish_reason: "tool_calls",
  usage: { prompt_tokens: 3, completion_tokens: 9 },
});

same("samples", samples('# HELP x y\nvllm:kv_cache_usage_perc{engine="0",model_name="a b"} 0.25 1700\nplain 3\nbad\ninf +Inf\n'), [
  ["vllm:kv_cache_usage_perc", 'engine="0",model_name="a b"', 0.25],
  ["plain", "", 3],
  ["inf", "", NaN],
]);

const timing = { sent: 1000, first: 1250, last: 3250, pieces: 101 };
same("figures before the first token", figures({ timing: { ...timing, first: 0 }, state: "running" }, 2234), "waiting 1.2 s");
same("figures while running", figures({ timing, state: "running" }, 3300), "≈ 50.0 tokens/s · ≈ 101 tokens · first token 250 ms");
same("figures at the end", figures({ timing, usage: { completion_tokens: 201, prompt_tokens: 12, prompt_tokens_details: { cached_tokens: 8 } } }), "100 tokens/s · 201 tokens · first token 250 ms · 12 in prompt, 8 cached");
same("figures of one token", figures({ timing: { ...timing, last: 1250 }, usage: { completion_tokens: 1 } }), "1 token · first token 250 ms");

// Conversations.

const talk = create({ system: " ", temperature: "0.5", top_k: "0", seed: "", stop: "END\n\\n\\n\n" });
const first = append(talk, null, { role: "user", content: "first question" });
const answer = append(talk, first.id, { role: "assistant", content: "one", tool_calls: [] });
const again = append(talk, first.id, { role: "assistant", content: "", tool_calls: [{ id: "c", name: "f", arguments: "{}" }] });
append(talk, again.id, { role: "tool", content: "42", tool_call_id: "c", name: "f" });
same("title", talk.title, "first question");
same("branch", branch(talk).map((one) => one.content), ["first question", "", "42"]);
same("siblings", siblings(talk, answer).length, 2);
same("request", requestBody(talk, "m", talk.head), {
  model: "m",
  messages: [
    { role: "user", content: "first question" },
    { role: "assistant", content: null, tool_calls: [{ id: "c", type: "function", function: { name: "f", arguments: "{}" } }] },
    { role: "tool", tool_call_id: "c", content: "42" },
  ],
  stream: true,
  stream_options: { include_usage: true },
  temperature: 0.5,
  top_k: 0,
  stop: ["END", "\n\n"],
});
select(talk, answer);
same("another branch", branch(talk).map((one) => one.content), ["first question", "one"]);
select(talk, first);
same("down to the latest", branch(talk).map((one) => one.content), ["first question", "", "42"]);
talk.messages[0].parent = again.id;
same("a circle ends", branch(talk).length <= talk.messages.length, true);
same("tools", ["", "[]", "{}", "[1]", "[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]"].map((text) => Boolean(toolsProblem(text))), [false, false, true, true, false]);

talk.messages[0].parent = null;
const [back] = importText(JSON.stringify({ format: "marlin-conversations", version: 1, conversations: [talk] }));
same("import", [back.title, back.head, branch(back).map((one) => one.content)], [talk.title, talk.head, ["first question", "", "42"]]);
same("import gives a new name", back.id !== talk.id, true);
throws("import of something else", () => importText("{}"), "format");
throws("import of a bad message", () => importText('{"format":"marlin-conversations","conversations":[{"messages":[{"role":"evil"}]}]}'), "message 1 of conversation 1");

window.outcome = { passed, failed };
document.getElementById("report").textContent = `${passed} passed, ${failed.length} failed\n\n${failed.join("\n\n")}`;
