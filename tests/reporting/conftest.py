"""Small runs, made by hand, in the layout that ``quail run`` writes."""

import json

import pytest

FORGET, RETAIN = 20, 10
_AUDIT = {
    **{"weights": 1000, "groups": 16, "zero_groups": 0, "same_code": 990, "changed": 10, "code_overlap": 0.99},
    **{"value_overlap": 0.9, "code_overlap_before_grid": 0.99, "value_overlap_before_grid": 0.99},
    **{"changed_share": 0.01, "predicted_flip_share": 0.02, "share_below_half_step": 1.0, "mean_abs_change": 1e-4},
    **{"max_abs_change": 1e-3, "step_share_p50": 0.01, "step_share_p90": 0.03, "step_share_p99": 0.1},
    **{"delivered_share": 0.5, "delivered_cosine": 0.5, "delivered_norm": 1.0, "update_norm": 1.0},
    **{"on_grid_share": 0.0},
}


class Results:
    """Builds RESULTS.json row by row; ``content`` and the other keys may be changed before ``write``."""

    def __init__(self, methods=("A", "B"), quantizers=("none", "bnb-nf4"), regimes=("16bit",), seeds=(0,)):
        self.metric = "exact"
        content = {
            "about": "a small one",
            "task": "tofu",
            "settings": {"split": "forget01"},
            "learn": {"epochs": 2},
            "regimes": list(regimes),
            "quantizers": list(quantizers),
            "seeds": list(seeds),
            "stop": {"metric": "exact", "at": 0.1},
            "defaults": {"learning_rate": 1e-5},
            "methods": {name: {} for name in methods},
        }
        machine = {"versions": {"python": "3.11", "torch": "2.13"}, "machine": {"device": "a processor", "threads": 2}}
        self.results = {
            **{"schema": 2, "recipe": "small", "quick": False, "task": "tofu", "content": content},
            **{"cells": {"planned": 9, "done": 8}, "made_by": [machine], "seconds": 12.3, "audits": [], "rows": []},
        }
        self.content = content

    def row(
        self, method, quantizer, remembered, retained=RETAIN, *, seed=0, regime="16bit", half="report", nll=1.0, **more
    ):
        """``remembered`` of the 20 forget examples and ``retained`` of the 10 retain examples are right."""
        training = more.pop("training", {} if method is None else {"steps": 7, "reached": True, "validation": 0.05})
        examples = {}
        for name, count, right in (("forget", FORGET, remembered), ("retain", RETAIN, retained)):
            examples[name] = {self.metric: [int(i < right) for i in range(count)], "nll": [nll] * count}
        metrics = {
            name: {figure: sum(values) / len(values) for figure, values in figures.items()}
            for name, figures in examples.items()
        }
        place = {"regime": regime, "method": method, "seed": seed, "quantizer": quantizer}
        cell = f"{len(self.results['rows']):024x}"
        seconds = {"score": 1.0, "unlearn": 30.0} if method else {"score": 1.0}
        found = {"half": half, "metrics": metrics, "examples": examples, "training": training, "seconds": seconds}
        self.results["rows"].append(place | found | {"cell": cell} | more)
        return self.results["rows"][-1]

    def audit(self, method, *, seed=0, regime="16bit", format="bnb-nf4", layers=2, **figures):
        of_layer = {key: _AUDIT[key] for key in ("code_overlap", "predicted_flip_share", "delivered_cosine")}
        entry = {"shipped_in": "16 bits", "lost_tensors": 0, "lost_layers": 0} | _AUDIT | figures
        entry["layers"] = [{"layer": f"model.layers.{i}"} | of_layer for i in range(layers)]
        self.results["audits"].append({"seed": seed, "regime": regime, "method": method, "formats": {format: entry}})

    def write(self, folder):
        path = folder / "RESULTS.json"
        path.write_text(json.dumps(self.results), encoding="utf-8")
        return path


@pytest.fixture
def make_results():
    return Results


@pytest.fixture
def small():
    """A: half of what it forgot comes back; B: nothing does; both retain everything."""
    made = Results()
    made.row(None, "none", 20, nll=0.25)
    made.row(None, "bnb-nf4", 16, nll=0.5)
    made.row("A", "none", 2, nll=2.5)
    made.row("A", "bnb-nf4", 9, nll=1.5)
    made.row("B", "none", 2, nll=2.5)
    made.row("B", "bnb-nf4", 2, nll=2.5)
    return made
