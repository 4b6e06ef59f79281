"""What arrives in the layers' outputs, against outputs computed layer by layer and figures reckoned by hand."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from quail import audit
from quail.auditing import calibration
from quail.auditing.calibration import Inputs, OutputSums, figures_of, output_sums
from quail.auditing.figures import NotMeasured, OutputRow
from quail.auditing.gates import parse_gate
from quail.auditing.predictors import _spearman_of_resamples, predictors, rank_correlation
from quail_kernels import fake_quant, get_format

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
TEXT = "Question : a b c d . Answer : 1 2 3 , x y z ? " * 40
FORMATS = ("bnb-nf4", "ct-int4-sym@64", "minmax-int4")


def save(model, folder, tokenizer_of):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def moved(model, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pair(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    after = moved(LlamaForCausalLM.from_pretrained(tiny_checkpoint), 2e-3)
    return tiny_checkpoint, save(after, folder / "after", tiny_checkpoint)


@pytest.fixture(scope="module")
def report(pair):
    return audit(*pair, FORMATS, calibration=[TEXT], calibration_tokens=700)


def inputs_of(x):
    inputs = Inputs(x.shape[1])
    for rows in x.split(7):
        inputs.add(rows)
    inputs.close()
    return inputs


def sums_of(x, before, after, format):
    """``output_sums`` of whole matrices [out, in] in one block."""
    recipe = get_format(format)
    ranges = {"range_before": torch.aminmax(before), "range_after": torch.aminmax(after)}
    return output_sums(inputs_of(x), before.view(-1), after.view(-1), {format: recipe}, ranges)[format]


def test_signal_and_noise_of_a_layer_reckoned_by_hand():
    # Sixteen buckets of width 1 from 0 to 16, values in their middles: 0.5, 1.5, ... The ends of both matrices agree.
    before = torch.tensor([[0.0, 16.0], [3.25, 5.75]])
    after = torch.tensor([[0.0, 16.0], [4.25, 6.25]])
    # dW = [[0, 0], [1, 0.5]]; 3.25 -> 4.25 moves one bucket on, 5.75 -> 6.25 also one: D = [[0, 0], [1, 1]].
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, -1.0]])
    sums = sums_of(x, before, after, "minmax-int4")
    # dW x = 2, 2, 0.5 and D x = 2, 4, 0.
    assert sums.signal == 4 + 4 + 0.25
    assert sums.noise == 0 + 4 + 0.25
    assert sums.delivered == 4 + 16
    assert sums.product == 4 + 8 + 0
    # A whole step has no variance, half a step 1/4; the second input's squares add up to 17.
    assert sums.expected_noise == 0.25 * 17
    figures = figures_of([sums])
    assert figures.output_snr == 8.25 / 4.25
    assert figures.output_snr_db == pytest.approx(10 * math.log10(8.25 / 4.25))
    assert figures.output_snr_flip_law == 8.25 / 4.25
    assert figures.output_share == 12 / 8.25
    assert figures.output_cosine == pytest.approx(12 / math.sqrt(8.25 * 20))


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym@64", "gguf-q4_0", "minmax-int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("tokens", [60, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_and_many_are_what_the_outputs_show(format, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(96, 128, generator=generator).to(dtype)
    after = (before.float() + 0.01 * torch.randn(96, 128, generator=generator)).to(dtype)
    x = (torch.randn(tokens, 128, generator=generator) * torch.linspace(0.1, 3, 128)).to(dtype)
    inputs = inputs_of(x)
    assert (inputs._moment is None) == (tokens == 60)
    recipe = get_format(format)
    ranges = {"range_before": torch.aminmax(before), "range_after": torch.aminmax(after)}
    blocks = [(before[:32], after[:32]), (before[32:], after[32:])]
    sums = OutputSums()
    for a, b in blocks:
        sums += output_sums(inputs, a.reshape(-1), b.reshape(-1), {format: recipe}, ranges)[format]

    update = after.double() - before.double()
    delivered = fake_quant(after, format).double() - fake_quant(before, format).double()
    out, arrived = x.double() @ update.t(), x.double() @ delivered.t()
    assert sums.signal == pytest.approx(float(out.square().sum()), rel=1e-5)
    assert sums.noise == pytest.approx(float((arrived - out).square().sum()), rel=1e-5)
    assert sums.delivered == pytest.approx(float(arrived.square().sum()), rel=1e-5)
    assert sums.product == pytest.approx(float((arrived * out).sum()), rel=1e-4, abs=1e-5 * sums.signal)
    assert sums.noise > 0


def test_an_update_within_its_buckets_is_as_large_as_its_noise():
    generator = torch.Generator().manual_seed(0)
    before = fake_quant(torch.randn(64, 128, generator=generator).bfloat16(), "bnb-nf4")
    # What defines a scale stays where it is.
    keeps = before.float().view(-1, 64).abs() == before.float().view(-1, 64).abs().amax(1, keepdim=True)
    change = 0.01 * torch.randn(64, 128, generator=generator).masked_fill(keeps.view(64, 128), 0)
    after = (before.float() + change).bfloat16()
    assert torch.equal(fake_quant(after, "bnb-nf4"), before) and not torch.equal(after, before)
    for tokens in (50, 500):
        sums = sums_of(torch.randn(tokens, 128, generator=generator), before, after, "bnb-nf4")
        figures = figures_of([sums])
        assert sums.signal > 0 and sums.delivered == 0
        assert figures.output_snr == 1 and figures.output_snr_db == 0
        assert figures.output_cosine == figures.output_share == 0


@pytest.mark.parametrize(("format", "tolerance"), [("ct-int4-sym@64", 0.03), ("minmax-int4", 0.03), ("bnb-nf4", 0.10)])
@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_the_flip_law_foretells_the_noise_of_weights_that_lie_anywhere(format, tolerance, size):
    generator = torch.Generator().manual_seed(0)
    before = 0.02 * torch.randn(1024, 1024, generator=generator)
    change = size * torch.randn(1024, 1024, generator=generator)
    # Both on one grid: what defines a scale does not move.
    group = get_format(format).group_size or before.numel()
    rows = before.view(-1, group)
    keeps = (rows == rows.amax(1, keepdim=True)) | (rows == rows.amin(1, keepdim=True))
    after = before + change.masked_fill(keeps.view_as(before), 0)
    x = torch.randn(256, 1024, generator=generator) * torch.linspace(0.2, 2, 1024)
    figures = figures_of([sums_of(x, before, after, format)])
    assert figures.output_snr == pytest.approx(figures.output_snr_flip_law, rel=tolerance)
    assert figures.output_share == pytest.approx(1, abs=0.15)
    assert figures.output_snr < 0.3


def test_without_an_update_nothing_is_defined_and_a_whole_one_is_bounded():
    weight = torch.randn(4, 64)
    x = torch.randn(8, 64)
    nothing = figures_of([sums_of(x, weight, weight, "bnb-nf4")])
    assert nothing.output_snr is nothing.output_snr_db is nothing.output_cosine is nothing.output_share is None
    assert nothing.output_snr_median is nothing.output_snr_min is None
    before, after = (fake_quant(w, "bnb-nf4") for w in (weight, torch.randn(4, 64)))
    whole = figures_of([sums_of(x, before, after, "bnb-nf4")])
    assert whole.output_snr_db == 120 and whole.output_share == 1
    unheard = figures_of([OutputSums(signal=0.0, noise=1.0, delivered=1.0)])
    assert unheard.output_snr_db == -120 and unheard.output_cosine is None


def test_an_update_that_the_inputs_cancel_has_no_negative_energy():
    x = 1000 * torch.ones(200, 128)
    inputs, below = inputs_of(x), 0
    for seed in range(20):
        before = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed))
        change = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed + 100))
        after = before + (change - change.mean())
        a, b = inputs.images(after - before)
        below += bool((a * b).sum() < 0)
        sums = output_sums(inputs, before.view(-1), after.view(-1), {"bnb-nf4": get_format("bnb-nf4")}, {})["bnb-nf4"]
        assert sums.signal >= 0 and sums.noise >= 0
        figures_of([sums])
    assert below, "no case in which rounding leaves less than nothing"


def outputs_by_hand(model_class, before, after, texts, format, names):
    """(signal, noise) by weight, from the inputs that forward hooks see in the model as transformers loads it."""
    tokenizer = AutoTokenizer.from_pretrained(after)
    old, new = (model_class.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in (before, after))
    seen = {name: [] for name in names}
    for name in names:
        layer = new.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda _, args, out, name=name: seen[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in texts:
            new(**tokenizer(text, return_tensors="pt"))
    found = {}
    for name in names:
        w, w_after = old.get_parameter(name).detach(), new.get_parameter(name).detach()
        if isinstance(new, GPT2LMHeadModel):
            w, w_after = w.t().contiguous(), w_after.t().contiguous()
        x = torch.cat(seen[name]).double()
        update = w_after.double() - w.double()
        delivered = fake_quant(w_after, format).double() - fake_quant(w, format).double()
        out = x @ update.t()
        found[name] = float(out.square().sum()), float((x @ delivered.t() - out).square().sum())
    return found


def check_by_hand(report, by_hand, format):
    rows = {row.name: row.figures for row in report.calibration.tensors if row.format == format}
    assert rows.keys() == by_hand.keys()
    for name, (signal, noise) in by_hand.items():
        # The model reads batches, and one sequence after the other here: bf16 rounds otherwise.
        assert rows[name].signal == pytest.approx(signal, rel=0.02)
        assert rows[name].noise == pytest.approx(noise, rel=0.02)
    pooled = report.calibration.formats[format]
    assert pooled.output_snr == pytest.approx(
        sum(row.signal for row in rows.values()) / sum(row.noise for row in rows.values())
    )


TEXTS = ["a b c d e", "Question : 1 2 3 ?", "x y z , a b c d e f g", "Answer : 4 5 6 7 ."]


@pytest.mark.parametrize("format", ["bnb-nf4", "minmax-int4"])
def test_a_causal_model_is_measured_as_transformers_runs_it(pair, format):
    report = audit(*pair, [format], calibration=TEXTS)
    names = [row.name for row in report.tensors]
    assert len(names) == 14
    check_by_hand(report, outputs_by_hand(LlamaForCausalLM, *pair, TEXTS, format, names), format)
    assert report.calibration.sequences == 4
    assert report.calibration.not_measured == ()


def test_a_classifier_is_measured_with_its_pooler(tiny_checkpoint, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = BertConfig(vocab_size=64, num_labels=3, max_position_embeddings=64, pad_token_id=1, **sizes)
    model = BertForSequenceClassification(config)
    before = save(model, tmp_path / "before", tiny_checkpoint)
    after = save(moved(model, 2e-3), tmp_path / "after", tiny_checkpoint)
    report = audit(before, after, ["bnb-nf4"], calibration=TEXTS)
    names = [row.name for row in report.tensors]
    assert "bert.pooler.dense.weight" in names and "bert.encoder.layer.1.output.dense.weight" in names
    by_hand = outputs_by_hand(AutoModelForSequenceClassification, before, after, TEXTS, "bnb-nf4", names)
    check_by_hand(report, by_hand, "bnb-nf4")


def test_conv1d_is_measured_along_its_inputs(tiny_checkpoint, tmp_path):
    torch.manual_seed(0)
    special = dict(bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=64, **special))
    before = save(model, tmp_path / "before", tiny_checkpoint)
    after = save(moved(model, 2e-3), tmp_path / "after", tiny_checkpoint)
    report = audit(before, after, ["bnb-nf4"], calibration=TEXTS)
    names = [row.name for row in report.tensors]
    assert len(names) == 4
    check_by_hand(report, outputs_by_hand(GPT2LMHeadModel, before, after, TEXTS, "bnb-nf4", names), "bnb-nf4")


def test_an_adapter_is_measured_as_the_merged_model_is(pair, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: it makes the adapters")
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(pair[0])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    save(adapted.merge_and_unload(), tmp_path / "merged", pair[0])
    direct, through = (
        audit(pair[0], tmp_path / side, ["bnb-nf4"], calibration=TEXTS).calibration for side in ("adapter", "merged")
    )
    assert direct.formats["bnb-nf4"].output_snr == pytest.approx(through.formats["bnb-nf4"].output_snr, rel=0.02)
    untouched = [row for row in direct.tensors if "v_proj" in row.name]
    assert untouched and all(row.figures.output_snr is None for row in untouched)


def test_a_gguf_file_is_measured_as_what_transformers_reads_of_it(pair, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: it writes the files")
    from test_audit_sides import write_gguf

    path = write_gguf(LlamaForCausalLM.from_pretrained(pair[1]), tmp_path / "after.gguf", None)
    options = dict(formats=["bnb-nf4"], dtype="float32", calibration=TEXTS)
    direct, through = (audit(pair[0], after, **options).calibration for after in (path, pair[1]))
    assert direct == through


def test_nothing_is_written_where_there_is_no_terminal(pair, capfd):
    audit(*pair, ["bnb-nf4"], calibration=TEXTS)
    assert capfd.readouterr().err == ""


def test_blocks_and_workers_do_not_show(pair, report, monkeypatch):
    monkeypatch.setitem(audit.__globals__["_BLOCK_WEIGHTS"], "cpu", 1 << 10)
    again = audit(*pair, FORMATS, calibration=[TEXT], calibration_tokens=700, workers=3)
    for a, b in zip(report.calibration.tensors, again.calibration.tensors, strict=True):
        assert (a.name, a.format) == (b.name, b.format)
        assert a.figures.noise == pytest.approx(b.figures.noise, rel=1e-5)
        assert a.figures.output_snr_flip_law == pytest.approx(b.figures.output_snr_flip_law, rel=1e-5)


def test_layers_add_up_and_name_their_median_and_least(report):
    found = report.calibration
    assert found.tokens <= 700 and found.tokens > 500
    for format in FORMATS:
        rows = {row.name: row for row in found.layers if row.format == format}
        assert list(rows) == ["model.layers.0", "model.layers.1"]
        for layer, row in rows.items():
            tensors = [t.figures for t in found.tensors if t.format == format and t.layer == layer]
            snrs = sorted(figures.output_snr for figures in tensors)
            assert row.tensors == len(snrs) == 7
            assert (row.figures.output_snr_min, row.figures.output_snr_median) == (snrs[0], snrs[3])
            assert row.figures.output_snr == pytest.approx(
                sum(figures.signal for figures in tensors) / sum(figures.noise for figures in tensors)
            )


def test_json_has_it_only_where_it_was_asked_for(pair, report):
    read = json.loads(report.to_json())
    assert read["calibration"] == json.loads(json.dumps(asdict(report.calibration)))
    assert read["calibration"]["formats"]["bnb-nf4"]["output_snr"] == report.calibration.formats["bnb-nf4"].output_snr
    plain = audit(*pair, FORMATS)
    assert "calibration" not in json.loads(plain.to_json())
    assert plain.to_dict() == {key: value for key, value in report.to_dict().items() if key != "calibration"}
    assert "outputs" not in plain.to_markdown() and "outputs" not in plain.to_html()


def test_markdown_has_the_best_predictor_first_then_the_outputs_and_fits_a_terminal(report):
    lines = report.to_markdown().splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith(("- BEFORE", "- AFTER"))] == []
    tables = [line for line in lines if line.startswith("| recipe")]
    assert [cell.strip() for cell in tables[0].split("|")][1:3] == ["recipe", "cosine"]
    cosine = report.formats["bnb-nf4"].figures.delivered_cosine
    assert f"{cosine:.2g}" == lines[lines.index(tables[0]) + 2].split("|")[2].strip()
    assert "SNR" in tables[1] and "cosine" in tables[1]
    headings = re.findall("<h2>(.*?)</h2>", report.to_html())
    assert headings[:2] == ["By recipe", "The update in the layers' outputs"]
    by_layer = next(i for i, line in enumerate(lines) if line.startswith("| layer"))
    figures = next(row.figures for row in report.calibration.layers if row.format == "bnb-nf4")
    shown = f"{10 * math.log10(figures.output_snr_median):.1f}/{10 * math.log10(figures.output_snr_min):.1f}"
    assert shown in lines[by_layer + 2]


def test_markdown_of_many_layers_lists_those_with_the_least(report):
    layers, formats = [], {}
    for format in ("bnb-nf4", "bnb-fp4", "ct-int4-sym@128", "minmax-int4", "gguf-q4_0"):
        figures = report.calibration.formats["bnb-nf4"]
        formats[format] = figures
        for i in range(30):
            here = replace(figures, output_snr_median=1.0, output_snr_min=1e-12, output_cosine=1 / (i + 1))
            layers.append(OutputRow(f"transformer.encoder.layers.{i}", f"layers.{i}", "", format, 7, here))
    not_measured = tuple(NotMeasured(f"model.layers.{i}.mlp.experts", "no linear layer has it") for i in range(9))
    found = replace(report.calibration, formats=formats, layers=tuple(layers), not_measured=not_measured)
    lines = replace(report, calibration=found, formats={}).to_markdown().splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith(("- BEFORE", "- AFTER"))] == []
    by_layer = next(i for i, line in enumerate(lines) if line.startswith("| layer"))
    names = [line.split("|")[1].strip() for line in lines[by_layer + 2 :][:8]]
    assert [name[-3:] for name in names] == [f".{i}" for i in range(29, 21, -1)]
    assert "the 8 layers with the least cosine, of 30:" in " ".join(lines[by_layer - 3 : by_layer])
    assert "lost/-120.0" in lines[by_layer + 2]
    assert any("9 tensors" in line for line in lines)


def test_the_page_has_a_cell_a_tensor_and_says_lost(pair, report, tmp_path):
    page = report.to_html()
    first, *_ = page.partition(escape(report.verdict))
    assert "layers' outputs" in first and first.count(" dB</td>") == 4 * len(FORMATS)
    assert page.count("\nSNR ") == 14 * len(FORMATS)
    assert "lost</td>" not in page
    model = LlamaForCausalLM.from_pretrained(pair[0]).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(fake_quant(parameter, "bnb-nf4"))
    before = save(model, tmp_path / "before", pair[0])
    after = save(moved(model, 1e-5), tmp_path / "after", pair[0])
    lost = audit(before, after, ["bnb-nf4"], calibration=[TEXT])
    figures = lost.calibration.formats["bnb-nf4"]
    assert figures.output_snr == 1 and figures.output_share == 0
    # The cosine of the weights; a cell a tensor; of all the SNR, the median and the least.
    assert lost.to_html().count("lost</td>") == 1 + 14 + 3
    assert lost.to_markdown().count("| lost/lost |") == 2


def test_a_gate_may_ask_for_the_outputs(report, pair):
    snr = report.calibration.formats["bnb-nf4"].output_snr
    assert snr < 10
    lines = parse_gate("bnb-nf4:output_snr<10", FORMATS).failures(report)
    assert lines == [f"bnb-nf4: output_snr {snr:.6g} < 10"]
    assert parse_gate("output_share<0.01", FORMATS).failures(report) == []
    with pytest.raises(ValueError, match="^fail-if: expected a calibration for output_snr; got none$"):
        parse_gate("output_snr<1", FORMATS, calibrated=False)


def test_the_command_line_measures_a_set(pair, tmp_path):
    rows = [{"question": "a b c ?", "answer": "d e f ."}, {"question": "x y ?", "answer": "1 2 3 4 ."}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "quail", "audit", *map(str, pair), "--formats", "bnb-nf4"]
    command += ["--calibration", tmp_path / "set.json", "--calibration-tokens", "100"]
    command += ["--fail-if", "output_snr_median<1000", "--json", tmp_path / "audit.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "output_snr_median" in done.stderr
    assert "set.json" in done.stdout and "2 sequences" not in done.stderr
    assert json.loads((tmp_path / "audit.json").read_text())["calibration"]["sequences"] == 2


def test_what_is_done_is_kept_with_its_outputs(pair, tmp_path, monkeypatch):
    options = dict(formats=["bnb-nf4"], calibration=TEXTS)
    run = audit.__globals__["_Run"]
    compare, names = run._compare, []

    def stop_after_five(self, pair):
        if len(names) == 5:
            raise KeyboardInterrupt
        names.append(pair.name)
        return compare(self, pair)

    monkeypatch.setattr(run, "_compare", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        audit(*pair, **options, workers=1, resume=tmp_path / "done")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="with these checkpoints and arguments"):
        audit(*pair, formats=["bnb-nf4"], calibration=TEXTS[:2], resume=tmp_path / "done")
    resumed = audit(*pair, **options, workers=1, resume=tmp_path / "done")
    assert resumed == audit(*pair, **options, workers=1)
    assert len(resumed.calibration.tensors) == 14


def refuse(*arguments, **options):
    with pytest.raises(ValueError) as error:
        audit(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and "got" in message
    return message


def test_bad_calibrations_are_one_line(pair, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    assert "absent.txt" in refuse(*pair, calibration=tmp_path / "absent.txt")
    assert "bytes.txt" in refuse(*pair, calibration=tmp_path / "bytes.txt")
    assert "holds none" in refuse(*pair, calibration=tmp_path / "empty.txt")
    assert "holds none" in refuse(*pair, calibration=[])
    assert "calibration_tokens" in refuse(*pair, calibration=TEXTS, calibration_tokens=0)
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(pair[0]).save_pretrained(bare)
    assert "tokenizer" in refuse(bare, bare, calibration=TEXTS)
    assert audit(pair[0], bare, ["bnb-nf4"], calibration=TEXTS).calibration.sequences == 4
    (bare / "config.json").unlink()
    assert "configuration" in refuse(bare, bare, calibration=TEXTS)
    config = dict(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    small = save(LlamaForCausalLM(LlamaForCausalLM.config_class(**config)), tmp_path / "small", pair[0])
    assert "model's 8 tokens" in refuse(small, small, calibration=TEXTS)


def test_a_model_that_lacks_weights_is_not_run(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(LlamaForCausalLM.from_pretrained(pair[0]), tmp_path / "after", pair[0])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refuse(pair[0], folder, calibration=TEXTS)


def test_tokens_are_spread_over_the_text_and_no_more_than_asked_for():
    windows = [[i] * 10 for i in range(100)]
    kept = calibration._spread(windows, 200)
    assert len(kept) == 20
    assert [ids[0] for ids in kept] == list(range(4, 100, 5))
    assert calibration._spread(windows, 5) == [[0] * 5]
    assert calibration._spread(windows, 1000) == windows
    batches = list(calibration.Sequences("", [[1, 2], [3], [4, 5], [6, 7, 8]]).batches())
    assert [batch.tolist() for batch in batches] == [[[6, 7, 8]], [[1, 2], [4, 5]], [[3]]]


def test_layers_that_read_one_tensor_share_it(pair):
    from contextlib import ExitStack

    with ExitStack() as resources:
        after = audit.__globals__["_open"]("AFTER", pair[1], resources)
        model = calibration.load_model(after, torch.bfloat16, torch.device("cpu"))
    shapes = {f"{name}.weight": tuple(m.weight.shape) for name, m in model.named_modules() if "proj" in name}
    sequences = calibration.encode_texts("", [TEXT], [pair[0]], model, 600)
    found, not_measured = calibration.read_inputs(model, sequences, shapes)
    assert not_measured == () and found.keys() == shapes.keys()
    layer = "model.layers.0"
    q, k, v = (found[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
    assert q is k is v and q is not found[f"{layer}.self_attn.o_proj.weight"]
    assert found[f"{layer}.mlp.gate_proj.weight"] is found[f"{layer}.mlp.up_proj.weight"]
    assert all(inputs.tokens == sequences.tokens for inputs in found.values())
    # No more is kept than a layer is wide, whatever the text.
    assert all(tuple(inputs._moment.shape) == (128, 128) and inputs._rows == [] for inputs in found.values())


def test_memory_does_not_grow_with_the_text(tmp_path):
    code = (
        "import re, sys, torch; from pathlib import Path; from quail.auditing.calibration import Inputs\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) << 10\n"
        "inputs = Inputs(512); x = torch.randn(2048, 512)\n"
        "inputs.add(x); start = peak()\n"
        "for _ in range(60): inputs.add(x)\n"
        "print(peak() - start, inputs.tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    grown, tokens = map(int, done.stdout.split())
    # The tokens themselves would be 240 MiB.
    assert tokens == 61 * 2048 and grown < 32 << 20, grown


def test_predictors_agree_on_what_comes_back(pair, report, tmp_path):
    model = LlamaForCausalLM.from_pretrained(pair[0]).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(fake_quant(parameter, "bnb-nf4"))
    before = save(model, tmp_path / "before", pair[0])
    after = save(moved(model, 1e-5), tmp_path / "after", pair[0])
    lost = predictors(audit(before, after, ["bnb-nf4"], calibration=[TEXT]), "bnb-nf4")
    sent = predictors(report, "bnb-nf4")
    large = moved(LlamaForCausalLM.from_pretrained(pair[0]), 0.3)
    large = predictors(
        audit(pair[0], save(large, tmp_path / "large", pair[0]), ["bnb-nf4"], calibration=[TEXT]), "bnb-nf4"
    )
    assert lost.keys() == sent.keys() == large.keys()
    # Nothing arrives, all of it in the mean, all of it: the more arrives, the less comes back.
    for name in ("code_overlap", "value_overlap", "delivered_cosine", "output_cosine", "output_snr_delivered"):
        assert lost[name] > sent[name] > large[name], name
    assert lost["flip_law_deficit"] == 1 and abs(sent["flip_law_deficit"]) < 0.1
    # What the docstring says of it: 0 dB is an update that is lost, and less one that arrives inside noise.
    assert lost["output_snr"] == 0 < sent["output_snr"] and large["output_snr"] < 0
    assert all(math.isfinite(value) for found in (lost, sent, large) for value in found.values())
    weights_only = predictors(audit(*pair, ["bnb-nf4"]), "bnb-nf4")
    assert weights_only.keys() == {name for name in sent if not name.startswith("output")}
    with pytest.raises(ValueError, match="expected one with figures, bnb-nf4.*got 'gguf-q4_0'"):
        predictors(report, "gguf-q4_0")
    with pytest.raises(ValueError, match="changes none"):
        predictors(audit(pair[0], pair[0], ["bnb-nf4"]), "bnb-nf4")


def test_rank_correlation_is_that_of_scipy_with_an_interval_that_holds_it():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator).double()
    y = x + torch.randn(40, generator=generator)
    x = (2 * x).round()  # ties
    found = rank_correlation(x.tolist(), y.tolist(), resamples=2000)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic)
    assert -1 < found.low < found.rho < found.high < 1
    assert (found.cells, found.clusters) == (40, 40)
    assert found == rank_correlation(x.tolist(), y.tolist(), resamples=2000)
    drawn = _spearman_of_resamples(x.numpy(), y.numpy(), np.array([[2, 0, 1, 3] * 10, [1] * 40, [40] + [0] * 39]))
    copies = torch.tensor([2, 0, 1, 3] * 10)
    repeated = spearmanr(x.repeat_interleave(copies), y.repeat_interleave(copies)).statistic
    assert drawn[:2] == pytest.approx([repeated, found.rho]) and math.isnan(drawn[2])
    perfect = rank_correlation([1, 2, 3, 4], [10, 20, 30, 50])
    assert (perfect.rho, perfect.low, perfect.high) == (pytest.approx(1),) * 3
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]).rho)


def test_copies_of_a_cluster_do_not_narrow_the_interval():
    x, y = [1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 4, 3, 8, 5, 7, 6]
    alone = rank_correlation(x, y, resamples=2000)
    copies = rank_correlation(x * 5, y * 5, clusters=[*range(8)] * 5, resamples=2000)
    naive = rank_correlation(x * 5, y * 5, resamples=2000)
    assert (copies.cells, copies.clusters) == (40, 8)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert naive.high - naive.low < 0.7 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (([1, 2], [1, 2]), {}, "predicted, recovery"),
        (([1, 2, 3], [1, 2]), {}, "predicted, recovery"),
        (([1, 2, math.nan], [1, 2, 3]), {}, "predicted, recovery"),
        (([1, 2, 3], [1, 2, 3]), {"level": 1.5}, "level"),
        (([1, 2, 3], [1, 2, 3]), {"resamples": 0}, "resamples"),
        (([1, 2, 3], [1, 2, 3]), {"clusters": [1]}, "clusters"),
    ],
)
def test_correlations_that_cannot_be_are_refused(arguments, options, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: expected .*; got "):
        rank_correlation(*arguments, **options)
