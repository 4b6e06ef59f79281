"""What moved between two runs: rows whose median differs by more than a threshold."""

from collections.abc import Iterator

_HEADER = f"{'':<46}{'A ms':>10}{'B ms':>10}{'B / A':>8}"


def compare(a: dict, b: dict, threshold: float = 0.05) -> str:
    """A table of the rows that both runs measured and that moved by more than ``threshold``, the slowest first; then
    the rows that only one of them measured."""
    rows_a, rows_b = dict(_rows(a)), dict(_rows(b))
    both = [key for key in rows_a if key in rows_b]
    ratios = {key: rows_b[key]["p50_ms"] / rows_a[key]["p50_ms"] for key in both}
    moved = sorted((key for key in both if abs(ratios[key] - 1) > threshold), key=ratios.__getitem__, reverse=True)
    lines = [f"A: {_machine(a)}", f"B: {_machine(b)}", ""]
    if _machine(a, with_start=False) != _machine(b, with_start=False):
        lines += ["These are two machines: what moved need not be the code.", ""]
    lines.append(f"{len(moved)} of {len(both)} rows moved by more than {100 * threshold:g} %.")
    if moved:
        lines += ["", _HEADER]
        for key in moved:
            case, peer = key
            lines.append(f"{case}"[:80])
            times = f"{rows_a[key]['p50_ms']:>10.4f}{rows_b[key]['p50_ms']:>10.4f}"
            lines.append(f"  {peer:<44}{times}{ratios[key]:>8.2f}"[:80])
    for name, only, other in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
        if missing := [key for key in only if key not in other]:
            lines += ["", f"Measured in {name} only:", *(f"  {case}, {peer}"[:80] for case, peer in missing)]
    return "\n".join(lines)


def _rows(document: dict) -> Iterator[tuple[tuple[str, str], dict]]:
    for entry in document["cases"]:
        # A case of another size is another case.
        name = f"{entry['name']} {'x'.join(map(str, entry['shape']))}"
        for row in entry["rows"]:
            if row["outcome"] == "measured":
                yield (name, row["peer"]), row


def _machine(document: dict, with_start: bool = True) -> str:
    machine = document["machine"]
    name = machine["card"] or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    versions = f"torch {machine['versions']['torch']}, triton {machine['versions']['triton']}"
    return f"{name}, {versions}" + (f", {document['started']}" if with_start else "")
