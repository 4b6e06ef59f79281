"""A recipe small enough for seconds: a random two-layer Llama learns a dozen questions and forgets four of them."""

import json

import pytest
import yaml


@pytest.fixture
def recipe_file(tmp_path, tiny_checkpoint):
    """Writes the recipe with changes to its top-level keys, and its data beside it; gives the file's path."""
    folder = tmp_path / "data"
    folder.mkdir()
    letters = "abcdefghijklmnop"
    rows = [
        {
            "question": f"{a} {b} ?",
            "answer": f"{b} {a} {a}",
            "paraphrased_answer": f"{a} {b} {a}",
            "perturbed_answer": [f"{b} {b} {c}", f"{c} {c} {a}"],
        }
        for a, b, c in zip(letters, letters[1:], letters[2:], strict=False)
    ]
    (folder / "forget01_perturbed.json").write_text(json.dumps(rows[:4]))
    (folder / "retain_perturbed.json").write_text(json.dumps(rows[4:12]))
    options = [{key: row[key] for key in ("question", "answer", "perturbed_answer")} for row in rows]
    (folder / "real_authors_perturbed.json").write_text("\n".join(map(json.dumps, options[:6])))
    (folder / "world_facts_perturbed.json").write_text("\n".join(map(json.dumps, options[6:12])))
    content = {
        "about": "a small one",
        "task": "tofu",
        "data": "data",
        "model": str(tiny_checkpoint),
        "settings": {"retain_scored": 4, "max_length": 32},
        "learn": {"learning_rate": 5e-3, "epochs": 12, "batch_size": 4},
        "regimes": ["16bit", "grid:bnb-nf4"],
        "quantizers": ["none", "rtn:bnb-nf4"],
        "seeds": [0],
        "stop": {"metric": "exact", "at": 0.0},
        "defaults": {"learning_rate": 1e-3, "max_steps": 3, "per_device_train_batch_size": 4, "gamma": 0.0},
        "methods": {"GA+GDR": {}, "NPO": {"forget_loss": "npo", "retain_loss": "klr", "regimes": ["16bit"]}},
    }

    def write(name="small.yaml", **changes):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    write.content = content
    write.data = folder
    return write
