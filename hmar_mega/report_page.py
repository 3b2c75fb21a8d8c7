"""The paper that reports are written on: the HTML frame, its style sheet, and the pieces it is put together from.

Every function takes plain text and escapes it, but for arguments called `markup`, which are HTML already.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image, UnidentifiedImageError

from hmar_mega.errors import UserError

#: Small images are shown this many times as large, or less where they would grow beyond this many CSS pixels.
LARGEST_ZOOM, SHOWN_WIDTH, SHOWN_HEIGHT = 3, 1000, 560

STYLE_SHEET = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #5d6772; --line: #d5dae0; --card: #f5f7f9;
  --track: #e4e8ec; --bar: #3b7dd8; --good: #1a7f4b; --poor: #b4462a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e3e7eb; --soft: #98a2ad; --line: #39414a;
  --card: #1c2126; --track: #2b3138; --bar: #5a96e6; --good: #4cc38a; --poor: #f0866a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 20px 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .9rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; max-width: 80ch; }
.lead { font-size: 1.08rem; color: var(--soft); max-width: none; }
.note, figcaption { color: var(--soft); font-size: .88rem; }
.headline { display: grid; grid-template-columns: minmax(240px, 2fr) 3fr; gap: 1.2rem 2.5rem; align-items: center;
  margin-top: 1.6rem; padding: 1.4rem 1.6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.figure { font-size: 3.3rem; line-height: 1.05; font-weight: 700; letter-spacing: -.02em; white-space: nowrap; }
.verdict { font-weight: 600; }
.headline .note { margin: .9rem 0 0; }
.good { color: var(--good); } .poor { color: var(--poor); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 1.5rem 2.5rem;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); white-space: nowrap; }
thead th { font-weight: 600; color: var(--ink); }
td:last-child, th:last-child { padding-right: 0; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .45rem .8rem; align-items: center;
  font-variant-numeric: tabular-nums; font-size: .92rem; }
.bars > :nth-child(3n) { text-align: right; }
.track { position: relative; height: .8rem; border-radius: 3px; background: var(--track); }
.track > span { display: block; height: 100%; border-radius: 3px; background: var(--bar); min-width: 1px; }
.track > i { position: absolute; top: -.2rem; bottom: -.2rem; border-left: 2px solid var(--ink); }
figure { margin: 0; }
figcaption { margin-top: .45rem; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
img.pixels { image-rendering: crisp-edges; image-rendering: pixelated; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.6rem 2.4rem; align-items: flex-start; }
.grids { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem 1rem; margin-bottom: 1.4rem; }
.grids img { width: 100%; }
.sheet { display: grid; grid-template-columns: max-content minmax(0, max-content); gap: 0 .8rem; }
.sheet > div { display: grid; grid-auto-rows: 1fr; align-items: center; text-align: right; font-size: .85rem;
  color: var(--soft); }
.plot { display: block; width: 100%; height: auto; margin: .3rem 0 .6rem; overflow: visible; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: inherit !important; }
pre { margin: .3rem 0 1.1rem; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre code { display: block; font: inherit; padding-left: 2ch; text-indent: -2ch; }
.step { margin: 0; }
.wide { overflow-x: auto; overflow-y: hidden; margin-bottom: 1rem; }
.wide td { overflow-wrap: anywhere; min-width: 7.5rem; }
@media (max-width: 680px) { .headline { grid-template-columns: 1fr; } .columns { grid-template-columns: 1fr; }
  .grids { grid-template-columns: repeat(2, 1fr); } .wide .plot { width: 760px; } main { padding-top: 1.2rem; } }
@media print { main { max-width: none; } h2, figure, table, pre { break-inside: avoid; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def page(title: str, markup: Iterable[str]) -> str:
    """The whole document."""
    return PAGE.substitute(title=html.escape(title), style=STYLE_SHEET, body="\n".join(markup))


def element(tag: str, text: str, css_class: str = "") -> str:
    """`<tag class="css_class">text</tag>`."""
    return wrap(tag, html.escape(text), css_class)


def wrap(tag: str, markup: str, css_class: str = "") -> str:
    """`<tag class="css_class">markup</tag>`."""
    attribute = f' class="{html.escape(css_class)}"' if css_class else ""
    return f"<{tag}{attribute}>{markup}</{tag}>"


def facts(rows: Mapping[str, str]) -> str:
    """A table of names and values."""
    body = "".join(f'<tr><th scope="row">{html.escape(k)}</th>{element("td", v)}</tr>' for k, v in rows.items())
    return f"<table><tbody>{body}</tbody></table>"


def comparison(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a heading over each column of values."""
    head = "<th></th>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(element("td", value) for value in values)}</tr>'
        for name, values in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def bars(rows: Iterable[tuple[str, float, str]], mark: float | None = None) -> str:
    """Horizontal bars.

    Args:
        rows: name, length as a share in [0, 1], and what is written at the end of each bar.
        mark: where along the bars, in [0, 1], a line is drawn across them.
    """
    line = "" if mark is None else f'<i style="left:{100 * mark:.2f}%"></i>'
    cells = []
    for name, share, value in rows:
        track = f'<span style="width:{100 * min(1.0, max(0.0, share)):.2f}%"></span>{line}'
        cells.append(f"<span>{html.escape(name)}</span>{wrap('div', track, 'track')}<span>{html.escape(value)}</span>")
    return wrap("div", "\n".join(cells), "bars")


def picture(path: Path, caption: str) -> str:
    """An image inside the page, with its caption; small ones are enlarged by a whole number, with sharp pixels.

    Raises:
        UserError: when the file is no image.
    """
    return f"<figure>{_image(path, caption)}{element('figcaption', caption)}</figure>"


def sheet(path: Path, caption: str, row_names: Iterable[str]) -> str:
    """An image of rows of equal height, with the name of each beside it.

    Raises:
        UserError: when the file is no image.
    """
    names = "".join(element("span", name) for name in row_names)
    rows = wrap("div", wrap("div", names) + _image(path, caption), "sheet")
    return f"<figure>{rows}{element('figcaption', caption)}</figure>"


def _image(path: Path, alternative: str) -> str:
    try:
        raw = path.read_bytes()
        with Image.open(path) as image:
            width, height, kind = image.width, image.height, Image.MIME[str(image.format)]
    except (OSError, UnidentifiedImageError) as err:
        raise UserError(f"cannot read {path} as an image for the report: {err}; give a PNG file") from None
    zoom = max(1, min(LARGEST_ZOOM, SHOWN_WIDTH // width, SHOWN_HEIGHT // height))
    pixels = ' class="pixels"' if width <= SHOWN_WIDTH else ""
    source = f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
    size = f'width="{width * zoom}" height="{height * zoom}"'
    return f'<img{pixels} {size} alt="{html.escape(alternative)}" src="{source}">'
