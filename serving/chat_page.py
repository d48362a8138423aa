"""The chat page, and the headers under which it can run nothing but its own script."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse

# Read as text: so line ends are those that a browser hashes, whatever the checkout made of them.
_PAGE = (Path(__file__).parent / "chat.html").read_text("utf-8")


def _hash_of(tag: str) -> str:
    """The source expression that allows the page's one inline `tag` and no other."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_HEADERS = {
    "Content-Security-Policy": "; ".join([
        "default-src 'none'",
        f"script-src {_hash_of('script')}",
        f"style-src {_hash_of('style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}  # fmt: skip


def is_wanted(request: Request) -> bool:
    """Whether a browser asks, to show a page. Programs ask for JSON, or for anything."""
    return "text/html" in request.headers.get("Accept", "")


def response() -> HTMLResponse:
    """The page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
