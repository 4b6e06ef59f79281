"""What the package's HTML pages share: the style of both, light and dark, the colours of shares, and plain tables."""

from collections.abc import Iterator
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #656d76; --line: #d0d7de; --page: #fff; --cell: #eaeef2 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --faint: #8d96a0; --line: #30363d; --page: #0d1117; --cell: #21262d }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p.verdict { border-left: 4px solid #0969da; padding: .2rem 1rem; max-width: 52rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 }
dt, .note { color: var(--faint) } .note { overflow-wrap: anywhere } dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
table.heat { border-collapse: separate; border-spacing: 2px }
table.heat td, table.heat th { border: 0; padding: .15rem .5rem; text-align: center }
table.heat td:first-child { text-align: left }
td.none { background: var(--cell) }
.legend { display: flex; align-items: center; gap: .5rem; font-size: .85rem; margin: .5rem 0 }
.legend span { white-space: nowrap }
.bar { width: 12rem; height: .8rem; border-radius: 2px }
"""
# From nothing delivered to all of it, or from noise to signal; legible for the colour-blind: dark blue is all.
_STOPS = ((178, 24, 43), (244, 165, 130), (247, 247, 247), (146, 197, 222), (33, 102, 172))


def color(share: float) -> str:
    """CSS of a colour from red, 0, to blue, 1; what is beyond is as the end."""
    at = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(at), len(_STOPS) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Texts as the lines of an HTML table that scrolls on a narrow screen."""
    if not rows:
        yield "<p>None.</p>"
        return
    yield '<div class="scroll"><table>'
    for tag, row in (("th", header), *(("td", row) for row in rows)):
        yield f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in row)}</tr>"
    yield "</table></div>"
