"""The pictures of a report as inline SVG: drawn for 360 units of width, a telephone's, in the colours of the page.

Colour is never alone: what came back is a triangle, what was kept a circle, what has no estimate a diamond.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape

from .figures import FULL, LARGEST_RECOVERY, MISSING, Deployment, Method, Regime, Run, in_four_bits, percent

STYLE = """
:root { --kept: #0969da; --back: #bc4c00 }
@media (prefers-color-scheme: dark) { :root { --kept: #58a6ff; --back: #f0883e } }
svg { display: block; width: 100%; font: 11px system-ui, sans-serif; fill: var(--text) }
svg .axis { stroke: var(--faint); fill: none } svg .grid { stroke: var(--line); fill: none }
svg .bar { stroke: var(--back); stroke-dasharray: 4 3; fill: none }
svg .faint { fill: var(--faint) } svg .name { font-weight: 600 }
svg .kept { fill: var(--kept); stroke: var(--kept) } svg .back { fill: var(--back); stroke: var(--back) }
svg .unknown { fill: var(--faint); stroke: var(--faint) }
svg .start { fill: var(--text); stroke: var(--text) } svg .hollow { fill: none; stroke-width: 1.5 }
svg .way { fill: none; stroke-width: 1; opacity: .6 }
svg .label { paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round }
"""
_WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM, _PLOT = 50, 14, 10, 34, 240
_BAND, _LINE, _METHODS = (124, 314), 15, 9  # of the recoveries: where the scale lies, a row, methods a picture
_LETTER = 6.2  # width of a letter at 11 px, a little more than most


def scatter(run: Run, regime: Regime, quantizer: str) -> Iterator[str]:
    """Forget against retain of every method: a ring in full precision, an arrow, a mark at ``quantizer``."""
    retained = [
        score.retain
        for scores in (regime.start, *({n: d.score for n, d in m.deployments.items()} for m in regime.shown))
        for name in run.quantizers
        if (score := scores.get(name)) is not None and score.retain is not None
    ]
    low = min([0.8, *(int(value * 10) / 10 for value in retained)])
    height = _TOP + _PLOT + _BOTTOM
    x = _scale(-0.03, 1.03, _LEFT, _WIDTH - _RIGHT)
    pad = (1 - low) * 0.05
    y = _scale(low - pad, 1 + pad, _TOP + _PLOT, _TOP)
    title = f"{regime.title}: {run.metric} on the forget set against the retain set, full precision and {quantizer}"
    yield f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    for i in range(6):
        at, retain = i / 5, low + (1 - low) * i / 5
        yield f'<path class="grid" d="M{x(at):.1f} {_TOP}V{_TOP + _PLOT}M{_LEFT} {y(retain):.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text class="faint" x="{x(at):.1f}" y="{_TOP + _PLOT + 14}" text-anchor="middle">{at:.1f}</text>'
        yield f'<text class="faint" x="{_LEFT - 5}" y="{y(retain) + 4:.1f}" text-anchor="end">{retain:.2f}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{_TOP + _PLOT}H{_WIDTH - _RIGHT}"/>'
    yield (
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 4}" text-anchor="middle">'
        f"{run.metric} on the forget set</text>"
    )
    across = _TOP + _PLOT / 2
    yield (
        f'<text x="9" y="{across}" text-anchor="middle" transform="rotate(-90 9 {across})">'
        f"{run.metric} on the retain set</text>"
    )
    places: list[tuple[float, float, str]] = []
    ways: list[tuple[float, float]] = []
    start = [regime.start.get(name) for name in (FULL, quantizer)]
    yield from _way(start, x, y, "start", _square, "start, nothing forgotten")
    ways += _along(start, x, y)
    if point := _point(start[1] or start[0], x, y):
        places.append((*point, "start"))
    for method in regime.shown:
        here = method.deployments[quantizer]
        scores = [method.deployments[name].score if name in method.deployments else None for name in (FULL, quantizer)]
        kind, mark = _kind(here)
        yield from _way(scores, x, y, kind, mark, f"{method.number} {method.name}")
        ways += _along(scores, x, y)
        if point := _point(scores[1] or scores[0], x, y):
            places.append((*point, str(method.number)))
    yield from _labels(places, ways)
    yield "</svg>"


def recoveries(run: Run, regime: Regime) -> Iterator[str]:
    """A dot and a whisker for every method at every quantizer, in pictures of a few methods each, one scale for all."""
    shown = regime.shown
    known = [
        each.recovery
        for method in shown
        for each in method.deployments.values()
        if each.recovery is not None and each.recovery.value is not None
    ]
    # Beyond these a quotient is cut off, so that one odd cell does not press the others together.
    low = max(min([-0.1, *(each.low for each in known)]), -0.5)
    high = min(max([1.05, *(each.high for each in known)]), 1.5)
    x = _scale(low, high, *_BAND)
    for start in range(0, len(shown), _METHODS):
        yield "<figure>" + "\n".join(_recoveries_of(run, regime, shown[start : start + _METHODS], x)) + "</figure>"


def _recoveries_of(run: Run, regime: Regime, methods: Sequence[Method], x: Callable) -> Iterator[str]:
    quantizers = [name for name in run.quantizers if name != FULL]
    bottom = 20 + len(methods) * (len(quantizers) + 1.4) * _LINE
    title = f"{regime.title}: recovery of {run.metric} in percent, with intervals"
    yield f'<svg viewBox="0 0 {_WIDTH} {bottom + 24:.0f}" role="img" aria-label="{escape(title)}">'
    for tick in (0.0, 0.5, 1.0):
        yield f'<path class="grid" d="M{x(tick):.1f} 16V{bottom:.1f}"/>'
        for y in (11, bottom + 14):
            yield f'<text class="faint" x="{x(tick):.1f}" y="{y:.1f}" text-anchor="middle">{100 * tick:.0f} %</text>'
    yield f'<path class="bar" d="M{x(LARGEST_RECOVERY):.1f} 16V{bottom:.1f}"/>'
    y = 20.0
    for method in methods:
        y += 1.2 * _LINE
        mark = "\u2020" if method.not_reached else ""
        name = escape(f"{method.number} {method.name}{mark}")
        yield f'<text class="name label" x="2" y="{y - 4:.1f}">{name}</text>'
        for quantizer in quantizers:
            here = method.deployments[quantizer]
            middle = y + _LINE / 2
            place = f'x="{_BAND[0] - 6}" y="{middle + 4:.1f}"'
            yield f'<text class="faint" {place} text-anchor="end">{escape(quantizer)}</text>'
            yield from _whisker(method, here, x, middle)
            y += _LINE
        y += 0.2 * _LINE
    yield "</svg>"


def _whisker(method: Method, here: Deployment, x: Callable, y: float) -> Iterator[str]:
    left, right = _BAND
    if here.recovery is None or here.recovery.value is None:
        text = MISSING if here.score is None else "no estimate"
        yield (
            f'<text class="faint" x="{_WIDTH - 2}" y="{y + 4:.1f}" text-anchor="end">{text}'
            f"<title>{escape(f'{method.name} at {here.quantizer}: {here.reason}')}</title></text>"
        )
        return
    kind, mark = _kind(here)
    found = here.recovery
    ends = [min(max(x(end), left), right) for end in (found.low, found.high)]
    told = f"{method.name} at {here.quantizer}: {recovery_text(found)}"
    yield f'<g class="{kind}"><title>{escape(told)}</title>'
    yield f'<path class="{kind} way" d="M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}"/>'
    if left <= x(found.value) <= right:
        yield mark(x(found.value), y, kind)
    for end, beyond, sign in ((left, x(found.low) < left, -1), (right, x(found.high) > right, 1)):
        if beyond:
            yield f'<path class="{kind}" d="M{end + 5 * sign} {y:.1f}l{-5 * sign} -4v8z"/>'
    yield "</g>"
    yield f'<text x="{_WIDTH - 2}" y="{y + 4:.1f}" text-anchor="end">{percent(found.value)} %</text>'


def recovery_text(found) -> str:
    return f"{percent(found.value)} % ({percent(found.low)} to {percent(found.high)})"


def swatch(kind: str) -> str:
    """The mark of a kind, for a legend: ``ring``, ``start``, ``kept``, ``back`` or ``unknown``."""
    drawn = {
        "ring": lambda: '<circle class="unknown hollow" cx="7" cy="7" r="5"/>',
        "start": lambda: _square(7, 7, "start"),
        "kept": lambda: _circle(7, 7, "kept"),
        "back": lambda: _triangle(7, 7, "back"),
        "unknown": lambda: _diamond(7, 7, "unknown"),
    }[kind]()
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{drawn}</svg>'


def _kind(here: Deployment) -> tuple[str, Callable[[float, float, str], str]]:
    if here.recovery is None or here.recovery.value is None:
        return "unknown", _diamond
    return ("back", _triangle) if here.recovery.value >= LARGEST_RECOVERY else ("kept", _circle)


def _point(score, x: Callable, y: Callable) -> tuple[float, float] | None:
    if score is None or score.forget is None or score.retain is None:
        return None
    return x(score.forget), y(score.retain)


def _way(scores: Sequence, x: Callable, y: Callable, kind: str, mark: Callable, name: str) -> Iterator[str]:
    """A hollow mark, an arrow and a full one; what is missing is left out."""
    full, here = (_point(score, x, y) for score in scores)
    told = [
        f"{score.forget:.2f} forget, {score.retain:.2f} retain" if point else MISSING
        for score, point in zip(scores, (full, here), strict=True)
    ]
    yield f"<g><title>{escape(f'{name}: {told[0]} in full precision; {told[1]} quantized')}</title>"
    if full:
        hollow = f'<circle class="{kind} hollow" cx="{full[0]:.1f}" cy="{full[1]:.1f}" r="5.5"/>'
        if kind == "start":
            hollow = (
                f'<rect class="start hollow" x="{full[0] - 5.5:.1f}" y="{full[1] - 5.5:.1f}" width="11" height="11"/>'
            )
        yield hollow
    if full and here:
        across, up = here[0] - full[0], here[1] - full[1]
        distance = (across**2 + up**2) ** 0.5
        if distance > 14:
            ux, uy = across / distance, up / distance
            x0, y0, x1, y1 = full[0] + 6 * ux, full[1] + 6 * uy, here[0] - 6 * ux, here[1] - 6 * uy
            yield f'<path class="{kind} way" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'
            head = f"M{x1:.1f} {y1:.1f}l{-6 * ux - 3 * uy:.1f} {-6 * uy + 3 * ux:.1f}l{6 * uy:.1f} {-6 * ux:.1f}z"
            yield f'<path class="{kind}" d="{head}"/>'
    if here:
        yield mark(*here, kind)
    yield "</g>"


def _along(scores: Sequence, x: Callable, y: Callable) -> list[tuple[float, float]]:
    """Points on the way from full precision to the quantized mark, close enough that no label fits between."""
    full, here = (_point(score, x, y) for score in scores)
    if not full or not here:
        return []
    count = 2 + int(max(abs(here[0] - full[0]), abs(here[1] - full[1])) / 6)
    shares = [i / (count - 1) for i in range(count)]
    return [(full[0] + (here[0] - full[0]) * share, full[1] + (here[1] - full[1]) * share) for share in shares]


def _labels(places: Sequence[tuple[float, float, str]], ways: Sequence[tuple[float, float]]) -> Iterator[str]:
    """One label for marks that lie on each other, moved until it covers nothing; a line to it where it is far."""
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, text in places:
        near = next((g for g in groups if abs(g[0] - x) < 9 and abs(g[1] - y) < 9), None)
        if near:
            near[2].append(text)
        else:
            groups.append((x, y, [text]))
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in groups] + [(x - 5, y - 5, x + 5, y + 5) for x, y in ways]
    for x, y, texts in groups:
        text = _ranges(texts)
        width = len(text) * _LETTER
        box = None
        for reach in range(0, 120, 6):
            for dx, dy in ((1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1)):
                left = x + dx * (10 + reach * (dy == 0)) - width * {1: 0, -1: 1, 0: 0.5}[dx]
                middle = y + dy * (12 + reach)
                candidate = (left, middle - 6, left + width, middle + 6)
                inside = left >= _LEFT and candidate[2] <= _WIDTH and _TOP <= middle <= _TOP + _PLOT - 4
                if inside and not any(_meet(candidate, other) for other in taken):
                    box = candidate
                    break
            if box:
                break
        if box is None:  # no room: over the others is better than nowhere
            box = (x + 9, y - 6, x + 9 + width, y + 6)
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > 14:
            yield f'<path class="grid" d="M{x:.1f} {y:.1f}L{(box[0] + box[2]) / 2:.1f} {middle:.1f}"/>'
        yield f'<text class="label" x="{box[0]:.1f}" y="{middle + 4:.1f}">{escape(text)}</text>'


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ranges(texts: Sequence[str]) -> str:
    """``1-3, 7``: numbers that follow each other are one range."""
    parts, numbers = [text for text in texts if not text.isdigit()], sorted(int(t) for t in texts if t.isdigit())
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts += [f"{a}-{b}" if b > a + 1 else f"{a}, {b}" if b > a else str(a) for a, b in runs]
    return ", ".join(parts)


def _scale(low: float, high: float, at_low: float, at_high: float) -> Callable[[float], float]:
    return lambda value: at_low + (value - low) / (high - low) * (at_high - at_low)


def _circle(x: float, y: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _square(x: float, y: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'


def _triangle(x: float, y: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z"/>'


def _diamond(x: float, y: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>'


def quantized(run: Run) -> list[str]:
    """The quantizers that have a picture of their own: all but full precision, those in 4 bits first."""
    return sorted((name for name in run.quantizers if name != FULL), key=lambda name: not in_four_bits(name))
