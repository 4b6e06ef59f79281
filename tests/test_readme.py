"""The README's training loop runs as it stands there, and does what it says."""

import re
from pathlib import Path

import pytest
import torch

from quail import losses
from quail.data import Example, UnlearningCollator, UnlearningDataset, collate, encode
from quail.models import load_for_training

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def snippet():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return code


def test_plain_loop_of_the_readme(snippet, tiny_checkpoint):
    loop = snippet[snippet.index("reference =") :]
    assert len(loop.splitlines()) < 15
    model, tokenizer = load_for_training(str(tiny_checkpoint))
    forget = encode([Example(f"a b {i}?", " b c d") for i in range(4)], tokenizer)
    retain = encode([Example(f"c {i}", " d e") for i in range(4)], tokenizer)
    dataset, collator = UnlearningDataset(forget, retain), UnlearningCollator(tokenizer.pad_token_id)
    names = {
        "model": model,
        "batches": [collator([dataset[i] for i in range(4)])] * 8,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }

    def forget_nll():
        with torch.no_grad():
            return losses.nll(*losses.answer_logits(model, collate(forget, tokenizer.pad_token_id))).item()

    before = forget_nll()
    exec(compile(snippet, README.name, "exec"), names)
    assert forget_nll() > before + 0.1
    assert names["loss"].isfinite()
