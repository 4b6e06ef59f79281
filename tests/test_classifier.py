"""The losses, the trainer and the updates on a sequence classifier: a tiny random BERT."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import bert, class_rows, llama, training
from transformers import LlamaConfig, LlamaForSequenceClassification

from quail import losses
from quail.data import UnlearningCollator, UnlearningDataset, collate
from quail.quantizers import quantized_layers
from quail.references import AdapterOffReference
from quail.trainer import QuailTrainer, deploy_weights_, fake_quantized
from quail.weights import deployed_linears
from quail_kernels import fake_quant

FORGET, RETAIN = class_rows([5, 9, 3, 7]), class_rows([4, 4, 8, 6, 2], seed=1)


@pytest.fixture
def config(tmp_path):
    def config(**options):
        return training(tmp_path, **{"margin_mode": "absolute", "margin": 2.0} | options)

    return config


def make_trainer(model, config, **options):
    dataset = UnlearningDataset(FORGET, RETAIN)
    return QuailTrainer(model, config, dataset, data_collator=UnlearningCollator(0), **options)


def test_logits_and_labels_are_one_token_an_example():
    model, batch = bert().eval(), collate(FORGET, 0)
    logits, labels = losses.answer_logits(model, batch)
    assert logits.shape == (4, 1, 3) and labels.tolist() == [[row["label"]] for row in FORGET]
    for row, of_row in zip(FORGET, logits, strict=True):
        torch.testing.assert_close(of_row, model(input_ids=torch.tensor([row["input_ids"]])).logits)
    torch.testing.assert_close(losses.nll(logits, labels), F.cross_entropy(logits[:, 0], labels[:, 0]))
    assert torch.equal(losses.aligned_labels(batch), labels)


def test_a_decoder_with_a_classifying_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=128, num_labels=3, pad_token_id=0, **sizes)).eval()
    logits, _ = losses.answer_logits(model, collate(FORGET, 0))
    for row, of_row in zip(FORGET, logits, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits
        torch.testing.assert_close(of_row, alone, rtol=1e-4, atol=1e-5)
    assert "score" not in deployed_linears(model) and len(deployed_linears(model)) == 14


def test_states_are_those_of_the_block_without_padding():
    model, batch, seen = bert().eval(), collate(FORGET, 0), []
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, out: seen.append(out))
    logits, labels, states, kept = losses.answer_states(model, batch, 0)
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(states, out) and kept.sum(-1).tolist() == [len(row["input_ids"]) for row in FORGET]
    torch.testing.assert_close(logits, losses.answer_logits(model, batch)[0])
    assert labels.shape == (4, 1)


METHODS = [
    *itertools.product(("ga", "npo", "simnpo", "rmu"), ("gdr", "klr", "embed_diff", "none"), (0.0, 1.0)),
]


@pytest.mark.parametrize("forget_loss, retain_loss, gamma", METHODS)
def test_every_combination_trains(config, forget_loss, retain_loss, gamma):
    model = bert()
    before = copy.deepcopy(model.state_dict())
    args = config(forget_loss=forget_loss, retain_loss=retain_loss, gamma=gamma, hinge_space="log_probs")
    trainer = make_trainer(model, args)
    trainer.train()
    assert any(not torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(w.isfinite().all() for w in model.state_dict().values())
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        total = entry["forget_loss"] + entry.get("retain_loss", 0) + entry.get("hinge", 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_it_forgets_and_retains(config):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = collate(FORGET + RETAIN, 0)
    for _ in range(40):
        losses.nll(*losses.answer_logits(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def nll(rows):
        with torch.no_grad():
            return losses.nll(*losses.answer_logits(model.eval(), collate(rows, 0))).item()

    forget, retain = nll(FORGET), nll(RETAIN)
    assert forget < 0.2
    make_trainer(model, config(max_steps=40, learning_rate=3e-4, gamma=0.0)).train()
    assert nll(FORGET) > forget + 1 and nll(RETAIN) < retain + 0.2


@pytest.mark.parametrize("forget_loss, retain_loss", [("ga", "gdr"), ("npo", "klr"), ("rmu", "embed_diff")])
def test_gradient_accumulation_is_one_large_batch(config, forget_loss, retain_loss):
    options = {"forget_loss": forget_loss, "retain_loss": retain_loss, "gamma": 2.0, "optim": "sgd"}
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        model = bert()
        args = config(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.1,
            max_grad_norm=0.0,
            **options,
        )
        make_trainer(model, args, ref_model=bert(seed=5)).train()
        trained.append(model.state_dict())
    for name, w in trained[0].items():
        torch.testing.assert_close(trained[1][name], w, rtol=1e-5, atol=1e-6)


def test_the_backbone_of_a_bert_is_quantized_and_its_head_is_not():
    model, manual, batch = bert().eval(), bert().eval(), collate(FORGET, 0)
    names = [name for name, module in manual.named_modules() if isinstance(module, torch.nn.Linear)]
    names.remove("classifier")
    assert list(deployed_linears(model)) == names == list(quantized_layers(model)) and "bert.pooler.dense" in names
    with torch.no_grad():
        for name in names:
            layer = manual.get_submodule(name)
            layer.weight.copy_(fake_quant(layer.weight.bfloat16(), "bnb-nf4").float())
    with fake_quantized(model, "bnb-nf4"):
        quantized, _ = losses.answer_logits(model, batch)
    assert torch.equal(quantized, losses.answer_logits(manual, batch)[0])
    assert torch.equal(losses.answer_logits(deploy_weights_(model, "bnb-nf4"), batch)[0], quantized)


@pytest.mark.parametrize(
    "options",
    [
        {"fake_quant": "bnb-nf4"},
        {"fake_quant": "mixed", "fake_quant_on": "forget"},
        {"weight_noise": "gaussian"},
        {"saliency": "module", "saliency_share": 0.3},
        {"saliency": "neuron"},
        {"floor_format": "bnb-nf4"},
        {"margin_mode": "calibrated", "margin": None},
        {"margin_mode": "paper", "margin": None},
        {"lora_rank": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_updates_work_on_a_classifier(config, options):
    model = bert()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, config(**options))
    trainer.train()
    assert trainer.hinge_margin > 0
    after = trainer.unlearned().state_dict()
    assert set(after) == set(before) and any(not torch.equal(w, before[name]) for name, w in after.items())
    if "lora_rank" in options:
        assert isinstance(trainer.reference, AdapterOffReference)
    if trainer.floor:
        assert sum(trainer.floor.chosen.values()) > 0


def test_the_papers_margin_is_measured_on_the_classifying_layer():
    model = bert()
    assert losses.paper_margin(model) == losses.mean_step(model.classifier.weight.detach(), "bnb-nf4") / 2


@pytest.mark.parametrize("forget_loss", ["idk", "dpo"])
def test_a_classifier_has_no_refusals(config, forget_loss):
    with pytest.raises(ValueError, match="^forget_loss: expected another loss for a sequence classifier[^\n]*$"):
        make_trainer(bert(), config(forget_loss=forget_loss))


def test_evaluation_is_the_ordinary_loss(config):
    trainer = make_trainer(bert(), config(), eval_dataset=RETAIN)
    batch = collate(RETAIN, 0)
    expected = F.cross_entropy(
        trainer.model.eval()(**{k: batch[k] for k in batch if k != "labels"}).logits, batch["labels"]
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_causal_model_keeps_its_batches():
    with pytest.raises(KeyError):
        collate([{"input_ids": [1, 2]}], 0)
    assert losses.answer_logits(llama(), collate([{"input_ids": [4, 5], "labels": [-100, 5]}], 0))[0].shape == (
        1,
        1,
        128,
    )
