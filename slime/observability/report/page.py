"""The page: the data of the runs, a style sheet and a script in one HTML file.

Prompts and answers are text from outside. They reach the page as JSON that cannot end its element,
the script shows them as text nodes only, and the page's own policy lets no other script run.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

# Inside <script> the HTML parser looks for "<"; U+2028 and U+2029 are kept out of harm's way too.
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


_SCRIPTS = ("base.js", "charts.js", "time.js", "samples.js", "page.js")  # in this order


def page_html(data: Mapping[str, Any], *, title: str) -> str:
    """One HTML page that needs no network: opens from a file."""
    style, body = _part("page.css"), _part("page.html")
    script = "".join(_part(name) for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "@@POLICY@@": policy,
        "@@TITLE@@": _escaped_html(title),
        "@@STYLE@@": style,
        "@@SCRIPT@@": script,
        "@@DATA@@": embedded_json(data),
    }
    head, *rest = body.split(
        "@@"
    )  # markers stand between "@@": one pass, so data is never searched
    pieces = [head]
    for i in range(0, len(rest), 2):
        pieces += [parts[f"@@{rest[i]}@@"], rest[i + 1]]
    return "".join(pieces)


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element of any page.

    Raises:
        ValueError: a number is NaN or infinite, which JSON in a browser lacks.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, escape in _ESCAPES.items():
        text = text.replace(char, escape)
    # A lone surrogate, half of a character, is no UTF-8: it becomes "?".
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _part(name: str) -> str:
    return files("slime.observability.report").joinpath("web", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _escaped_html(text: str) -> str:
    # No quotes: it stands between tags only.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
