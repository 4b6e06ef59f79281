"""The command line end to end on a tiny random model, each command in a process of its own."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quail.weights import deploy_weights_, deployed_linears
from quail_kernels import fake_quant

TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"


def quail(*args, timeout=180):
    command = [sys.executable, "-m", "quail", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    forget = [{"question": f"a b {i}?", "answer": "b c d"} for i in range(6)]
    (folder / "forget.json").write_text(json.dumps(forget))
    lines = [json.dumps({"prompt": f"c {i}", "completion": " d e"}) for i in range(8)]
    (folder / "retain.json").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def unlearned(tiny_checkpoint, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    args = ["--set", "max_steps=4", "--set", "learning_rate=1e-3", "--set", "per_device_train_batch_size=2"]
    done = quail(
        *("unlearn", "--model", tiny_checkpoint, "--forget", sets / "forget.json"),
        *("--retain", sets / "retain.json", "--out", out, *args),
    )
    assert done.returncode == 0, done.stderr
    return out


def test_unlearn_trains_on_the_weights_of_4_bits_unless_told_otherwise(unlearned, tiny_checkpoint, sets, tmp_path):
    """What it leaves stays what it is when it is quantized; with adapters it is not on the grid."""

    def on_grid(path):
        layers = deployed_linears(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)).values()
        return [torch.equal(fake_quant(layer.weight, "bnb-nf4"), layer.weight) for layer in layers]

    common = ("unlearn", "--model", tiny_checkpoint, "--forget", sets / "forget.json", "--set", "max_steps=1")
    done = quail(*common, "--lora-rank", 2, "--out", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    assert all(on_grid(unlearned)) and not any(on_grid(tmp_path / "lora"))
    assert "(no hinge)" in done.stdout and "grid" not in done.stderr
    told = quail(*common, "--set", "gamma=1", "--set", "fake_quant=ct-int4-sym@32", "--out", tmp_path / "told")
    assert told.returncode == 0 and ", passes on ct-int4-sym@32 weights)" in told.stdout, told.stderr


@pytest.mark.parametrize(
    ("shipped_in", "passes", "said"),
    [
        ("bnb-nf4", "bnb-nf4", None),
        ("gguf-q4_0", "gguf-q4_0", "lies on the grid of gguf-q4_0: training passes run on its weights"),
        ("ct-int4-sym@32", "bnb-nf4", "lies on the grid of a 4-bit recipe that cannot be told from its weights"),
    ],
)
def test_unlearn_trains_on_the_grid_that_the_weights_lie_on(shipped_in, passes, said, tiny_checkpoint, sets, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    deploy_weights_(model, shipped_in).save_pretrained(tmp_path / "shipped")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "shipped")
    unlearn = ("unlearn", "--model", tmp_path / "shipped", "--forget", sets / "forget.json", "--set", "max_steps=1")
    done = quail(*unlearn, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"passes on {passes} weights" in done.stdout
    assert said in done.stderr if said else "lies on" not in done.stderr
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert all(torch.equal(fake_quant(w.weight, passes), w.weight) for w in deployed_linears(saved).values())
    named = quail(*unlearn, "--out", tmp_path / "named", "--set", "fake_quant=bnb-fp4")
    assert "passes on bnb-fp4 weights" in named.stdout and "lies on" not in named.stderr


def test_unlearn_leaves_an_ordinary_checkpoint(unlearned):
    model = AutoModelForCausalLM.from_pretrained(unlearned)
    assert AutoTokenizer.from_pretrained(unlearned).eos_token_id == model.config.eos_token_id
    assert (unlearned / "model.safetensors").exists()
    assert not list(unlearned.parent.glob("out.*"))


@pytest.mark.parametrize(
    "options",
    [
        ("--lora-rank", 4),
        ("--set", "forget_loss=idk", "--set", "fake_quant=mixed", "--set", "fake_quant_on=forget"),
        ("--config", "recipe.yaml"),
    ],
    ids=("lora", "idk", "yaml"),
)
def test_every_method_leaves_an_ordinary_checkpoint(tiny_checkpoint, sets, tmp_path, options):
    recipe = "forget_loss: dpo\nretain_loss: klr\nmargin_mode: calibrated\nhinge_space: log_probs\nhinge_norm: label\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "saliency: neuron\nfloor_format: bnb-nf4\n")
    options = [tmp_path / option if option == "recipe.yaml" else option for option in options]
    done = quail(
        *("unlearn", "--model", tiny_checkpoint, "--forget", sets / "forget.json", "--out", tmp_path / "out"),
        *("--retain", sets / "retain.json", "--set", "max_steps=2", "--set", "per_device_train_batch_size=2", *options),
    )
    assert done.returncode == 0, done.stderr
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_checkpoint, tmp_path / "out")
    )
    assert before.keys() == after.keys() and any(not after[name].equal(w) for name, w in before.items())


def test_unlearn_says_what_storing_in_16_bits_undoes(tiny_checkpoint, sets, tmp_path):
    """Steps of 1e-6 are below half of a bf16 number's last place, and all but all of them are gone when it is saved."""
    before = tmp_path / "before"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).to(torch.bfloat16).save_pretrained(before)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(before)
    common = ("unlearn", "--model", before, "--forget", sets / "forget.json", "--retain", sets / "retain.json")
    small = ("--set", "max_steps=4", "--set", "learning_rate=1e-6", "--set", "fake_quant=null")
    nlls = {}
    for dtype in ("bfloat16", "float32"):
        done = quail(*common, *small, "--out", tmp_path / dtype, "--dtype", dtype)
        assert done.returncode == 0, done.stderr
        assert ("undoes" in done.stderr) is (dtype == "bfloat16"), done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("NLL")]
        assert len(line) <= 80
        nlls[dtype] = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    # Trained alike, from weights that are the same in both.
    assert nlls["bfloat16"][:2] == nlls["float32"][:2]
    assert nlls["float32"][1] == nlls["float32"][2]


def test_audit_counts_what_unlearning_moved(tiny_checkpoint, unlearned, tmp_path):
    done = quail("audit", tiny_checkpoint, unlearned, "--json", tmp_path / "audit.json")
    assert done.returncode == 0, done.stderr
    assert "bnb-nf4" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert json.loads((tmp_path / "audit.json").read_text())
    again = quail("audit", tiny_checkpoint, unlearned, "--json", tmp_path / "audit.json")
    assert again.returncode == 2 and "already exists" in again.stderr


def test_evaluate_scores_every_model_under_every_quantizer(tiny_checkpoint, unlearned, sets, tmp_path):
    done = quail(
        *("evaluate", tiny_checkpoint, unlearned, "--quantizers", "none,bnb-nf4,bnb-fp4"),
        *("--forget", sets / "forget.json", "--retain", sets / "retain.json", "--json", tmp_path / "e.json"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "e.json").read_text())
    assert len(results) == 6 and len([line for line in done.stdout.splitlines() if "bnb-" in line]) == 4
    plain = {r["model"]: r["forget"]["nll"] for r in results if r["quantizer"] == "none"}
    assert plain[str(unlearned)] > plain[str(tiny_checkpoint)]


def test_demo_runs_on_another_model_and_refuses_to_run_over_itself(tiny_checkpoint, tmp_path):
    done = quail("demo", "--model", tiny_checkpoint, "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert len(report["cells"]) == 21 and len(report["runs"]) == 5
    assert (tmp_path / "demo" / "report.md").read_text() in done.stdout
    again = quail("demo", "--model", tiny_checkpoint, "--out", tmp_path / "demo")
    assert again.returncode == 2 and "already holds something" in again.stderr
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report


def test_an_interrupted_demo_leaves_nothing(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "quail", "demo", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "demo")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "Loading the model\n"
    while not (tmp_path / "demo" / "learned").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130 and stderr.splitlines()[-1].startswith("quail: interrupted")
    assert not (tmp_path / "demo").exists()


@pytest.mark.skipif(not TOFU.is_dir(), reason="the TOFU set does not lie beside the checkout")
def test_unlearn_and_evaluate_on_tofu(tiny_checkpoint, tmp_path):
    sets = ("--forget", TOFU / "forget01_perturbed.json", "--retain", TOFU / "retain90.json")
    small = ("--set", "max_steps=2", "--set", "per_device_train_batch_size=2")
    done = quail("unlearn", "--model", tiny_checkpoint, *sets, "--out", tmp_path / "out", *small)
    assert done.returncode == 0 and "Unlearned 40 examples in 2 steps" in done.stdout, done.stderr
    done = quail("evaluate", tmp_path / "out", *sets, "--limit", 4, "--quantizers", "none,bnb-fp4")
    assert done.returncode == 0 and len([line for line in done.stdout.splitlines() if "out |" in line]) == 2


def bad_inputs(model, sets, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "broken.json").write_text('{"question": ')
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    forget, retain = sets / "forget.json", sets / "retain.json"
    unlearn = ("unlearn", "--model", model, "--retain", retain, "--out", tmp_path / "out")
    return {
        "unknown format": (("audit", model, model, "--formats", "int3"), "expected one of"),
        "no safetensors": (("audit", model, tmp_path / "pickled"), "safetensors"),
        "empty forget set": ((*unlearn, "--forget", tmp_path / "empty.json"), "at least one example"),
        "broken file": ((*unlearn, "--forget", tmp_path / "broken.json"), "expected a JSON array"),
        "missing file": ((*unlearn, "--forget", tmp_path / "none.json"), "No such file"),
        "unknown loss": ((*unlearn, "--forget", forget, "--set", "forget_loss=sgd"), "forget_loss"),
        "wrong type": ((*unlearn, "--forget", forget, "--set", "learning_rate=fast"), "learning_rate: expected float"),
        "no quantizer": (("evaluate", model, "--forget", forget, "--quantizers", ","), "expected one of"),
        "missing refusals": (
            (*unlearn, "--forget", forget, "--set", f"idk_answers={tmp_path}/none.txt"),
            "none.txt: expected a UTF-8 text file",
        ),
        "unknown floor": (
            (*unlearn, "--forget", forget, "--set", "floor_format=int3"),
            "floor_format: expected one of",
        ),
        "unknown field": ((*unlearn, "--forget", forget, "--set", "colour=red"), "colour"),
        "no such model": (("evaluate", tmp_path / "none", "--forget", forget), "expected"),
        "OUT taken": (
            ("unlearn", "--model", model, "--forget", forget, "--out", model),
            "already holds something",
        ),
        "unknown command": (("forget-me",), "invalid choice"),
    }


CASES = ("unknown format", "no safetensors", "empty forget set", "broken file", "missing file")
CASES += (
    "unknown loss",
    "wrong type",
    "no quantizer",
    "missing refusals",
    "unknown floor",
    "unknown field",
    "no such model",
    "OUT taken",
    "unknown command",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(case, tiny_checkpoint, sets, tmp_path):
    args, message = bad_inputs(tiny_checkpoint, sets, tmp_path)[case]
    done = quail(*args)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
