"""What ``quail demo`` left in the folder that QUAIL_DEMO_OUT names; run after it."""

import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

OUT = Path(os.environ["QUAIL_DEMO_OUT"])
REPORT = json.loads((OUT / "report.json").read_text())
CELLS = {(cell["model"], cell["quantizer"]): cell for cell in REPORT["cells"]}


def test_every_checkpoint_was_deployed_in_16_and_4_bits():
    assert {m for m, _ in CELLS} >= {"learned", "16bit-ga", "16bit-ga-hinge", "nf4-ga", "nf4-ga-hinge"}
    assert all((m, q) in CELLS for m, _ in CELLS for q in ("none", "bnb-nf4", "bnb-fp4"))


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda c: f"{c['model']}-{c['quantizer']}")
def test_figures_are_those_of_the_answers(cell):
    assert math.isfinite(cell["perplexity"]) and cell["perplexity"] > 1
    assert len(cell["forget"]["answers"]) == 24
    for side in ("forget", "retain"):
        answers = cell[side]["answers"]
        for name in ("nll", "rouge_l", "exact"):
            assert cell[side][name] == pytest.approx(sum(a[name] for a in answers) / len(answers))
        assert all(a["exact"] == (a["said"] == a["expected"]) for a in answers)


def test_the_model_had_learned_what_it_then_forgot():
    learned, unlearned = (CELLS[model, "none"]["forget"]["exact"] for model in ("learned", "16bit-ga"))
    assert learned > 0.8 and unlearned < learned / 2


def test_checkpoints_are_ordinary_safetensors():
    for folder in {model for model, _ in CELLS}:
        assert (OUT / folder / "config.json").exists() and (OUT / folder / "tokenizer.json").exists()
        with safe_open(OUT / folder / "model.safetensors", "pt") as file:
            assert "model.layers.0.mlp.up_proj.weight" in file.keys()


def test_report_fits_a_terminal_and_the_picture_opens():
    tables = [line for line in (OUT / "report.md").read_text().splitlines() if line.startswith("|")]
    assert tables and max(map(len, tables)) <= 80
    with Image.open(OUT / "report.png") as image:
        assert image.width > 1000 and len(image.convert("L").getcolors(256)) > 10
