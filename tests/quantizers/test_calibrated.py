"""GPTQ and AWQ: what is refused without llm-compressor, its checkpoints here, and its results where it is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quail.quantizers import calibrated, deploy, quantized_layers
from quail.quantizers.compressor import ENVIRONMENT
from quail_kernels import dequantize, fake_quant, quantize

TEXTS = ["a b c d e f g: a, b. c d? " * 40, "Question: h i j k l m? Answer: n o p q r s t u v w x y z 0 1 2. " * 20]


@pytest.fixture
def packed(tiny_checkpoint, tmp_path):
    """The tiny model rounded to nearest in groups of 64, stored as compressed-tensors stores it."""
    folder = tmp_path / "packed"
    shutil.copytree(tiny_checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    stored = {name: p for name, p in load_file(folder / "model.safetensors").items()}
    for name in quantized_layers(model):
        w = stored.pop(f"{name}.weight").bfloat16()
        codes, scales = quantize(w, "ct-int4-sym@64")
        ones = torch.ones_like(scales)
        levels = dequantize(codes, ones, "ct-int4-sym@64", shape=w.shape, dtype=torch.float32)
        stored[f"{name}.weight_packed"] = pack_to_int32(levels.to(torch.int8), 4)
        stored[f"{name}.weight_scale"] = scales.view(len(w), -1).bfloat16()
        stored[f"{name}.weight_shape"] = torch.tensor(w.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    config["quantization_config"] = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_compressed_checkpoint_is_loaded_dequantized(tiny_checkpoint, packed):
    model, rounded = deploy(packed, "none"), deploy(tiny_checkpoint, "rtn:ct-int4-sym@64")
    got = dict(model.named_parameters())
    for name, p in rounded.named_parameters():
        assert got[name].dtype == torch.bfloat16 and torch.equal(got[name], p), name
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, rounded(input_ids=ids).logits)
    for quantizer in ("bnb-nf4", "gptq:ct-int4-sym@64"):
        with pytest.raises(ValueError, match=f"16 or 32 bits for {quantizer}; got compressed-tensors already"):
            deploy(packed, quantizer, calibration=TEXTS)


def test_without_compressed_tensors_it_is_said_what_to_install(packed, monkeypatch):
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    with pytest.raises(ValueError, match="packed: expected the library compressed-tensors .*; got none$"):
        deploy(packed, "none")


def test_without_the_library_it_is_said_what_to_install(tiny_checkpoint, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^awq:ct-int4-asym: expected llm-compressor .*{ENVIRONMENT}=.*; got none$"):
        deploy(tiny_checkpoint, "awq:ct-int4-asym", calibration=TEXTS)


@pytest.mark.parametrize("calibration", [None, [], "a b c"])
def test_calibration_is_texts(tiny_checkpoint, calibration):
    with pytest.raises(ValueError, match="^calibration: expected a sequence of texts for gptq:ct-int4-sym@64; got "):
        deploy(tiny_checkpoint, "gptq:ct-int4-sym@64", calibration=calibration)


def test_a_classifier_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="expected a causal language model; got AutoModelForSequenceClassification"):
        deploy(tiny_checkpoint, "gptq:ct-int4-sym", auto=AutoModelForSequenceClassification, calibration=TEXTS)


def test_what_the_other_environment_says_is_the_error(tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "no-python"))
    with pytest.raises(ValueError, match=f"^{ENVIRONMENT}: expected a Python; got .*No such file"):
        deploy(tiny_checkpoint, "gptq:ct-int4-sym", calibration=TEXTS)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2\necho the reason >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv(ENVIRONMENT, str(broken))
    with pytest.raises(ValueError, match="^gptq:ct-int4-sym: llm-compressor failed; got the reason$"):
        deploy(tiny_checkpoint, "gptq:ct-int4-sym", calibration=TEXTS)


def test_relative_paths_are_those_of_the_caller(tiny_checkpoint, packed, monkeypatch, tmp_path):
    """The other environment is a script that answers with a checkpoint of ours, if it finds what it was given."""
    answer = tmp_path / "python"
    answer.write_text(f'#!/bin/sh\n[ -e "$3/config.json" ] || exit 3\ncp -r {packed} "$4"\n')
    answer.chmod(0o755)
    shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, "./python")
    model, expected = deploy("plain", "gptq:ct-int4-sym@64", calibration=TEXTS), deploy(packed, "none")
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--format": "int3"}, "format: expected one of ct-int4-sym, ct-int4-asym"),
        ({"--format": "ct-int4-sym@"}, "llm-compressor"),
        ({"--calibration": "nothing.txt"}, "calibration: expected a text file; got nothing.txt"),
        ({"--windows": "0"}, "windows: expected at least 1; got 0"),
        ({"out": "."}, "out: expected a new or empty folder"),
        ({}, "gptq: expected llm-compressor (pip install llmcompressor); got"),
    ],
)
def test_the_command_refuses_in_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c")
    named = {"--method": "gptq", "--calibration": "text.txt"} | options
    out = named.pop("out", "new")
    code = calibrated.main([str(tiny_checkpoint), out, *(word for pair in named.items() for word in pair)])
    said = capsys.readouterr().err
    assert code == 2 and message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


llmcompressor = pytest.mark.skipif(
    not os.environ.get(ENVIRONMENT), reason=f"{ENVIRONMENT} names no environment with llm-compressor"
)


@llmcompressor
def test_gptq_stays_on_the_grid_and_keeps_more_of_the_outputs_than_rounding(tiny_checkpoint):
    plain = deploy(tiny_checkpoint, "none")
    model = deploy(tiny_checkpoint, "gptq:ct-int4-sym@64", calibration=TEXTS)
    layer = "model.layers.0.self_attn.q_proj"
    inputs = []
    handle = plain.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = torch.tensor([token for text in TEXTS for token in tokenizer(text).input_ids])
    with torch.no_grad():
        for piece in ids.split(128):
            plain(input_ids=piece[None])
    handle.remove()
    x = torch.cat([i.flatten(0, -2) for i in inputs])
    w = plain.get_submodule(layer).weight.detach()
    got = model.get_submodule(layer).weight.detach()
    _, scales = quantize(w, "ct-int4-sym@64")
    levels = got.float().view(len(w), -1, 64) / scales.view(len(w), -1, 1).float()
    assert (levels - levels.round()).abs().max() < 0.05 and -8 <= levels.round().min() and levels.round().max() <= 7
    rounded = fake_quant(w, "ct-int4-sym@64")
    assert not torch.equal(got, rounded)

    def error(values):
        return ((values.float() - w.float()) @ x.T).norm().item()

    assert error(got) < 0.9 * error(rounded)
    weights, plain_weights = dict(model.named_parameters()), dict(plain.named_parameters())
    quantized = {f"{name}.weight" for name in quantized_layers(plain)}
    assert all(torch.equal(weights[name], p) for name, p in plain_weights.items() if name not in quantized)


@llmcompressor
def test_awq_moves_scales_from_norms_into_weights(tiny_checkpoint):
    plain = deploy(tiny_checkpoint, "none")
    model = deploy(tiny_checkpoint, "awq:ct-int4-asym@64", calibration=TEXTS)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    first, second = plain.model.layers[0], model.model.layers[0]
    scale = first.input_layernorm.weight.detach().float() / second.input_layernorm.weight.float()
    assert scale.max() > 1.1 * scale.min()
    for part in ("q_proj", "k_proj", "v_proj"):
        w = first.self_attn.get_submodule(part).weight.detach().float() * scale
        got = second.self_attn.get_submodule(part).weight.detach().float()
        groups = w.view(len(w), -1, 64)
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
        # Half a step, and what bf16 takes from norm, product and scale.
        assert ((got - w).view_as(groups).abs().amax(-1) <= 0.6 * step).all()


@llmcompressor
def test_the_script_writes_an_ordinary_checkpoint(tiny_checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    command = [os.environ[ENVIRONMENT], "-m", "quail.quantizers.calibrated", tiny_checkpoint, tmp_path / "out"]
    command += ["--method", "gptq", "--format", "ct-int4-sym@32", "--calibration", tmp_path / "text.txt"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert again.returncode == 2 and "already holds something" in again.stderr
