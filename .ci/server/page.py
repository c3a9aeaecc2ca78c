"""The web page; ../check_page.py drives it where there is a browser, as there is in CI."""
import os
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
    shots = DRIVER.parent.parent / os.environ.get("CARGO_TARGET_DIR", "target") / "page" / "server"
    command = [sys.executable, str(DRIVER), "--url", context.server.url, "--screenshots", str(shots), "--require"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "is not checked" in done.stdout and not os.environ.get("CI"):
        raise Skip(done.stdout.strip().splitlines()[-1])
    equal(done.returncode, 0, (done.stdout + done.stderr)[-3000:])
    return f"{done.stdout.count('ok   ')} tests, screenshots in {shots}"
