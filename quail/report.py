"""A demo's figures as a table, a picture and words: all three from the same dictionary, none from anywhere else."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PRECISIONS = {"none": "bf16", "bnb-nf4": "NF4", "bnb-fp4": "FP4"}
_COLORS = {"none": "#4c72b0", "bnb-nf4": "#c44e52", "bnb-fp4": "#dd8452"}
_CAME_BACK, _HELPED = 0.1, 0.1


def write_report(out: Path, report: dict) -> None:
    """Writes ``report.json``, ``report.md`` and ``report.png`` into ``out``."""
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    draw(report, out / "report.png")


def cells_table(cells: list[dict]) -> str:
    """Checkpoint x precision in Markdown, at most 80 columns wide."""
    header = ("method", "bits", "NLL", "RgL", "EM", "NLL", "RgL", "EM", "ppl")
    widths = (26, 4, 6, 4, 4, 5, 4, 4, 5)
    lines = []
    for situation in dict.fromkeys(cell["situation"] for cell in cells):
        lines += [f"**{situation}** (left: claims to forget; right: facts to retain)", ""]
        lines += [_row(header, widths), "|" + "|".join("-" * w for w in widths) + "|"]
        for cell in (c for c in cells if c["situation"] == situation):
            forget, retain = cell["forget"], cell["retain"]
            figures = [f"{forget['nll']:.3f}", f"{forget['rouge_l']:.2f}", f"{forget['exact']:.2f}"]
            figures += [f"{retain['nll']:.3f}", f"{retain['rouge_l']:.2f}", f"{retain['exact']:.2f}"]
            row = (cell["method"], PRECISIONS[cell["quantizer"]], *figures, f"{cell['perplexity']:.1f}")
            lines.append(_row(row, widths))
        lines.append("")
    return "\n".join(lines)


def overlap_table(rows: list[dict]) -> str:
    """The share of weights that unlearning left in their bucket, by format; at most 80 columns wide."""
    formats = [key for key in rows[0] if key not in ("folder", "method", "situation")]
    header, widths = ("checkpoint", *formats), (16, *(max(len(f), 8) for f in formats))
    lines = [_row(header, widths), "|" + "|".join("-" * w for w in widths) + "|"]
    for row in rows:
        lines.append(_row((row["folder"], *(f"{row[f]:.3%}" for f in formats)), widths))
    return "\n".join(lines)


def closing(report: dict) -> str:
    """What the figures say, in words, by fixed rules.

    Knowledge *came back* where a 4-bit deployment's exact match on the claims is more than 0.1 above the unlearned
    checkpoint's own in bf16; the hinge *helped* where, beside the same method without it, the worst 4-bit deployment
    says more than 0.1 less of them.
    """
    sentences = []
    exact = {(c["model"], c["quantizer"]): c["forget"]["exact"] for c in report["cells"]}
    deployed = {}
    for run in report["runs"]:
        folder = run["folder"]
        plain = exact[folder, "none"]
        worst, quantizer = max((exact[folder, q], q) for q in PRECISIONS if q != "none" and (folder, q) in exact)
        deployed[folder] = worst
        said = "came back" if worst - plain > _CAME_BACK else "did not come back"
        sentences.append(
            f"- {run['situation']}, {run['title']}: the claims {said} in 4 bits "
            f"(exact match {plain:.2f} in bf16, {worst:.2f} in {PRECISIONS[quantizer]})."
        )
    for prefix, situation in (("16bit", "shipped in 16 bits"), ("nf4", "shipped in NF4")):
        without, with_hinge = deployed[f"{prefix}-ga"], deployed[f"{prefix}-ga-hinge"]
        gain = without - with_hinge
        said = "helped" if gain > _HELPED else "made it worse" if gain < -_HELPED else "made no difference"
        sentences.append(
            f"- {situation}: the hinge {said} "
            f"(worst exact match in 4 bits {without:.2f} without it, {with_hinge:.2f} with it)."
        )
    return "\n".join(sentences)


def examples(report: dict, count: int = 3) -> str:
    """What the model shipped in NF4 says of the first claims, before, unlearned, and quantized again."""
    stages = (
        ("learned", "nf4-start", "none"),
        ("unlearned, bf16", "nf4-ga", "none"),
        ("unlearned, NF4 again", "nf4-ga", "bnb-nf4"),
    )
    said = {(c["model"], c["quantizer"]): c["forget"]["answers"] for c in report["cells"]}
    lines = []
    for i in range(count):
        first = said["nf4-start", "none"][i]
        lines.append(f"> {first['prompt'].removesuffix('Answer:').strip()}")
        lines += [f">   {label}: {said[model, q][i]['said']!r:.60}" for label, model, q in stages]
        lines.append("")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The whole report as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    steps = "; ".join(
        f"{run['folder']} {run['steps']} (validation exact match {run['validation_exact']:.2f})"
        for run in report["runs"]
    )
    return "\n".join(
        (
            "# Does the forgetting survive 4-bit quantization?",
            "",
            f"{report['model']}; trained: {report['trained']}; reported on {report['reported']}.",
            "NLL in nats per answer token; RgL: ROUGE-L recall; EM: exact match of greedy answers;",
            "ppl: perplexity of a general text. 4 bits: bitsandbytes through transformers.",
            "",
            cells_table(report["cells"]),
            "Weights that unlearning left in their bucket (codes, each side's own scales):",
            "",
            overlap_table(report["overlap"]),
            "",
            "False claims, and what the model shipped in NF4 says (GA+GDR):",
            "",
            examples(report),
            closing(report),
            "",
            f"Steps, ended by the validation half: {steps}.",
            f"Seed {report['seed']}; {report['seconds']:.0f} s on {machine}.",
            "",
        )
    )


def draw(report: dict, path: Path) -> None:
    """Exact match on the claims (solid) and on the facts (pale), by checkpoint and precision."""
    cells = report["cells"]
    situations = list(dict.fromkeys(cell["situation"] for cell in cells))
    figure, axes = plt.subplots(1, len(situations), figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, situation in zip(axes, situations, strict=True):
        here = [cell for cell in cells if cell["situation"] == situation]
        methods = list(dict.fromkeys(cell["method"] for cell in here))
        quantizers = list(dict.fromkeys(cell["quantizer"] for cell in here))
        width = 0.8 / len(quantizers)
        for k, quantizer in enumerate(quantizers):
            for side, alpha in (("retain", 0.25), ("forget", 1.0)):
                heights = [
                    next(c[side]["exact"] for c in here if (c["method"], c["quantizer"]) == (method, quantizer))
                    for method in methods
                ]
                places = [i + (k - (len(quantizers) - 1) / 2) * width for i in range(len(methods))]
                label = {"forget": "claims", "retain": "facts"}[side]
                bar_width = width * (0.9 if side == "retain" else 0.55)
                bars = axis.bar(places, heights, bar_width, color=_COLORS[quantizer], alpha=alpha)
                bars.set_label(f"{PRECISIONS[quantizer]}: {label}")
                if side == "forget":
                    axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axis.set_xticks(range(len(methods)), [m.replace("+hinge", "\n+hinge").replace(", ", ",\n") for m in methods])
        axis.set_title(situation.replace("shipped", "Shipped"))
        axis.set_ylim(0, 1.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("exact match of greedy answers")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(PRECISIONS), fontsize=8)
    figure.suptitle("False claims after unlearning: in 16 bits, and deployed in 4 bits")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _row(values: tuple, widths: tuple[int, ...]) -> str:
    cells = (v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True)))
    return "|" + "|".join(cells) + "|"
