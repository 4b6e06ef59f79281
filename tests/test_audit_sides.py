"""What else a side of an audit may be: GGUF files and PEFT adapters, against the libraries that they are from."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from quail import audit

gguf = pytest.importorskip("gguf", reason="gguf is not installed: it writes the files")
peft = pytest.importorskip("peft", reason="peft is not installed: it makes the adapters")

LLAMA = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **{"num_key_value_heads": 2} | options))


def gpt2():
    torch.manual_seed(0)
    special = dict(bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32, **special))


def in_llama_cpp_order(weight, heads):
    """The rows of a head's two halves in turn, as llama.cpp's rotary embedding wants them."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model, path, quantization):
    """A Llama as llama.cpp's conversion lays it out, its matrices quantized by the gguf library."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = in_llama_cpp_order(tensor, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            tensor = in_llama_cpp_order(tensor, config.num_key_value_heads)
        head, _, rest = name.removeprefix("model.").removesuffix(".weight").partition(".")
        if head == "layers":
            block, _, module = rest.partition(".")
            gguf_name = f"blk.{block}.{NAMES[module]}.weight"
        else:
            gguf_name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[head] + ".weight"
        data = tensor.detach().float().numpy()
        if data.ndim == 2 and quantization is not None:
            writer.add_tensor(gguf_name, gguf.quantize(data, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_transformers_reads_it(path, folder):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    model.config.to_json_file(folder / "config.json")
    return folder


def refuse(before, after, **options):
    with pytest.raises(ValueError) as error:
        audit(before, after, **options)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and "got" in message
    return message


def same_but_for_the_names(a, b):
    unnamed = {"before": "", "after": "", "stored_before": (), "stored_after": (), "selected_by": "", "verdict": ""}
    return a.to_dict() | unnamed == b.to_dict() | unnamed


QUANTIZATIONS = [None, *(gguf.GGMLQuantizationType[name] for name in ("F16", "Q4_0", "Q8_0", "MXFP4"))]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_a_gguf_file_is_what_transformers_reads_of_it(tmp_path, quantization):
    llama().save_pretrained(tmp_path / "before")
    after = llama()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    path = write_gguf(after, tmp_path / "after.gguf", quantization)
    read = as_transformers_reads_it(path, tmp_path / "read")
    options = dict(formats=("bnb-nf4", "minmax-int4", "gguf-q4_0"), dtype="float32")
    direct = audit(tmp_path / "before", path, **options)
    through = audit(tmp_path / "before", read, **options)
    assert same_but_for_the_names(direct, through)
    assert direct.formats["bnb-nf4"].tensors == 14
    assert 0 < direct.formats["bnb-nf4"].figures.changed
    assert direct.stored_after == ("F32" if quantization is None else quantization.name,)


def test_a_model_shipped_in_q4_0_lies_on_that_grid(tmp_path):
    path = write_gguf(llama(), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0)
    report = audit(path, path, ("gguf-q4_0", "bnb-nf4"), dtype="float32")
    assert report.formats["gguf-q4_0"].shipped_in == "this recipe"
    assert report.formats["bnb-nf4"].shipped_in == "4 bits"
    assert report.selected_by == "transformers' LlamaForCausalLM"
    folder = audit(tmp_path, path, ("gguf-q4_0",), dtype="float32")
    assert folder.formats["gguf-q4_0"] == report.formats["gguf-q4_0"]


def test_two_gguf_files_of_a_model_that_transformers_does_not_read_keep_their_names(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "own")
    rng = np.random.default_rng(0)
    writer.add_tensor("blk.0.attn_q.weight", rng.standard_normal((64, 64), dtype=np.float32))
    writer.add_tensor("token_embd.weight", rng.standard_normal((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = audit(tmp_path / "own.gguf", tmp_path / "own.gguf", ("bnb-nf4",))
    assert [(row.name, row.layer, row.module) for row in report.tensors] == [("blk.0.attn_q.weight", "blk.0", "attn_q")]
    assert [row.name for row in report.unquantized] == ["token_embd.weight"]
    assert report.selected_by.startswith("names")


def test_a_gpt2_gguf_file_is_turned_as_transformers_turns_it(tmp_path):
    model = gpt2()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(128)
    names = {
        **{"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "h.0.ln_1": "blk.0.attn_norm"},
        **{"h.0.ln_2": "blk.0.ffn_norm", "h.0.attn.c_attn": "blk.0.attn_qkv", "h.0.attn.c_proj": "blk.0.attn_output"},
        **{"h.0.mlp.c_fc": "blk.0.ffn_up", "h.0.mlp.c_proj": "blk.0.ffn_down"},
    }
    for name, tensor in model.transformer.state_dict().items():
        module, _, kind = name.rpartition(".")
        turned = "c_" in module and kind == "weight"
        data = (tensor.t() if turned else tensor).contiguous().numpy()
        writer.add_tensor(f"{names[module]}.{kind}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(tmp_path / "before")
    report = audit(tmp_path / "before", tmp_path / "model.gguf", ("bnb-nf4",))
    assert report.formats["bnb-nf4"].tensors == 4
    assert "equal wherever" in report.verdict


@pytest.mark.parametrize("damage", ["header", "data", "nothing"])
def test_a_damaged_gguf_file_is_refused(tmp_path, damage):
    path = write_gguf(llama(), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    damaged = {"header": whole[:100], "data": whole[: len(whole) // 2], "nothing": b""}[damage]
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    assert "readable damaged.gguf" in refuse(path, tmp_path / "damaged.gguf")


def test_several_gguf_files_have_to_be_told_apart(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(llama(), tmp_path / name, None)
    assert "a.gguf, b.gguf" in refuse(tmp_path, tmp_path / "a.gguf")


def adapted(model, tmp_path, seed=2, **options):
    """(folder of an adapter with something in every part of it, the merged model)."""
    torch.manual_seed(seed)
    base = type(model)(model.config)
    base.load_state_dict(model.state_dict())
    base.to(model.dtype)
    with_adapter = peft.get_peft_model(base, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter) + (1 if "magnitude" in name else 0))
            elif parameter.requires_grad:
                parameter.add_(1e-2 * torch.randn_like(parameter))
    with_adapter.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    return tmp_path / "adapter", loaded.merge_and_unload()


ADAPTERS = {
    "lora": (llama, dict(r=8, target_modules=["q_proj", "down_proj"])),
    "scaled": (llama, dict(r=4, lora_alpha=32, use_rslora=True, target_modules=["v_proj"])),
    "by pattern": (
        llama,
        dict(
            r=4,
            target_modules=["v_proj", "up_proj"],
            rank_pattern={"up_proj": 16},
            alpha_pattern={r"layers\.1\.mlp\.up_proj": 64, "v_proj": 2},
        ),
    ),
    "dora": (llama, dict(r=8, use_dora=True, target_modules=["q_proj", "gate_proj"])),
    "embedding": (llama, dict(r=8, target_modules=["embed_tokens", "o_proj"])),
    "saved": (llama, dict(r=8, target_modules=["k_proj"], modules_to_save=["lm_head"])),
    "conv1d": (gpt2, dict(r=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d dora": (gpt2, dict(r=8, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, kind, dtype):
    make, options = ADAPTERS[kind]
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "before")
    adapter, merged = adapted(model, tmp_path, **options)
    merged.save_pretrained(tmp_path / "merged")
    direct = audit(tmp_path / "before", adapter, ("bnb-nf4", "minmax-int4"))
    through = audit(tmp_path / "before", tmp_path / "merged", ("bnb-nf4", "minmax-int4"))
    assert [row.name for row in direct.tensors] == [row.name for row in through.tensors]
    assert sum(row.figures.changed > 0 for row in through.tensors) >= 2
    for ours, theirs in zip(direct.tensors, through.tensors, strict=True):
        # A sum of products in another order rounds otherwise, and may move a weight over an edge.
        assert abs(ours.figures.same_code - theirs.figures.same_code) <= 2
        assert ours.figures.update_norm == pytest.approx(theirs.figures.update_norm, rel=1e-3, abs=1e-9)
    for ours, theirs in zip(direct.unquantized, through.unquantized, strict=True):
        assert ours.name == theirs.name
        assert ours.change.mean_abs == pytest.approx(theirs.change.mean_abs, rel=1e-2)


def test_an_adapter_of_another_model_or_kind_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "before")
    gpt2().save_pretrained(tmp_path / "gpt2")
    adapter, _ = adapted(llama(), tmp_path, r=4, target_modules=["q_proj"])
    assert "BEFORE has not" in refuse(tmp_path / "gpt2", adapter)
    assert "a whole model" in refuse(adapter, tmp_path / "before")

    config = json.loads((adapter / "adapter_config.json").read_text())

    def with_config(**changed):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changed))
        return refuse(tmp_path / "before", adapter)

    assert "peft_type IA3" in with_config(peft_type="IA3")
    assert "pissa" in with_config(init_lora_weights="pissa")
    assert "use_qalora" in with_config(use_qalora=True)
    (adapter / "adapter_config.json").write_text("{")
    assert "readable adapter_config.json" in refuse(tmp_path / "before", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, adapter / "adapter_model.safetensors")
    assert "lora_A.weight and lora_B.weight" in refuse(tmp_path / "before", adapter)
    save_file(tensors | {name: tensors[name][:, :32].contiguous()}, adapter / "adapter_model.safetensors")
    assert "of the adapter's shape" in refuse(tmp_path / "before", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").touch()
    assert "readable adapter_model.safetensors" in refuse(tmp_path / "before", adapter)
