"""What several test files train and measure on: a random two-layer Llama and BERT, and rows of random tokens."""

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from quail.trainer import QuailConfig

VOCAB = 128


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config)


def rows(lengths, seed=0):
    """One encoded row for each (prompt length, answer length)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for prompt, answer in lengths:
        ids = torch.randint(3, VOCAB, (prompt + answer,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def bert(seed=0, labels=3, **options):
    """A random two-layer BERT with a head for as many classes, without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return BertForSequenceClassification(config)


def class_rows(lengths, seed=0, labels=3):
    """One row of a classifier for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
            "label": int(torch.randint(labels, (), generator=generator)),
        }
        for length in lengths
    ]


def training(folder, **options):
    """A QuailConfig of two quiet steps on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "dataloader_pin_memory": False,
    }
    return QuailConfig(**defaults | options)
