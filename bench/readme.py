"""The README's section on performance, out of one results file: what was measured, where, and beside whom.

The audits in bench/results/ follow it, each with the machine that it ran on.
"""

import json
from pathlib import Path

from . import results
from .machine import ROOT

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
_README = ROOT / "README.md"


def section(document: dict, path: Path) -> str:
    """Markdown between the two marks: the machine, its roof, and for each headline case every peer's median."""
    machine, roof = document["machine"], document["roof"]["copy_gb_s"]
    name = machine["card"] or f"{machine['cpu']}, {machine['cpu_cores']} cores (no GPU)"
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items() if version)
    lines = [
        f"{name}; {versions}; {document['started'][:10]}. Its own copy of a large tensor reaches {roof:.1f} GB/s of "
        "bytes read and written: the roof. Useful bytes are each input read once and each output written once; % of "
        "roof is their rate over it. Medians; ratio: to the fastest other peer, below 1 where none is faster.",
        "",
        "| op | shape | useful MB | peer | ms | GB/s | % of roof | ratio | extra MB |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for entry in document["cases"]:
        if not entry.get("headline") or not entry["rows"]:
            continue
        shape = " x ".join(map(str, entry["shape"]))
        first = f"{entry['op']} {entry['variant']}, {entry['dtype']}", shape, f"{entry['useful_bytes'] / 1e6:.0f}"
        for row in entry["rows"]:
            lines.append(f"| {' | '.join((*first, row['peer'], *_figures(row)))} |")
            first = "", "", ""
    relative = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path.name
    lines += [
        "",
        f"From `{relative}`, which has every case; `python -m bench --readme {relative}` writes this section.",
    ]
    return "\n".join(lines + audits())


def audits(folder: Path = results.FOLDER) -> list[str]:
    """A table of the audits that ``python -m bench.audit`` measured; nothing where there are none."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("audit-*.json"))]
    if not documents:
        return []
    lines = [
        "",
        "`quail audit` of a pair in bf16 (`python -m bench.audit`). Its bound is the time to read the files and to "
        "count in memory, one after the other, by as many workers.",
        "",
        "| pair of the shape of | machine | recipes | GB | s | GB/s | time / bound | peak resident MB |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in documents:
        cells = (
            f"{row['model']}, {row['layers']} layers",
            f"{row['machine']['cpu']}, {row['workers']} workers",
            ", ".join(row["formats"]),
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['audit_s']:.0f}",
            f"{row['audit_gb_s']:.3f}",
            f"{row['times_bound']:.2f}",
            f"{row['peak_resident_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write(document: dict, path: Path, readme: Path = _README) -> None:
    """Puts the section between the marks of the README.

    Raises:
        ValueError: where the marks are not there, once each and in order.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{readme.name}: expected {BEGIN} and {END} once each, in this order; got none such")
    readme.write_text(f"{before}{BEGIN}\n{section(document, path)}\n{END}{after}", encoding="utf-8")


def _figures(row: dict) -> tuple[str, ...]:
    if row["outcome"] != "measured":
        return row["outcome"], "", "", "", ""
    percent, best, extra = row["percent_of_copy"], row["times_best"], row["peak_extra_bytes"]
    return (
        f"{row['p50_ms']:.4g}",
        f"{row['gb_s']:.1f}",
        "" if percent is None else f"{percent:.0f}",
        "" if best is None else f"{best:.2f}",
        "" if extra is None else f"{extra / 1e6:.0f}",
    )
