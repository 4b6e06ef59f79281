"""Bandwidth by size, one line a peer, against what this machine's own copy reaches."""

from collections.abc import Iterator
from pathlib import Path

# Of the Okabe-Ito palette, which the colour-blind can tell apart; ours is the first.
_COLORS = {
    "quail": "#0072b2",
    "quail, in place": "#56b4e9",
    "eager": "#000000",
    "torch.compile": "#d55e00",
    "bitsandbytes": "#009e73",
    "torchao": "#cc79a7",
}
_MARKS = dict(zip(_COLORS, "osD^vP", strict=True))
_COLUMNS = 3


def panels(document: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By op and variant, by peer: (useful megabytes, GB/s), where at least two sizes of one dtype were measured."""
    made: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, entry, row in _measured(document):
        made.setdefault(title, {}).setdefault(row["peer"], []).append((entry["useful_bytes"] / 1e6, row["gb_s"]))
    several = {title: peers for title, peers in made.items() if any(len(points) > 1 for points in peers.values())}
    return {title: {peer: sorted(points) for peer, points in peers.items()} for title, peers in several.items()}


def draw(document: dict, stem: Path) -> tuple[Path, Path]:
    """Writes ``stem``.png and ``stem``.svg.

    Raises:
        ValueError: where no op was measured at two sizes.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quail"  # the same run gives the same file
    from matplotlib import pyplot

    found = panels(document)
    if not found:
        raise ValueError("chart: expected a run that measured an op at two sizes; got none")
    roof = document["roof"]["copy_gb_s"]
    rows = -(-len(found) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 3.2 * rows), squeeze=False, sharey=True)
    for ax, (title, peers) in zip(axes.flat, found.items(), strict=False):
        for peer, points in peers.items():
            color, mark = _COLORS.get(peer, "#999999"), _MARKS.get(peer, "x")
            ax.plot(*zip(*points, strict=True), color=color, marker=mark, markersize=5, label=peer)
        ax.axhline(roof, color="#777777", linestyle="--", linewidth=1, label="copy of a large tensor")
        ax.set(title=title, xscale="log", yscale="log", xlabel="useful megabytes")
        ax.grid(alpha=0.3, which="both")
    for ax in axes[:, 0]:
        ax.set_ylabel("GB/s of useful bytes")
    for ax in list(axes.flat)[len(found) :]:
        ax.set_axis_off()
    handles = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    machine = document["machine"]
    name = machine["card"] or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    figure.suptitle(f"{name}, torch {machine['versions']['torch']}, {document['started'][:10]}")
    figure.set_layout_engine("constrained")
    paths = stem.with_suffix(".png"), stem.with_suffix(".svg")
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def _measured(document: dict) -> Iterator[tuple[str, dict, dict]]:
    for entry in document["cases"]:
        for row in entry["rows"]:
            if row["outcome"] == "measured":
                yield f"{entry['op']} {entry['variant']} {entry['dtype']}", entry, row
