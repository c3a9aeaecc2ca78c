"""The web page; ../check_page.py drives it where there is a browser."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from .harness import Skip, check, equal, expect

DRIVER = Path(__file__).resolve().parent.parent / "check_page.py"


@check("page: is there, with all it names")
def there(context):
    page = context.server.get("/")
    equal((page.status_code, page.headers["content-type"]), (200, "text/html; charset=utf-8"))
    expect("default-src 'none'" in page.headers["content-security-policy"], page.headers)
    links = set(re.findall(r"(?:href|src)=\"?((?:/?page/)[^\"> ]+)", page.text))
    expect(links, "it names nothing")
    for link in links:
        file = context.server.get("/" + link.lstrip("/"))
        expect(file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff", link, file.status_code)
    expect(not re.search(r"(?:href|src)=\"?https?://", page.text), "it needs other hosts")
    expect("/v1/chat/completions" in context.server.get("/docs").text, "/docs")


@check("page: in a browser")
def browser(context):
    python = sys.executable
    if importlib.util.find_spec("playwright") is None:
        # Perhaps the Python that this one's environment was made from has it.
        python = str(Path(sys.base_prefix) / "bin/python3")
        if subprocess.run([python, "-c", "import playwright"], capture_output=True).returncode != 0:
            raise Skip("the package playwright is missing")
    done = subprocess.run([python, str(DRIVER), "--url", context.server.url], capture_output=True, text=True, timeout=300)
    if "is not checked" in done.stdout:
        raise Skip(done.stdout.strip().splitlines()[-1])
    equal(done.returncode, 0, (done.stdout + done.stderr)[-3000:])
