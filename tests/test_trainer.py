"""QuailTrainer on a tiny random Llama."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import llama, rows, training
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_utils import set_seed

from quail import losses
from quail.data import UnlearningCollator, UnlearningDataset, collate
from quail.references import AdapterOffReference
from quail.trainer import MIXED, QuailConfig, QuailTrainer, deploy_weights_, fake_quantized
from quail_kernels import fake_quant

FORGET_LENGTHS = [(4, 3), (6, 1), (2, 7), (0, 4)]
RETAIN_LENGTHS = [(3, 2), (5, 6), (1, 9), (2, 2)]


FORGET, RETAIN = rows(FORGET_LENGTHS), rows(RETAIN_LENGTHS, seed=1)
IDK = rows([(4, 2), (6, 3), (2, 4), (1, 3)], seed=2)


@pytest.fixture
def config(tmp_path):
    def config(**options):
        return training(tmp_path, **options)

    return config


def make_trainer(model, config, forget=FORGET, retain=RETAIN, **options):
    dataset = UnlearningDataset(forget, retain, idk=IDK if config.forget_loss in ("idk", "dpo") else None)
    options.setdefault("data_collator", UnlearningCollator(0))
    return QuailTrainer(model=model, args=config, train_dataset=dataset, **options)


def nll(model, encoded):
    with torch.no_grad():
        return losses.nll(*losses.answer_logits(model.eval(), collate(encoded, 0))).item()


COMBINATIONS = [
    *itertools.product(("ga", "npo"), ("gdr", "klr", "none"), (0.0, 1.0), ("per_logit",), ("logits",)),
    *itertools.product(("ga",), ("gdr",), (1.0,), ("l2", "linf", "label"), ("logits", "log_probs")),
    *itertools.product(("simnpo", "idk", "dpo"), ("gdr", "none"), (0.0, 1.0), ("label",), ("log_probs",)),
    ("rmu", "gdr", 1.0, "label", "log_probs"),
    ("ga", "embed_diff", 1.0, "label", "log_probs"),
]


@pytest.mark.parametrize("forget_loss, retain_loss, gamma, norm, space", COMBINATIONS)
def test_every_combination_trains(config, forget_loss, retain_loss, gamma, norm, space):
    args = config(
        forget_loss=forget_loss,
        retain_loss=retain_loss,
        gamma=gamma,
        hinge_norm=norm,
        hinge_space=space,
        margin_mode="absolute",
        margin=5.0,
    )
    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, args)
    result = trainer.train()
    assert trainer.state.global_step == 2 and torch.isfinite(torch.tensor(result.training_loss))
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, before[name])]
    assert len(changed) == len(before)
    assert all(w.isfinite().all() for w in model.state_dict().values())
    asks = gamma > 0 or forget_loss in ("npo", "dpo") or retain_loss in ("klr", "embed_diff")
    assert (trainer.reference is not None) == asks

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"forget_loss"} | ({"retain_loss"} if retain_loss != "none" else set()) | ({"hinge"} if gamma else set())
    for entry in logged:
        assert names == {"forget_loss", "retain_loss", "hinge"} & set(entry)
        total = entry["forget_loss"] + entry.get("retain_loss", 0) + entry.get("hinge", 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_it_forgets_and_retains(config):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        losses.nll(*losses.answer_logits(model, collate(FORGET + RETAIN, 0))).backward()
        optimizer.step()
        optimizer.zero_grad()
    forget, retain = nll(model, FORGET), nll(model, RETAIN)
    assert forget < 1
    make_trainer(model, config(max_steps=20, learning_rate=5e-4)).train()
    assert nll(model, FORGET) > forget + 1
    assert nll(model, RETAIN) < retain + 0.2


ACCUMULATED = [("ga", "gdr"), ("npo", "klr"), ("ga", "none"), ("simnpo", "gdr"), ("idk", "gdr"), ("dpo", "klr")]
ACCUMULATED += [("rmu", "embed_diff")]


@pytest.mark.parametrize("forget_loss, retain_loss", ACCUMULATED)
def test_gradient_accumulation_is_one_large_batch(config, forget_loss, retain_loss):
    options = {"forget_loss": forget_loss, "retain_loss": retain_loss, "alpha": 0.7, "gamma": 2.0}
    options |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "margin_mode": "absolute", "margin": 3.0}
    trained, loss = [], []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        model = llama()
        args = config(per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
        # The reference is another model, so that KL and hinge have gradients from the first step on.
        trainer = make_trainer(model, args, ref_model=llama(seed=5))
        trainer.train()
        trained.append(model.state_dict())
        loss.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    start = llama().state_dict()
    for other, its_loss in zip(trained[1:], loss[1:], strict=True):
        assert its_loss == pytest.approx(loss[0], rel=1e-5)
        for name, w in trained[0].items():
            torch.testing.assert_close(other[name], w, rtol=1e-5, atol=1e-6)
            # The hinge's gradient reaches every weight.
            assert (w - start[name]).abs().max() > 1e-4


def test_two_processes_count_together(config, monkeypatch):
    """Two processes with the same batch: twice the count, and twice the loss, which data parallelism halves."""
    trainer = make_trainer(llama(), config(forget_loss="npo", retain_loss="klr"), ref_model=llama(seed=5))
    inputs = {"forget": collate(FORGET, 0), "retain": collate(RETAIN, 0)}
    alone, counts = trainer.compute_loss(trainer.model, inputs), trainer._counts([inputs], None)
    two = SimpleNamespace(num_processes=2, reduce=lambda tensor, how: tensor * {"sum": 2, "mean": 1}[how])
    monkeypatch.setattr(trainer, "accelerator", two)
    both = trainer._counts([inputs, inputs], None)
    assert all(both[name] == 4 * counts[name] for name in counts)
    together = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=trainer._counts([inputs], None))
    torch.testing.assert_close(together, alone)


def test_a_short_last_accumulation_counts_only_its_own(config):
    """Three batches accumulated by two: the second step has one batch."""
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "gamma": 0.0, "num_train_epochs": 1}
    model = llama()
    args = config(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=-1, **options)
    trainer = make_trainer(model, args, forget=FORGET[:3])
    trainer.train()
    assert trainer.state.global_step == 2

    expected, pairs = llama(), UnlearningDataset(FORGET[:3], RETAIN)
    set_seed(args.seed)
    order = [next(i for i in range(3) if pairs[i]["forget"]["input_ids"] == ids) for ids in _order(trainer)]
    for step in (order[:2], order[2:]):
        loss = losses.gradient_ascent(*losses.answer_logits(expected, collate([pairs[i]["forget"] for i in step], 0)))
        loss = loss + losses.nll(*losses.answer_logits(expected, collate([pairs[i]["retain"] for i in step], 0)))
        loss.backward()
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    for name, w in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], w, rtol=1e-5, atol=1e-6)


def _order(trainer):
    """The forget rows in the order of the first epoch."""
    loader = trainer.get_train_dataloader()
    return [batch["forget"]["input_ids"][0].tolist() for batch in loader]


def test_pairs_change_between_epochs(config):
    seen = {}

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            dataset = trainer.train_dataset
            seen[dataset.epoch] = [dataset[i]["retain"]["input_ids"] for i in range(len(dataset))]

    args = config(max_steps=-1, num_train_epochs=3, gamma=0.0)
    trainer = make_trainer(llama(), args, forget=FORGET[:3], callbacks=[Watch()])
    trainer.train()
    assert list(seen) == [0, 1, 2] and seen[0] != seen[1] != seen[2]


def test_adapters(config):
    base = llama()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer(model, config(forget_loss="npo", retain_loss="klr"))
    trainer.train()
    assert isinstance(trainer.reference, AdapterOffReference)
    logits, _ = trainer.reference(collate(FORGET, 0))
    original = llama()
    original.load_state_dict(before)
    torch.testing.assert_close(logits, losses.answer_logits(original.eval(), collate(FORGET, 0))[0])
    moved, _ = losses.answer_logits(model.eval(), collate(FORGET, 0))
    assert (moved - logits).abs().max() > 1e-4
    with pytest.raises(ValueError, match="^fake_quant: expected None for a PEFT model[^\n]*; got 'bnb-nf4'$"):
        make_trainer(model, config(fake_quant="bnb-nf4"))


def test_the_model_is_no_reference_of_itself(config):
    model = llama()
    for gamma in (0.0, 1.0):
        with pytest.raises(ValueError, match="^ref_model: expected a model of its own[^\n]*$"):
            make_trainer(model, config(gamma=gamma), ref_model=model)


def test_coarse_weights_are_warned_of_once(config):
    with pytest.warns(UserWarning, match="expected fp32 master weights, got torch.bfloat16.*15 %") as caught:
        make_trainer(llama().bfloat16(), config()).train()
    assert len([w for w in caught if "master weights" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*master weights.*")
        make_trainer(llama(), config())
        frozen = get_peft_model(llama().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
        assert {p.dtype for p in frozen.parameters() if p.requires_grad} == {torch.float32}
        make_trainer(frozen, config())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget_loss": "sgd"}, "forget_loss: expected one of ga, npo, simnpo, idk, dpo, rmu; got 'sgd'"),
        ({"retain_loss": None}, "retain_loss: expected one of gdr, klr, embed_diff, none; got None"),
        ({"hinge_norm": "l1"}, "hinge_norm: expected one of per_logit, l2, linf, label; got 'l1'"),
        ({"hinge_space": "probs"}, "hinge_space: expected one of logits, log_probs; got 'probs'"),
        ({"margin_mode": "half"}, "margin_mode: expected one of paper, absolute, calibrated; got 'half'"),
        ({"alpha": -1}, "alpha: expected a finite number of at least 0; got -1"),
        ({"gamma": float("nan")}, "gamma: expected a finite number of at least 0; got nan"),
        ({"npo_beta": 0}, "npo_beta: expected a finite number above 0; got 0"),
        ({"margin": 0.0}, "margin: expected a finite number above 0, or None; got 0.0"),
        (
            {"margin_mode": "absolute"},
            "margin: expected a finite number above 0 for margin_mode 'absolute'; got None",
        ),
        ({"margin_format": "nf4"}, "margin_format: expected one of bnb-nf4, bnb-fp4, .*; got 'nf4'"),
        ({"fake_quant": "int3"}, "fake_quant: expected one of bnb-nf4, bnb-fp4, .*; got 'int3'"),
        ({"fake_quant": "bnb-nf4@65"}, "fake_quant: expected one of 32, 64, .* for bnb-nf4; got 65"),
        ({"fake_quant": True}, "fake_quant: expected the name of a format; got True"),
        ({"margin_format": "mixed"}, "margin_format: expected one of bnb-nf4, bnb-fp4, .*; got 'mixed'"),
        ({"margin_format": None}, "margin_format: expected the name of a format; got None"),
        ({"noise_format": None}, "noise_format: expected the name of a format; got None"),
        ({"floor_format": "int3"}, "floor_format: expected one of bnb-nf4, bnb-fp4, .*; got 'int3'"),
        ({"simnpo_beta": -1.0}, "simnpo_beta: expected a finite number above 0; got -1.0"),
        ({"simnpo_gamma": -0.5}, "simnpo_gamma: expected a finite number of at least 0; got -0.5"),
        ({"dpo_beta": None}, "dpo_beta: expected a finite number above 0; got None"),
        ({"rmu_coefficient": 0.0}, "rmu_coefficient: expected a finite number above 0; got 0.0"),
        ({"rmu_layer": -1}, "rmu_layer: expected a whole number of at least 0, or None; got -1"),
        ({"rmu_layer": 1.5}, "rmu_layer: expected a whole number of at least 0, or None; got 1.5"),
        ({"margin_factor": 0}, "margin_factor: expected a finite number above 0; got 0"),
        ({"fake_quant_on": "retain"}, "fake_quant_on: expected one of both, forget; got 'retain'"),
        ({"weight_noise": "pink"}, "weight_noise: expected one of none, uniform, gaussian; got 'pink'"),
        (
            {"weight_noise": "uniform", "fake_quant": "mixed"},
            "weight_noise: expected 'none' beside fake_quant, .*; got 'uniform'",
        ),
        ({"saliency": "head"}, "saliency: expected one of none, module, neuron, weight; got 'head'"),
        ({"saliency_share": 0}, "saliency_share: expected a number above 0 and of at most 1; got 0"),
        ({"floor_score": "size"}, "floor_score: expected one of update, gradient, flip_law; got 'size'"),
        ({"floor_share": 1.5}, "floor_share: expected a number above 0 and of at most 1; got 1.5"),
        ({"lora_rank": True}, "lora_rank: expected a whole number of at least 1, or None; got True"),
        ({"lora_alpha": 0}, "lora_alpha: expected a finite number above 0, or None; got 0"),
        ({"lora_rank": 4, "fake_quant": "mixed"}, "fake_quant: expected None beside lora_rank; got 'mixed'"),
        ({"lora_rank": 4, "saliency": "module"}, "saliency: expected 'none' beside lora_rank; got 'module'"),
        ({"lora_rank": 4, "trainable_params": ".*"}, "trainable_params: expected None beside lora_rank; got '.*'"),
        ({"trainable_params": "("}, "trainable_params: expected a regular expression, or None; got '\\(': .*"),
        ({"idk_answers": 3}, "idk_answers: expected the path of a text file, or None; got 3"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False, .*; got True"),
    ],
)
def test_config_says_what_it_expected(config, options, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        config(**options)
    assert "\n" not in str(caught.value)


def test_config_on_the_command_line(tmp_path):
    parser = HfArgumentParser(QuailConfig)
    line = ["--output_dir", str(tmp_path), "--forget_loss", "npo", "--margin", "0.1", "--fake_quant", "bnb-fp4"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.forget_loss, args.margin, args.fake_quant, args.gamma) == ("npo", 0.1, "bnb-fp4", 1.0)
    assert args.remove_unused_columns is False and args.report_to == []
    line = ["--output_dir", str(tmp_path), "--margin_mode", "calibrated", "--fake_quant", "mixed", "--rmu_layer", "3"]
    line += ["--forget_loss", "rmu", "--retain_loss", "embed_diff", "--floor_format", "bnb-nf4", "--saliency", "neuron"]
    (args,) = parser.parse_args_into_dataclasses([*line, "--floor_score", "flip_law", "--fake_quant_on", "forget"])
    assert (args.forget_loss, args.retain_loss, args.rmu_layer, args.lora_rank) == ("rmu", "embed_diff", 3, None)
    assert (args.fake_quant, args.fake_quant_on, args.floor_score) == ("mixed", "forget", "flip_law")
    (tmp_path / "run.yaml").write_text("output_dir: x\nforget_loss: simnpo\nsimnpo_gamma: 0.5\nlora_rank: 16\n")
    (args,) = parser.parse_yaml_file(tmp_path / "run.yaml")
    assert (args.forget_loss, args.simnpo_gamma, args.lora_rank) == ("simnpo", 0.5, 16)
    QuailConfig(output_dir=str(tmp_path), margin_mode="absolute", gamma=0.0)


def test_the_margin(config):
    model = llama()
    assert make_trainer(model, config()).hinge_margin == losses.paper_margin(model)
    assert make_trainer(model, config(margin=0.1)).hinge_margin == 0.05
    assert make_trainer(model, config(margin=0.1, margin_mode="absolute")).hinge_margin == 0.1
    assert make_trainer(model, config(gamma=0)).hinge_margin is None


def test_data_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match="^retain_loss: expected 'none' or a retain set for 'gdr'[^\n]*$"):
        make_trainer(llama(), config(), retain=None)
    with pytest.raises(ValueError, match="^processing_class: expected a tokenizer[^\n]*; got NoneType$"):
        make_trainer(llama(), config(), data_collator=None)
    trainer = QuailTrainer(llama(), config(), train_dataset=FORGET, data_collator=UnlearningCollator(0))
    with pytest.raises(ValueError, match="^train_dataset: expected batches with forget and retain[^\n]*$"):
        trainer.train()
    args = config(retain_loss="none")
    make_trainer(llama(), args, retain=None).train()


def test_evaluation_is_the_ordinary_loss(config):
    model = llama()
    # prompts are long enough for logits_to_keep to be short of the labels
    args = config(per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, fake_quant="bnb-nf4")
    trainer = make_trainer(model, args, eval_dataset=rows([(9, 2), (8, 3)]))
    expected = nll(model, rows([(9, 2), (8, 3)]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    batch = collate(FORGET, 0)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(nll(model, FORGET), rel=1e-5) and outputs.logits.shape[0] == 4
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(nll(model, rows([(9, 2), (8, 3)])), rel=1e-5)


def test_a_batch_alone_stands_for_itself(config):
    model, reference = llama(), llama(seed=5).eval()
    trainer = make_trainer(model, config(margin_mode="absolute", margin=1.0, alpha=0.5), ref_model=reference)
    inputs = {"forget": collate(FORGET, 0), "retain": collate(RETAIN, 0)}
    counts = trainer._counts([inputs], torch.device("cpu"))
    assert {k: v.item() for k, v in counts.items()} == {
        "forget_tokens": 3 + 1 + 7 + 3,
        "forget_examples": 4,
        "retain_tokens": 2 + 6 + 9 + 2,
        "retain_examples": 4,
        "idk_tokens": 0,
        "idk_examples": 0,
    }
    loss = trainer.compute_loss(model, inputs)
    torch.testing.assert_close(trainer.compute_loss(model, inputs, num_items_in_batch=counts), loss)

    z, labels = losses.answer_logits(model, inputs["forget"])
    z_ref, _ = losses.answer_logits(reference, inputs["forget"])
    kept = labels >= 0
    hinge = F.relu(1.0 - (z - z_ref).abs())[kept].mean()
    expected = -F.cross_entropy(z[kept], labels[kept]) + hinge
    z, labels = losses.answer_logits(model, inputs["retain"])
    kept = labels >= 0
    expected = expected + 0.5 * F.cross_entropy(z[kept], labels[kept])
    torch.testing.assert_close(loss, expected)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4", "ct-int4-sym@64", "minmax-int4"])
def test_fake_quantized_is_a_quantized_model(format):
    model = llama().eval()
    manual = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linears(manual).values():
            layer.weight.copy_(fake_quant(layer.weight.bfloat16(), format).float())
    batch = collate(FORGET, 0)
    plain, _ = losses.answer_logits(model, batch)
    expected, _ = losses.answer_logits(manual, batch)
    with fake_quantized(model, format):
        quantized, _ = losses.answer_logits(model, batch)
        losses.gradient_ascent(quantized, losses.answer_logits(model, batch)[1]).backward()
    assert torch.equal(quantized, expected) and not torch.equal(quantized, plain)
    assert all(layer.weight.grad.abs().sum() > 0 for layer in linears(model).values())
    assert torch.equal(losses.answer_logits(model, batch)[0], plain)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(losses.answer_logits(deploy_weights_(model, format), batch)[0], expected)


def test_fake_quantized_cleans_up_after_an_error():
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = hooked = type(layer).forward.__get__(layer)
    with pytest.raises(RuntimeError), fake_quantized(model, "bnb-nf4"):
        assert layer.forward is not hooked
        raise RuntimeError
    assert layer.forward is hooked
    assert [m for m in model.modules() if "forward" in m.__dict__] == [layer]
    with fake_quantized(model, None):
        assert layer.forward is hooked
    with pytest.raises(ValueError, match="^model: expected nn.Linear layers[^\n]*; got a Embedding without$"):
        deploy_weights_(torch.nn.Embedding(2, 2), "bnb-nf4")


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4"])
def test_deployed_weights_stay_what_they_are(format):
    model = deploy_weights_(llama(), format)
    once = copy.deepcopy(model.state_dict())
    assert not torch.equal(once["model.layers.0.mlp.up_proj.weight"], llama().model.layers[0].mlp.up_proj.weight)
    assert torch.equal(once["lm_head.weight"], llama().lm_head.weight)
    deploy_weights_(model, format)
    assert all(torch.equal(w, once[name]) for name, w in model.state_dict().items())
    with fake_quantized(model, format):
        quantized, _ = losses.answer_logits(model.eval(), collate(FORGET, 0))
    assert torch.equal(quantized, losses.answer_logits(model, collate(FORGET, 0))[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_fake_quantized_weights(config, checkpointing):
    """One SGD step has the gradient at the quantized weights and takes it to the unquantized ones."""
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "gamma": 0.0, "max_steps": 1}
    model, manual = llama(), deploy_weights_(llama(), "bnb-nf4")
    start = copy.deepcopy(model.state_dict())
    args = config(fake_quant="bnb-nf4", gradient_checkpointing=checkpointing, **options)
    make_trainer(model, args).train()
    loss = losses.gradient_ascent(*losses.answer_logits(manual, collate(FORGET, 0)))
    (loss + losses.nll(*losses.answer_logits(manual, collate(RETAIN, 0)))).backward()
    for name, p in manual.named_parameters():
        step = (start[name] - model.state_dict()[name]) / 0.1
        torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=2e-6)
    assert all("forward" not in module.__dict__ for module in linears(model).values())


def test_bf16_autocast_keeps_logits_to_keep(config):
    model, widths = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    make_trainer(model, config(bf16=True, max_steps=1, gamma=0.0), rows([(20, 2)]), rows([(20, 3)])).train()
    assert widths == [3, 4]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ONE_STEP = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "gamma": 0.0, "max_steps": 1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_forget_passes_run_on_fake_quantized_weights(config, checkpointing):
    model, quantized, plain = llama(), deploy_weights_(llama(), "bnb-nf4"), llama()
    start = copy.deepcopy(model.state_dict())
    args = config(fake_quant="bnb-nf4", fake_quant_on="forget", gradient_checkpointing=checkpointing, **ONE_STEP)
    trainer = make_trainer(model, args)
    trainer.train()
    forget = losses.gradient_ascent(*losses.answer_logits(quantized, collate(FORGET, 0)))
    retain = losses.nll(*losses.answer_logits(plain, collate(RETAIN, 0)))
    total = (forget + retain).item()
    forget, retain = gradient_of(quantized, forget), gradient_of(plain, retain)
    for name, w in model.state_dict().items():
        step = (start[name] - w) / 0.1
        torch.testing.assert_close(step, forget[name] + retain[name], rtol=1e-4, atol=2e-6)
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["loss"] == pytest.approx(total, abs=1e-4)
    assert logged["loss"] == pytest.approx(logged["forget_loss"] + logged["retain_loss"], abs=1e-4)


def test_splitting_the_passes_changes_nothing_but_the_weights_they_see(config):
    """With a grid so fine that it is the model's own, forget-only and both are one and the same step."""
    ends = []
    for on in ("both", "forget"):
        model = deploy_weights_(llama(), "bnb-nf4")
        make_trainer(model, config(fake_quant="bnb-nf4", fake_quant_on=on, **ONE_STEP)).train()
        ends.append(model.state_dict())
    for name, w in ends[0].items():
        torch.testing.assert_close(ends[1][name], w, rtol=1e-5, atol=1e-7)


def test_mixed_draws_a_recipe_anew_each_step_and_the_same_again(config):
    args = config(fake_quant="mixed", max_steps=12, gamma=0.0, gradient_accumulation_steps=2)
    drawn = []
    for _ in range(2):
        trainer = make_trainer(llama(), args)
        trainer.train()
        drawn.append([])
        for step in range(12):
            trainer.state.global_step = step
            drawn[-1].append(trainer._format())
    # 64 dimensions: groups of 128 do not fit.
    assert set(drawn[0]) == {name + ("@64" if name == "ct-int4-sym" else "") for name in MIXED}
    assert drawn[0] == drawn[1]
    trainer.args.seed += 1
    again = []
    for step in range(12):
        trainer.state.global_step = step
        again.append(trainer._format())
    assert again != drawn[0]
    before = copy.deepcopy(trainer.model.state_dict())
    assert all(torch.equal(w, before[name]) for name, w in trainer.unlearned().state_dict().items())


def test_a_mixed_step_is_a_step_in_the_recipe_drawn(config):
    model, start = llama(), llama().state_dict()
    trainer = make_trainer(model, config(fake_quant="mixed", **ONE_STEP))
    format = trainer._format()
    trainer.train()
    manual = deploy_weights_(llama(), format)
    loss = losses.gradient_ascent(*losses.answer_logits(manual, collate(FORGET, 0)))
    loss = loss + losses.nll(*losses.answer_logits(manual, collate(RETAIN, 0)))
    for name, grad in gradient_of(manual, loss).items():
        torch.testing.assert_close((start[name] - model.state_dict()[name]) / 0.1, grad, rtol=1e-4, atol=2e-6)


def test_a_format_that_does_not_fit_the_model_is_refused_at_once(config):
    for options in ({"fake_quant": "ct-int4-sym"}, {"floor_format": "ct-int4-sym"}):
        with pytest.raises(ValueError, match="^[a-z_]+: expected a format for every layer; got ct-int4-sym@128: "):
            make_trainer(llama(), config(**options))
    with pytest.raises(ValueError, match="^noise_format: expected a format for every layer; got ct-int4-sym@128: "):
        make_trainer(llama(), config(weight_noise="uniform", noise_format="ct-int4-sym"))


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_is_in_the_forget_passes_only(config, noise):
    model, start = llama(), llama().state_dict()
    args = config(weight_noise=noise, **ONE_STEP)
    trainer = make_trainer(model, args)
    with trainer._forget_weights():
        noisy_weight = model.model.layers[0].mlp.up_proj.forward.keywords["weight"].detach().clone()
    assert (noisy_weight - model.model.layers[0].mlp.up_proj.weight).abs().max() > 1e-4
    trainer._passes = 0
    with trainer._forget_weights():
        loss = losses.gradient_ascent(*losses.answer_logits(model, collate(FORGET, 0)))
        assert torch.equal(model.model.layers[0].mlp.up_proj.forward.keywords["weight"], noisy_weight)
        forget = gradient_of(model, loss)
    retain = gradient_of(model, losses.nll(*losses.answer_logits(model, collate(RETAIN, 0))))
    model.zero_grad()
    trainer._passes = 0
    trainer.train()
    for name, w in model.state_dict().items():
        torch.testing.assert_close((start[name] - w) / 0.1, forget[name] + retain[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("space", ["logits", "log_probs"])
@pytest.mark.parametrize("norm", ["per_logit", "l2", "linf", "label"])
def test_the_calibrated_margin_is_the_noise_of_quantization(config, norm, space):
    model = llama()
    options = {"hinge_norm": norm, "hinge_space": space, "margin_format": "bnb-fp4"}
    # Batches of three: the last one is short.
    args = config(margin_mode="calibrated", margin_factor=1.5, per_device_train_batch_size=3, **options)
    trainer = make_trainer(model, args)
    terms = []
    for row in FORGET:
        logits, labels = losses.answer_logits(model.eval(), collate([row], 0))
        with fake_quantized(model, "bnb-fp4"):
            quantized, _ = losses.answer_logits(model, collate([row], 0))
        for z, z_q, label in zip(logits[0], quantized[0], labels[0], strict=True):
            if label >= 0:
                d = z.log_softmax(-1) - z_q.log_softmax(-1) if space == "log_probs" else z - z_q
                one = {"per_logit": d, "l2": d.norm(), "linf": d.abs().max(), "label": d[label]}[norm]
                terms += one.flatten().tolist()
    expected = 1.5 * (sum(t * t for t in terms) / len(terms)) ** 0.5
    assert expected > 1e-4 and trainer.hinge_margin == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_no_noise_is_no_margin(config):
    model = deploy_weights_(llama(), "bnb-nf4")
    with pytest.raises(
        ValueError, match="^margin_format: expected a format that changes [^\n]*'bnb-nf4'[^\n]* by 0.0$"
    ):
        make_trainer(model, config(margin_mode="calibrated"))


@pytest.mark.parametrize("format", ["bnb-nf4", "gguf-q4_0"])  # the latter's groups do not divide an adapter's rank
def test_the_calibrated_margin_of_adapters_is_that_of_the_model_below_them(config, format):
    args = config(margin_mode="calibrated", margin_format=format)
    expected = make_trainer(llama(), args).hinge_margin
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert make_trainer(model, args).hinge_margin == pytest.approx(expected, rel=1e-5)


def test_rmu_moves_nothing_above_its_layer(config):
    model, start = llama(), llama().state_dict()
    args = config(forget_loss="rmu", retain_loss="embed_diff", rmu_layer=0, **ONE_STEP)
    make_trainer(model, args).train()
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, start[name])}
    assert changed and all(name == "model.embed_tokens.weight" or ".layers.0." in name for name in changed)
    with pytest.raises(ValueError, match="^rmu_layer: expected one of the model's blocks, 0 to 1; got 2$"):
        make_trainer(model, config(forget_loss="rmu", rmu_layer=2))
    assert make_trainer(model, config(forget_loss="rmu"))._rmu_layer == 0


def test_rmu_draws_forget_states_to_the_control_vector(config):
    model, batch = llama(), collate(FORGET, 0)
    options = {"forget_loss": "rmu", "retain_loss": "embed_diff", "rmu_layer": 1, "rmu_coefficient": 5.0}
    trainer = make_trainer(model, config(max_steps=30, learning_rate=3e-3, gamma=0.0, **options))
    control = losses.rmu_control(64, 5.0, trainer.args.seed)

    def distance(model):
        _, _, states, kept = losses.answer_states(model.eval(), batch, 1)
        return losses.rmu(states, control, kept).item()

    before = distance(model)
    trainer.train()
    assert distance(model) < 0.8 * before


def test_only_matching_parameters_are_trained(config):
    model, start = llama(), llama().state_dict()
    trainer = make_trainer(model, config(trainable_params=r".*layers\.1\.mlp\.down_proj\.weight", weight_decay=0.1))
    trainer.train()
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, start[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ValueError, match="^trainable_params: expected a match among names as [^\n]*; got 'w'$"):
        make_trainer(llama(), config(trainable_params="w"))


def test_lora_is_merged_into_an_ordinary_model(config):
    base = llama()
    trainer = make_trainer(base, config(lora_rank=4, forget_loss="npo", retain_loss="klr", max_steps=5))
    assert isinstance(trainer.reference, AdapterOffReference)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    trainer.train()
    expected, _ = losses.answer_logits(trainer.model.eval(), collate(FORGET, 0))
    merged = trainer.unlearned()
    assert type(merged) is type(base) and set(merged.state_dict()) == set(llama().state_dict())
    torch.testing.assert_close(
        losses.answer_logits(merged.eval(), collate(FORGET, 0))[0], expected, rtol=1e-4, atol=1e-5
    )
    assert (merged.model.layers[0].mlp.up_proj.weight - llama().model.layers[0].mlp.up_proj.weight).abs().max() > 1e-5
    assert torch.equal(merged.lm_head.weight, llama().lm_head.weight)
    with pytest.raises(ValueError, match="^lora_rank: expected None for a PEFT model[^\n]*; got 4$"):
        make_trainer(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])), config(lora_rank=4))


def test_what_is_saved_after_fake_quant_is_deployed(config):
    trainer = make_trainer(llama(), config(fake_quant="bnb-nf4"))
    trainer.train()
    with fake_quantized(trainer.model.eval(), "bnb-nf4"):
        expected, _ = losses.answer_logits(trainer.model, collate(FORGET, 0))
    assert torch.equal(losses.answer_logits(trainer.unlearned(), collate(FORGET, 0))[0], expected)


def test_idk_learns_the_refusals(config):
    model = llama()
    before, forget = nll(model, IDK), nll(model, FORGET)
    make_trainer(model, config(forget_loss="idk", gamma=0.0, max_steps=30)).train()
    assert nll(model, IDK) < before - 1
    model = llama()
    make_trainer(model, config(forget_loss="dpo", dpo_beta=0.5, gamma=0.0, max_steps=30)).train()
    assert nll(model, IDK) < before and nll(model, FORGET) > forget


def test_refusals_are_asked_for(config):
    for forget_loss in ("idk", "dpo"):
        dataset = UnlearningDataset(FORGET, RETAIN)
        with pytest.raises(ValueError, match=r"^forget_loss: expected refusals \(idk\) for '(idk|dpo)'; got a train_"):
            QuailTrainer(llama(), config(forget_loss=forget_loss), dataset, data_collator=UnlearningCollator(0))
