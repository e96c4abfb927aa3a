"""A report as one HTML page, with the gate's verdict where there is one.

The page asks for nothing: style and script are in it, and its policy forbids the rest. Without the
script all is there to read; with it, tables sort and heat maps say their figures.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from ..figures import Report
from ..gate import Verdict
from .budget import budget
from .colours import css
from .divergence import divergence
from .element import Markup, element
from .experts import experts
from .head import head, title
from .layers import layers
from .memory import memory
from .provenance import provenance, rescues
from .retrieval import retrieval

SECTIONS = (divergence, retrieval, layers, experts, budget, memory, rescues, provenance)


def page(report: Report, verdict: Verdict | None = None) -> str:
    """The whole page. Parts that the report lacks are left out."""
    sections = [found for found in (make(report) for make in SECTIONS) if found is not None]
    script = _beside("script.js")
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title(report)),
            element("link", rel="icon", href="data:,"),
            element("style", Markup(_style())),
        ),
        element(
            "body",
            head(report, verdict),
            element("nav", [found.link for found in sections], aria_label="Sections"),
            element("main", [found.markup for found in sections]),
            element("script", script),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def _style() -> str:
    dark = f"@media screen and (prefers-color-scheme:dark){{{css('dark')}}}"
    return _beside("style.css") + css("light") + dark


def _beside(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f"default-src 'none'; {allowed}"
