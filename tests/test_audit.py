"""The audit on tiny random models, against figures computed tensor by tensor from the state dicts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from quail import audit
from quail.auditing.figures import IN_4_BITS, IN_16_BITS, ON_GRID
from quail_kernels import bucket_compare, fake_quant

FORMATS = ("bnb-nf4", "bnb-fp4", "ct-int4-sym", "minmax-int4")
LLAMA = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ON_DISK = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DOWN = "model.layers.1.mlp.down_proj.weight"


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=4, tie_word_embeddings=tied))


def gpt2():
    torch.manual_seed(0)
    special = dict(bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32, **special))


def update(model, size, only="", seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def quantized(model):
    """The names of a Llama's weights that bitsandbytes quantizes."""
    return sorted(f"{name}.weight" for name, _ in model.named_modules() if name.endswith(LINEAR))


def refuse(before, after, **options):
    with pytest.raises(ValueError) as error:
        audit(before, after, **options)
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message and "got" in message
    return message


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    llama().save_pretrained(folder / "before")
    update(llama(), 1e-3).save_pretrained(folder / "after")
    return folder / "before", folder / "after"


@pytest.fixture(scope="module")
def report(checkpoints):
    return audit(*checkpoints)


@pytest.fixture
def edited(tmp_path, checkpoints):
    """A copy of AFTER whose tensors went through a function."""

    def edit(change, config=True):
        tensors = load_file(checkpoints[1] / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        if config:
            (tmp_path / "config.json").write_bytes((checkpoints[1] / "config.json").read_bytes())
        return tmp_path

    return edit


def test_identical_checkpoints_overlap_exactly(checkpoints):
    report = audit(checkpoints[0], checkpoints[0])
    for row in report.formats.values():
        assert row.figures.changed == 0
        assert row.figures.code_overlap == row.figures.value_overlap == 1
        assert row.figures.code_overlap_before_grid == row.figures.value_overlap_before_grid == 1
        assert row.figures.predicted_flip_share == row.figures.max_abs_change == 0
        assert row.figures.share_below_half_step == 1
    assert "equal wherever" in report.verdict


@pytest.mark.parametrize("format", FORMATS)
def test_totals_are_those_of_a_direct_comparison(report, format):
    before, after = llama(), update(llama(), 1e-3)
    group = 128 if format == "ct-int4-sym" else 1
    names = [name for name in quantized(before) if before.get_parameter(name).shape[1] % group == 0]
    rows = {row.name: row.figures for row in report.tensors if row.format == format}
    assert sorted(rows) == names

    weights = same = same_before = 0
    moved = 0.0
    for name in names:
        w_before, w_after = (model.get_parameter(name).detach().bfloat16() for model in (before, after))
        own = bucket_compare(w_before, w_after, format)
        fixed = bucket_compare(w_before, w_after, format, scales="before")
        assert rows[name].same_code == int(own.same_code)
        assert rows[name].weights == w_before.numel()
        weights += w_before.numel()
        same += int(own.same_code)
        same_before += int(fixed.same_code)
        moved += float((w_after.double() - w_before.double()).abs().sum())
    total = report.formats[format].figures
    assert 0 < same < weights
    assert (total.weights, total.same_code, total.changed) == (weights, same, weights - same)
    assert total.code_overlap == pytest.approx(same / weights, rel=1e-12)
    assert total.code_overlap_before_grid == pytest.approx(same_before / weights, rel=1e-12)
    assert total.mean_abs_change == pytest.approx(moved / weights, rel=1e-6)


def test_what_stays_in_full_precision_is_listed_with_its_change(report):
    rows = {row.name: row for row in report.unquantized}
    assert len(rows) == 7
    assert "embedding" in rows["model.embed_tokens.weight"].reason
    assert "output head" in rows["lm_head.weight"].reason
    assert "norm" in rows["model.layers.0.input_layernorm.weight"].reason
    before, after = (m.lm_head.weight.detach().bfloat16().float() for m in (llama(), update(llama(), 1e-3)))
    change = rows["lm_head.weight"].change
    distance = (after - before).abs()
    assert change.changed == int((distance != 0).sum())
    assert change.mean_abs == pytest.approx(float(distance.double().mean()), rel=1e-6)
    assert change.max_abs == float(distance.max())


def test_an_update_in_the_embedding_alone_changes_no_code_and_survives(checkpoints, tmp_path):
    update(llama(), 1e-2, only="embed_tokens").save_pretrained(tmp_path)
    report = audit(checkpoints[0], tmp_path)
    assert all(row.figures.changed == 0 for row in report.formats.values())
    assert [row.name for row in report.unquantized if row.change.changed] == ["model.embed_tokens.weight"]
    assert "1 changed tensors stay in full precision" in report.verdict


def test_every_tensor_is_in_the_report(report):
    stored = set(llama().state_dict())
    left_out = {row.name for row in report.not_compared}
    assert {row.name for row in report.tensors} | left_out == stored
    per_format = {(row.name, row.format) for row in report.tensors}
    per_format |= {(row.name, row.format) for row in report.not_compared if row.format}
    assert per_format == {(name, format) for name in quantized(llama()) for format in FORMATS}


def test_a_group_that_does_not_divide_leaves_the_other_formats_alone(report):
    skipped = [row for row in report.not_compared if row.format]
    assert {row.format for row in skipped} == {"ct-int4-sym"}
    assert {row.reason for row in skipped} == {"group 128 does not divide 64"}
    assert report.formats["ct-int4-sym"].tensors == 2
    assert all(report.formats[name].tensors == 14 for name in ("bnb-nf4", "bnb-fp4", "minmax-int4"))


def test_a_format_without_a_single_tensor_has_no_figures(tmp_path):
    gpt2().save_pretrained(tmp_path)
    report = audit(tmp_path, tmp_path, ("bnb-nf4", "ct-int4-sym@1024"))
    assert report.formats["ct-int4-sym@1024"].figures is None
    assert "| ct-int4-sym@1024 |       0 |" in report.to_markdown()
    json.loads(report.to_json())
    assert "does not divide" in refuse(tmp_path, tmp_path, formats=["ct-int4-sym@1024"])


def test_sharded_and_whole_give_one_report(checkpoints, report, tmp_path):
    llama().save_pretrained(tmp_path / "before", max_shard_size="100KB")
    update(llama(), 1e-3).save_pretrained(tmp_path / "after", max_shard_size="60KB")
    shards = [len(list((tmp_path / side).glob("*.safetensors"))) for side in ("before", "after")]
    assert 1 < shards[0] < shards[1]
    sharded = audit(tmp_path / "before", tmp_path / "after").to_dict()
    assert sharded | {"before": "", "after": ""} == report.to_dict() | {"before": "", "after": ""}


def test_conv1d_is_compared_as_deployments_store_it(tmp_path):
    gpt2().save_pretrained(tmp_path / "before")
    update(gpt2(), 1e-3).save_pretrained(tmp_path / "after")
    report = audit(tmp_path / "before", tmp_path / "after", ["bnb-nf4"])
    name = "transformer.h.0.attn.c_attn.weight"
    w_before, w_after = (m.get_parameter(name).detach().bfloat16().t() for m in (gpt2(), update(gpt2(), 1e-3)))
    row = next(row for row in report.tensors if row.name == name)
    assert row.figures.same_code == int(bucket_compare(w_before, w_after, "bnb-nf4").same_code)
    assert len(report.tensors) == 4
    assert {row.name for row in report.unquantized} >= {"transformer.wte.weight", "transformer.wpe.weight"}


def test_a_bare_backbone_is_known_without_its_prefix(tmp_path):
    gpt2().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    report = audit(tmp_path, tmp_path, ["bnb-nf4"])
    assert [row.name for row in report.tensors if "c_fc" in row.name] == ["h.0.mlp.c_fc.weight"]
    assert report.selected_by == "transformers' GPT2LMHeadModel"


def test_without_a_config_the_names_decide(edited, checkpoints, report):
    folder = edited(lambda tensors: None, config=False)
    by_name = audit(folder, folder)
    assert by_name.selected_by.startswith("names")
    assert {row.name for row in by_name.tensors} == {row.name for row in report.tensors}
    mixed = audit(checkpoints[0], edited(lambda t: None, config=False))
    assert mixed.formats == report.formats


def test_a_tied_head_is_compared_with_the_embedding_that_it_shares(checkpoints, tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    report = audit(checkpoints[0], tmp_path)
    head = next(row for row in report.unquantized if row.name == "lm_head.weight")
    shared, own = llama(tied=True).model.embed_tokens.weight, llama().lm_head.weight
    moved = (shared.detach().bfloat16().float() - own.detach().bfloat16().float()).abs()
    assert head.change.max_abs == float(moved.max()) > 0
    assert report.formats["bnb-nf4"].tensors == 14


def test_a_head_that_no_model_shares_is_missing(checkpoints, edited):
    report = audit(checkpoints[0], edited(lambda tensors: tensors.pop("lm_head.weight")), ["bnb-nf4"])
    assert [row.reason for row in report.not_compared if row.name == "lm_head.weight"] == ["only in BEFORE"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_on_the_grid_is_told_from_one_in_16_bits(tmp_path, checkpoints, report, format, dtype):
    assert report.formats[format].shipped_in == IN_16_BITS
    model = llama()
    with torch.no_grad():
        for name in quantized(model):
            w = model.get_parameter(name)
            group = "@64" if format == "ct-int4-sym" else ""
            w.copy_(fake_quant(w.bfloat16(), format + group))
    model.to(dtype).save_pretrained(tmp_path / "before")
    # The narrowest bucket, FP4's zero, ends at 0.0026 of a block's largest weight: this update ends before.
    update(model, 1e-5).save_pretrained(tmp_path / "after")
    shipped = audit(tmp_path / "before", tmp_path / "after", [format])
    figures = shipped.formats[format].figures
    if format.startswith("bnb"):
        assert shipped.formats[format].shipped_in == ON_GRID
        assert figures.on_grid_share == 1
        assert figures.code_overlap_before_grid == 1
        assert figures.predicted_flip_share > 0
        assert "shipped in this recipe" in shipped.verdict
    else:
        assert shipped.formats[format].shipped_in == IN_4_BITS
        assert figures.changed_share < figures.predicted_flip_share
    other = "bnb-nf4" if format == "bnb-fp4" else "bnb-fp4"
    assert audit(tmp_path / "before", tmp_path / "after", [other]).formats[other].shipped_in == IN_4_BITS


def test_pruned_weights_are_no_grid(tmp_path):
    model = llama()
    with torch.no_grad():
        for name in quantized(model):
            w = model.get_parameter(name)
            w[w.abs() < w.abs().quantile(0.6)] = 0
    model.save_pretrained(tmp_path)
    assert audit(tmp_path, tmp_path, ["bnb-nf4"]).formats["bnb-nf4"].shipped_in == IN_16_BITS


@pytest.mark.parametrize(
    ("before", "after", "asked", "expected"),
    [
        (torch.float32, torch.float32, None, "bfloat16"),
        (torch.float32, torch.float16, None, "float16"),
        (torch.bfloat16, torch.float32, None, "bfloat16"),
        (torch.float16, torch.float32, None, "float16"),
        (torch.bfloat16, torch.float16, None, "float16"),
        (torch.float32, torch.float32, torch.float32, "float32"),
        (torch.float32, torch.bfloat16, "float16", "float16"),
    ],
)
def test_both_sides_are_cast_to_the_dtype_of_the_deployment(tmp_path, before, after, asked, expected):
    llama().to(before).save_pretrained(tmp_path / "before")
    update(llama(), 1e-3).to(after).save_pretrained(tmp_path / "after")
    report = audit(tmp_path / "before", tmp_path / "after", ["bnb-nf4"], dtype=asked)
    assert report.dtype == expected
    assert report.stored_before == (ON_DISK[before],)
    w_before, w_after = llama().get_parameter(DOWN), update(llama(), 1e-3).get_parameter(DOWN)
    dtype = getattr(torch, expected)
    direct = bucket_compare(w_before.to(before).to(dtype), w_after.to(after).to(dtype), "bnb-nf4")
    row = next(row for row in report.tensors if row.name == DOWN)
    assert row.figures.same_code == int(direct.same_code)


def test_an_update_lost_in_the_cast_is_said_to_be(checkpoints, tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert "lost in the cast to bfloat16" in audit(checkpoints[0], tmp_path).verdict


def test_a_wrong_shape_or_a_broken_weight_is_a_row_and_the_rest_goes_on(checkpoints, edited):
    q, v = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"

    def change(tensors):
        tensors[DOWN] = tensors[DOWN][:, :64].clone()
        tensors[q][3, 5] = float("nan")
        tensors[v][0, 0] = float("-inf")
        tensors["model.norm.weight"][0] = float("nan")
        tensors["extra.weight"] = torch.ones(4, 4)
        del tensors["model.layers.0.mlp.up_proj.weight"]

    report = audit(checkpoints[0], edited(change), ["bnb-nf4"])
    reasons = {row.name: row.reason for row in report.not_compared}
    assert reasons[DOWN] == "shape [64, 128] in BEFORE, [64, 64] in AFTER"
    assert reasons[q] == reasons[v] == "NaN or infinity in AFTER as bfloat16"
    assert "NaN or infinity" in reasons["model.norm.weight"]
    assert reasons["extra.weight"] == "only in AFTER"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "only in BEFORE"
    assert report.formats["bnb-nf4"].tensors == 10
    json.loads(report.to_json())


def test_a_weight_that_overflows_in_fp16_is_left_out(checkpoints, edited):
    report = audit(checkpoints[0], edited(lambda t: t[DOWN].fill_(1e6)), ["bnb-nf4"], dtype="float16")
    assert [row.reason for row in report.not_compared if row.name == DOWN] == ["NaN or infinity in AFTER as float16"]


def test_json_is_valid_and_complete(report):
    read = json.loads(report.to_json())
    assert read["schema"] == 2
    assert list(read["formats"]) == list(FORMATS)
    assert len(read["tensors"]) == len(report.tensors) and len(read["not_compared"]) == len(report.not_compared)
    assert read["formats"]["bnb-nf4"]["figures"]["changed"] == report.formats["bnb-nf4"].figures.changed
    assert read["verdict"] == report.verdict


def test_markdown_fits_a_terminal(report):
    lines = report.to_markdown().splitlines()
    assert report._repr_markdown_() == report.to_markdown()
    assert [line for line in lines if len(line) > 80 and not line.startswith(("- BEFORE", "- AFTER"))] == []
    for recipe in ("bnb-nf4@64", "bnb-fp4@64", "ct-int4-sym@128", "minmax-int4"):
        assert sum(line.startswith(f"| {recipe} ") for line in lines) == 3


def test_the_bar_stays_away_where_there_is_no_terminal(checkpoints, capfd):
    audit(*checkpoints, ["bnb-nf4"])
    assert capfd.readouterr().err == ""


def test_unknown_requests_are_refused(checkpoints):
    assert "int4-magic" in refuse(*checkpoints, formats=["int4-magic"])
    assert "none" in refuse(*checkpoints, formats=[])
    assert "int8" in refuse(*checkpoints, dtype="int8")


def test_two_architectures_have_nothing_in_common(checkpoints, tmp_path):
    gpt2().save_pretrained(tmp_path)
    message = refuse(checkpoints[0], tmp_path)
    assert message.startswith("AFTER:") and "lm_head.weight" in message and "transformer.h.0" in message


def test_shapes_that_differ_everywhere_are_refused(checkpoints, tmp_path):
    LlamaForCausalLM(LlamaConfig(**LLAMA | dict(hidden_size=32, intermediate_size=64))).save_pretrained(tmp_path)
    assert "shape [" in refuse(checkpoints[0], tmp_path)


@pytest.mark.parametrize(
    ("files", "got"),
    [((), "an empty folder"), (("config.json", "pytorch_model.bin"), "pytorch_model.bin")],
)
def test_a_folder_without_safetensors_is_refused(checkpoints, tmp_path, files, got):
    for name in files:
        (tmp_path / name).touch()
    assert refuse(tmp_path, checkpoints[1]).endswith(f"got {got}")


def test_what_is_neither_folder_nor_model_is_refused(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no/such" in refuse("no/such", checkpoints[1])
    assert str(tmp_path / "nowhere") in refuse(checkpoints[0], tmp_path / "nowhere")
    assert "the file" in refuse(checkpoints[0] / "model.safetensors", checkpoints[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_checkpoint_is_refused(checkpoints, edited, dtype):
    def change(tensors):
        tensors[DOWN] = tensors[DOWN].to(dtype)

    message = refuse(checkpoints[0], edited(change))
    assert message.startswith("AFTER:") and DOWN in message and "quantized" in message


def test_a_truncated_file_is_refused(checkpoints, edited):
    folder = edited(lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "readable model.safetensors" in refuse(checkpoints[0], folder)


@pytest.mark.parametrize(
    ("index", "got"),
    [
        ('{"weight_map": {"a.weight": "../before/model.safetensors"}}', "../before/model.safetensors"),
        ('{"weight_map": {"a.weight": "/etc/passwd.safetensors"}}', "/etc/passwd.safetensors"),
        ('{"weight_map": {"a.weight": "pytorch_model.bin"}}', "pytorch_model.bin"),
        ('{"weight_map": {"a.weight": "absent.safetensors"}}', "readable absent.safetensors"),
        ('{"weight_map": {"a.weight": ["x"]}}', "TypeError"),
        ('{"metadata": {}}', "weight_map"),
        ("not json", "JSONDecodeError"),
    ],
)
def test_an_index_is_trusted_within_its_folder_only(checkpoints, tmp_path, index, got):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert got in refuse(tmp_path, checkpoints[1])


def test_a_tensor_that_the_index_promises_is_not_silently_absent(checkpoints, tmp_path):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.weight" in refuse(tmp_path, checkpoints[1])


def test_code_beside_a_checkpoint_is_never_run(checkpoints, edited):
    folder = edited(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('run')")
    assert audit(folder, folder, ["bnb-nf4"]).selected_by.startswith("names")
