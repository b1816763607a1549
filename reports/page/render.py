"""Sections to one HTML file. Values are escaped, and what is no printable text is replaced, as the templates take them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...system.reading import printable
from ...system.version import __version__
from .charts import KINDS

_ROOM = Path(__file__).parent


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page of a template of this room. values: title, what, lead, nav, assumptions, and what the template asks for.

    The script is the page's own alone: the page forbids any other by the hash of this one, and every request of a network.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ROOM),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=_shown,
    )
    script = (_ROOM / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {
        "style": Markup((_ROOM / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
        "kinds": KINDS,
    }
    return environment.get_template(template).render(**own, **values)


def _shown(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
