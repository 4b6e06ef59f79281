"""For the whole suite: no spinning threads, no network, no uninitialized memory taken for a result."""

import os
import signal

# What a shell runs in the background has SIGINT ignored, and so would the children that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)
# OpenMP reads it when torch is imported: on few cores, threads that spin while they wait starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What torch.compile keeps on disk does not know that an op's outputs have changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch  # noqa: E402 - after the environment

# torch.empty and its kind now give NaN, True or the largest integer, so that an output element that nobody
# wrote is seen. PyTorch fills only in deterministic mode; that mode itself is not what is tested: warn_only.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random two-layer Llama of 64 dimensions with a word tokenizer, saved as people save them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "Question", "Answer", *":?.,abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
