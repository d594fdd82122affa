"""Search results as one page of thumbnails that stands on its own and can be sent by mail."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from evaclip.errors import InputError
from evaclip.search.pictures import thumbnail
from evaclip.search.readers import original
from evaclip.search.store import atomically

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ queries[0].title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1d2126 }
  h1 { font-size: 1.25rem; margin-top: 2rem }
  .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
  figure { margin: 0 } img, .none { width: 100%; height: 11rem; object-fit: contain; background: #f2f3f5 }
  .none { display: grid; place-items: center; color: #666c74; padding: .5rem; box-sizing: border-box; font-size: 12px }
  figcaption { font-size: 12px; overflow-wrap: anywhere } .score { font-variant-numeric: tabular-nums; color: #666c74 }
</style>
{% for query in queries %}
<h1>{{ query.title }}</h1>
<div class="grid">
{% for row in query.rows %}<figure>
{% if row.picture %}<img alt="{{ row.key }}" src="data:image/jpeg;base64,{{ row.picture }}">
{% else %}<div class="none">{{ row.why }}</div>{% endif %}
<figcaption><span class="score">{{ "%.4f"|format(row.score) }}</span> {{ row.key }}{% if row.caption %}<br>
{{ row.caption }}{% endif %}</figcaption>
</figure>
{% endfor %}</div>
{% endfor %}
</html>
"""


def write_sheet(path: Path, titles: Sequence[str], found: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Write the page: one heading and one grid for each query."""
    queries = [
        {"title": title, "rows": [_shown(row) for row in rows]} for title, rows in zip(titles, found, strict=True)
    ]
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(queries=queries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary:
            temporary.write_text(page)
    except OSError as error:
        raise InputError(f"the page cannot be written to {path}: {error.strerror}") from None


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A result with its picture, or why there is none."""
    if row["place"] == "line":
        return row | {"why": row["caption"]}
    try:
        return row | {"picture": base64.b64encode(thumbnail(original(row), row["key"])).decode()}
    except InputError as error:
        return row | {"why": str(error)}
