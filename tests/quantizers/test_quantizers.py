"""Every name gives a model with the values of its library in the linear layers and nothing else changed."""

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization.granularity import PerRow
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _quantize_affine_tinygemm,
)
from torchao.quantization.quantize_.workflows import Int8Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from quail.auditing.roles import Roles
from quail.quantizers import QUANTIZERS, check, deploy, gguf_files, quantized_layers
from quail.trainer import deploy_weights_
from quail_kernels import FORMATS, fake_quant

ROUNDED = ("rtn:ct-int4-sym", "rtn:gptq-int4-asym@32", "rtn:minmax-int4")
OTHERS = ("torchao-int4@32", "torchao-int4@128", *ROUNDED)
NAMES = (*QUANTIZERS[1:], *OTHERS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random two-layer BERT with a head for three classes, head and all saved."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Its linear layers are transformers' Conv1D, which keeps weights transposed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=128, n_layer=1, n_head=4)).save_pretrained(folder)
    return folder


def expected(quantizer, w):
    """What the library makes of a weight [out_features, in_features]."""
    name, _, group = quantizer.partition("@")
    if quantizer.startswith("rtn:"):
        return fake_quant(w, quantizer.removeprefix("rtn:"))
    if quantizer == "bnb-int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(w.half())
        return bnb.int8_vectorwise_dequant(codes, scales).to(w.dtype)
    if quantizer.startswith("bnb-"):
        packed, state = bnb.quantize_4bit(w, quant_type=name[4:7], compress_statistics=name.endswith("-dq"))
        return bnb.dequantize_4bit(packed, state)
    if name.startswith("gguf-"):
        kind = gguf.GGMLQuantizationType[{"gguf-q4_0": "Q4_0", "gguf-mxfp4": "MXFP4"}[name]]
        return torch.from_numpy(gguf.dequantize(gguf.quantize(w.float().numpy(), kind), kind)).to(w.dtype)
    if name == "torchao-int8":
        return Int8Tensor.from_hp(w, granularity=PerRow()).dequantize()
    block = [1, int(group or 64)]
    grid = (torch.int32, 0, 15)
    scale, zero = _choose_qparams_affine_tinygemm(w, MappingType.ASYMMETRIC, block, *grid, 1e-6, None, w.dtype)
    codes = _quantize_affine_tinygemm(w, block, scale, zero, *grid)
    # The kernel's: in fp32, rounded once; torchao's own function for this rounds after each operation.
    step, middle = (t.float().view(len(w), -1).repeat_interleave(block[1], dim=1) for t in (scale, zero))
    return ((codes - 8) * step + middle).to(w.dtype)


def deployed_values(quantizer, layer):
    """The weight that a layer computes with, [out_features, in_features]."""
    if quantizer == "bnb-int8":
        return bnb.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB).to(torch.bfloat16)
    if quantizer.startswith("bnb-"):
        return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if quantizer == "torchao-int8":
        return layer.weight.dequantize()
    if quantizer.startswith("torchao-int4"):
        # An opaque layout: what the kernel makes of the unit vectors, in sums with one term that is not zero.
        units = torch.eye(layer.in_features, dtype=torch.bfloat16)
        bias = 0 if layer.bias is None else layer.bias
        assert layer.bias is None or not layer.bias.any()
        return (layer(units) - bias).T
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def assert_deployed(checkpoint, quantizer, auto, layers):
    plain = auto.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    model = deploy(checkpoint, quantizer, auto=auto)
    assert not model.training and len(layers) > 1
    for name in layers:
        layer = plain.get_submodule(name)
        w = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T.contiguous()
        got = deployed_values(quantizer, model.get_submodule(name))
        assert not torch.equal(got, w), name
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected(quantizer, w)), name
    weights = dict(plain.named_parameters(remove_duplicate=False))
    left = {
        name: p for name, p in model.named_parameters(remove_duplicate=False) if name[: -len(".weight")] not in layers
    }
    assert left.keys() == weights.keys() - {f"{name}.weight" for name in layers}
    for name, p in left.items():
        same = p.to(weights[name].dtype)  # LLM.int8 keeps biases in fp16
        assert torch.equal(same, weights[name]), name
    return plain, model


@pytest.mark.parametrize("quantizer", NAMES)
def test_a_language_model(tiny_checkpoint, quantizer):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    layers = [name for name, module in plain.named_modules() if name.endswith(kinds) and isinstance(module, nn.Linear)]
    assert len(layers) == 14
    plain, model = assert_deployed(tiny_checkpoint, quantizer, AutoModelForCausalLM, layers)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert logits.isfinite().all() and not torch.equal(logits, plain(input_ids=ids).logits)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 41)


@pytest.mark.parametrize("quantizer", NAMES)
def test_a_sequence_classifier_keeps_its_head(classifier, quantizer):
    plain = BertForSequenceClassification.from_pretrained(classifier)
    layers = [name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "classifier"]
    assert len(layers) == 13 and "bert.pooler.dense" in layers
    _, model = assert_deployed(classifier, quantizer, AutoModelForSequenceClassification, layers)
    with torch.no_grad():
        assert model(input_ids=torch.arange(2, 40)[None]).logits.shape == (1, 3)


@pytest.mark.parametrize("quantizer", ["bnb-nf4", "bnb-int8", "gguf-q4_0", "rtn:ct-int4-sym"])
def test_transposed_layers_are_quantized_along_in_features(gpt2, quantizer):
    kinds = ("c_attn", "c_proj", "c_fc")
    layers = [f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    plain = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.bfloat16)
    assert all(name.endswith(kinds) for name in layers) and list(quantized_layers(plain)) == layers
    model = deploy(gpt2, quantizer)
    for name in layers:
        got = deployed_values(quantizer, model.get_submodule(name))
        assert torch.equal(got, expected(quantizer, plain.get_submodule(name).weight.detach().T.contiguous()))
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_the_layers_are_those_that_the_audit_and_the_trainer_take(tiny_checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    roles = Roles(plain)
    audited = [n for n, p in plain.named_parameters() if roles.of(n, tuple(p.shape)).kept_as is None]
    assert [f"{name}.weight" for name in quantized_layers(plain)] == audited
    trained, rounded = deploy_weights_(plain, "bnb-nf4"), deploy(tiny_checkpoint, "rtn:bnb-nf4", torch.float32)
    in_bf16 = deploy(tiny_checkpoint, "rtn:bnb-nf4")
    changed = 0
    for (name, ours), theirs in zip(in_bf16.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs.to(torch.bfloat16).float()), name
        changed += not torch.equal(theirs, rounded.get_parameter(name))
    assert changed == 14  # the trainer's are of the bf16 weights, whatever it trains in


def test_all_of_the_recipes_are_names(tiny_checkpoint):
    for format in FORMATS:
        check(f"rtn:{format}")
    for name in (*NAMES, "none", "gptq:ct-int4-sym@64", "awq:ct-int4-asym", "rtn:bnb-nf4@128"):
        check(name)


def test_dtype_is_of_the_weights_before_they_are_quantized(tiny_checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for quantizer in ("none", "gguf-q4_0", "rtn:ct-int4-sym"):
        model = deploy(tiny_checkpoint, quantizer, torch.float32)
        w = plain.model.layers[1].mlp.up_proj.weight.detach()
        got = model.model.layers[1].mlp.up_proj.weight
        assert got.dtype == torch.float32
        assert torch.equal(got, w if quantizer == "none" else expected(quantizer, w))


def test_a_gguf_file_is_one_that_gguf_reads(tmp_path):
    weights = {"a.weight": torch.randn(6, 64), "b.weight": torch.randn(2, 128)}
    gguf_files.write(tmp_path / "f.gguf", weights, "gguf-mxfp4", "llama")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "f.gguf").tensors}
    assert {t.tensor_type.name for t in tensors.values()} == {"MXFP4"} and tensors["b.weight"].shape.tolist() == [
        128,
        2,
    ]
    assert tensors["a.weight"].n_bytes == 6 * 64 // 32 * 17
    for name, values in gguf_files.read(tmp_path / "f.gguf"):
        assert values.shape == weights[name].shape
        scale = weights[name].abs().reshape(-1, 32).amax(1, keepdim=True)
        assert ((values - weights[name]).reshape(-1, 32).abs() <= scale / 2).all()
        assert np.unique(values[0, :32]).size <= 15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "expected one of none, bnb-nf4, bnb-nf4-dq, .*rtn:FORMAT, gptq:FORMAT or awq:FORMAT; got 'int3'"),
        ("", "expected one of none"),
        (None, "expected one of none"),
        ("bnb-nf4@64", "expected one of none"),
        ("torchao-int4@256", "expected torchao-int4@32, torchao-int4@64, torchao-int4@128; got 'torchao-int4@256'"),
        ("torchao-int8@32", "expected torchao-int4@32"),
        ("rtn:", "after rtn: expected one of bnb-nf4, bnb-fp4"),
        ("rtn:int3", "after rtn: expected one of bnb-nf4, bnb-fp4"),
        ("rtn:ct-int4-sym@7", "after rtn: expected a multiple of"),
        ("rtn:ct-int4-sym@x", "after rtn: expected a number after @"),
        ("gptq", "expected gptq:ct-int4-sym or gptq:ct-int4-asym, optionally with @group_size; got 'gptq'"),
        ("awq:bnb-nf4", "expected awq:ct-int4-sym or awq:ct-int4-asym"),
        ("gptq:ct-int4-sym@0", "expected gptq:ct-int4-sym"),
    ],
)
def test_a_name_that_is_none_is_one_line(tmp_path, name, message):
    for call in (lambda: check(name), lambda: deploy(tmp_path / "nothing", name)):
        with pytest.raises(ValueError, match=f"^quantizer: {message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def narrow(folder, hidden):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=hidden // 2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("quantizer", "hidden", "message"),
    [
        ("torchao-int4", 96, "expected in_features a multiple of 64, the group; got 96 in model.layers.0.self_attn.q_"),
        ("torchao-int4@128", 192, "expected in_features a multiple of 128"),
        (
            "rtn:ct-int4-sym",
            192,
            "self_attn.q_proj: expected a last dimension that is a multiple of 128",
        ),
        ("gguf-q4_0", 48, "expected in_features a multiple of 32, the block; got 48"),
    ],
)
def test_shapes_that_do_not_suit_are_one_line(tmp_path, quantizer, hidden, message):
    with pytest.raises(ValueError, match=message) as caught:
        deploy(narrow(tmp_path / "narrow", hidden), quantizer)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(quantizer)


def test_what_bitsandbytes_cannot_run_on_this_cpu_is_said_before_it_runs(tmp_path, monkeypatch):
    folder = narrow(tmp_path / "narrow", 80)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    with pytest.raises(ValueError, match="^bnb-nf4: expected out_features a multiple of 32, .*AVX512-BF16.*; got 80"):
        deploy(folder, "bnb-nf4")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    model = deploy(folder, "bnb-nf4")
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("quantizer", ["none", "bnb-nf4", "torchao-int8", "gguf-q4_0", "rtn:bnb-nf4"])
def test_a_weight_that_is_not_in_the_checkpoint_is_not_made_up(tiny_checkpoint, quantizer):
    with pytest.raises(ValueError, match="expected every weight of LlamaForSeq.*; got score.weight missing"):
        deploy(tiny_checkpoint, quantizer, auto=AutoModelForSequenceClassification)


def test_no_checkpoint_is_one_line(tmp_path):
    for quantizer in ("none", "bnb-nf4", "rtn:bnb-nf4", "gguf-q4_0", "torchao-int8"):
        with pytest.raises(ValueError, match="nothing: expected a model's folder or hub name; got ") as caught:
            deploy(tmp_path / "nothing", quantizer)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_such_a_head_is_one_line(tiny_checkpoint):
    for quantizer in ("bnb-nf4", "none"):
        with pytest.raises(ValueError, match="AutoModelForMaskedLM|AutoModel") as caught:
            deploy(tiny_checkpoint, quantizer, auto=AutoModelForMaskedLM)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("quantizer", "module"), [("gguf-q4_0", "gguf"), ("torchao-int8", "torchao.quantization")])
def test_a_library_that_is_not_installed_is_one_line(tiny_checkpoint, quantizer, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=f"^{quantizer}: expected the library .*pip install") as caught:
        deploy(tiny_checkpoint, quantizer)
    assert "\n" not in str(caught.value)


def test_a_quantized_checkpoint_is_loaded_as_it_is_and_not_quantized_again(tiny_checkpoint, tmp_path):
    model = deploy(tiny_checkpoint, "bnb-nf4")
    model.save_pretrained(tmp_path / "nf4")
    again = deploy(tmp_path / "nf4", "none")
    for name in quantized_layers(AutoModelForCausalLM.from_pretrained(tiny_checkpoint)):
        first, second = (deployed_values("bnb-nf4", m.get_submodule(name)) for m in (model, again))
        assert torch.equal(first, second)
    for quantizer in ("bnb-nf4", "torchao-int8", "rtn:bnb-nf4", "gguf-q4_0", "gptq:ct-int4-sym"):
        with pytest.raises(ValueError, match=f"16 or 32 bits for {quantizer}; got bitsandbytes already") as caught:
            deploy(tmp_path / "nf4", quantizer, calibration=["a"])
        assert "\n" not in str(caught.value)
