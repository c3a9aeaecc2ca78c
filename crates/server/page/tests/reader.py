"""A reader of the page: one browser context, and what somebody does and sees in it."""
import time
from urllib.parse import urlsplit

WAIT_S = 30

# Text whose contrast to the nearest background is under WCAG's 4.5, and elements without a name.
AUDIT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255, 255];
  };
  const problems = [];
  const seen = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !node.closest(".sr, .skip, :disabled");
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walk.nextNode()); ) {
    const node = text.parentElement;
    if (!text.data.trim() || !seen(node)) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(node).color)), luminance(background(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) problems.push(`contrast ${ratio.toFixed(2)}: ${text.data.trim().slice(0, 40)}`);
  }
  for (const node of document.querySelectorAll("button, a[href], input, textarea, select, summary")) {
    if (!node.checkVisibility()) continue;
    const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent;
    if (!name?.trim()) problems.push(`no name: ${node.outerHTML.slice(0, 80)}`);
    const box = node.getBoundingClientRect();
    if (node.tagName === "BUTTON" && Math.min(box.width, box.height) < 24) problems.push(`small: ${name} ${box.width}x${box.height}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) problems.push(`two of #${id}`);
  const styled = document.querySelector("[style]:not([style=''], textarea, #load-bar i)");
  if (styled) problems.push(`a style attribute: ${styled.outerHTML.slice(0, 80)}`);
  return problems;
}"""


def check(condition, message):
    if not condition:
        raise AssertionError(message)


class Reader:
    """One browser context with the page open, and what a reader does on it."""

    def __init__(self, browser, url, mock=None, folder=None, **options):
        self.url, self.mock, self.folder = url, mock, folder
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.errors, self.strangers = [], []
        self.host = urlsplit(url).netloc
        self.page = self.open()

    def open(self):
        page = self.context.new_page()
        page.set_default_timeout(WAIT_S * 1000)
        page.on("console", lambda line: line.type in ("error", "warning") and self.errors.append(line.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.context.on("request", lambda request: urlsplit(request.url).scheme in ("http", "https")
                        and urlsplit(request.url).netloc != self.host and self.strangers.append(request.url))
        page.goto(self.url)
        # The last thing that starting does, besides asking for the models.
        self.shows("document.querySelector('#theme').hasAttribute('aria-label')", "the page does not start", page=page)
        return page

    def send(self, text, wait=True):
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.page.wait_for_selector(".assistant.running, .assistant .notice.failed, #ask-key[open], .assistant:last-child .figures:not(:empty)")
        if wait:
            self.idle()

    def idle(self):
        self.shows("!document.querySelector('#send').classList.contains('stop')", "the answer does not end", seconds=60)

    def text(self, selector):
        return self.page.inner_text(selector)

    def last(self, part=".prose"):
        return self.page.inner_text(f".assistant:last-child > {part}")

    def shows(self, script, message="", seconds=WAIT_S, page=None):
        """Waits until a script is true. Playwright's own waiting would need eval in the page, which its policy forbids."""
        deadline = time.monotonic() + seconds
        while not (page or self.page).evaluate(f"(() => {{ try {{ return Boolean({script}); }} catch {{ return false; }} }})()"):
            check(time.monotonic() < deadline, message or f"never true: {script}")
            (page or self.page).wait_for_timeout(25)

    def shot(self, name, **options):
        if self.folder:
            self.page.screenshot(path=str(self.folder / f"{name}.png"), **options)

    def audit(self):
        problems = self.page.evaluate(AUDIT)
        check(not problems, "\n  ".join(problems))

    def body(self):
        return self.mock.state.requests[-1]
