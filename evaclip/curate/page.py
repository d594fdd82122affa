"""What the pages of `evaclip data` share: one file with its pictures inside, safe whatever captions say."""

import base64
from pathlib import Path
from typing import Any

import jinja2

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1d2126 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100%; height: auto }
  table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
  td.number { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #666c74 }
  .grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax({{ column }}, 1fr)) }
  figure { margin: 0 } figcaption { font-size: 12px; overflow-wrap: anywhere }
</style>
<h1>{{ title }}</h1>
"""


def write_page(path: Path, body: str, title: str, column: str = "24rem", **values: Any) -> None:
    """Fill a template; everything that is filled in is escaped."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(HEAD + body + "</html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(page.render(title=title, column=column, **values))
    part.replace(path)


def inline(data: bytes, kind: str) -> str:
    """An image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
