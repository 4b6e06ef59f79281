"""The losses against naive formulas, answer_logits on several architectures, and the references."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, llama, rows
from transformers import GPT2Config, GPT2LMHeadModel

from quail import losses
from quail.data import collate
from quail.references import AdapterOffReference, FrozenReference, make_reference
from quail_kernels import fake_quant, logit_margin_hinge


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def batch():
    return collate(rows([(4, 3), (6, 1), (2, 5), (0, 4)]), pad_token_id=0)


@pytest.fixture
def case():
    torch.manual_seed(1)
    labels = torch.randint(0, VOCAB, (3, 7))
    labels[0, :3] = labels[1, 5:] = -100
    return torch.randn(3, 7, VOCAB), torch.randn(3, 7, VOCAB), labels


def naive_log_probs(logits, labels):
    """[example][answer token], one at a time."""
    return [
        [torch.log(F.softmax(logits[b, t], -1)[labels[b, t]]) for t in range(labels.shape[1]) if labels[b, t] >= 0]
        for b in range(len(labels))
    ]


def test_nll_and_gradient_ascent_are_a_mean_over_answer_tokens(case):
    logits, _, labels = case
    expected = -torch.stack(sum(naive_log_probs(logits, labels), [])).mean()
    torch.testing.assert_close(losses.nll(logits, labels), expected)
    torch.testing.assert_close(losses.gradient_ascent(logits, labels), -expected)


def test_npo_is_the_formula_of_the_paper(case):
    logits, ref_logits, labels = case
    for beta in (0.1, 1.0):
        terms = []
        for mine, ref in zip(naive_log_probs(logits, labels), naive_log_probs(ref_logits, labels), strict=True):
            ratio = torch.exp(torch.stack(mine).sum() - torch.stack(ref).sum())
            terms.append(2 / beta * torch.log(1 + ratio**beta))
        torch.testing.assert_close(
            losses.npo(logits, ref_logits, labels, beta), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5
        )


def one_answer(probability, tokens=1):
    """Logits of two words, [1, tokens, 2], under which the label 0 has that probability at every token."""
    p = torch.tensor(probability)
    return torch.stack([p.log(), (1 - p).log()]).expand(1, tokens, 2).clone().requires_grad_()


ZEROS = torch.zeros(1, 1, dtype=torch.long)


def test_simnpo_on_values_by_hand():
    # beta = 2, p = 1/4: -2/2 * log sigmoid(-2 log(1/4)) = -log(16 / 17), whatever the length.
    for tokens in (1, 3):
        labels = torch.zeros(1, tokens, dtype=torch.long)
        loss = losses.simnpo(one_answer(0.25, tokens), labels, beta=2.0)
        torch.testing.assert_close(loss, torch.tensor(17 / 16).log())
    # A margin of log 2 halves the odds: sigmoid(log 16 - log 2) = 8 / 9.
    loss = losses.simnpo(one_answer(0.25), ZEROS, beta=2.0, gamma=torch.tensor(2.0).log().item())
    torch.testing.assert_close(loss, torch.tensor(9 / 8).log())


def test_simnpo_weighs_tokens_by_the_length_of_their_answer(case):
    logits, _, labels = case
    # Answers that are known: of unknown ones there is nothing to forget, and hardly a gradient.
    logits = (logits + 6 * F.one_hot(labels.clamp(min=0), VOCAB)).requires_grad_()
    losses.simnpo(logits, labels, beta=4.5, gamma=0.3).backward()
    terms = []
    for mine in naive_log_probs(logits, labels):
        reward = -4.5 * torch.stack(mine).mean() - 0.3
        terms.append(-2 / 4.5 * torch.log(torch.sigmoid(reward)))
    torch.testing.assert_close(losses.simnpo(logits, labels, 4.5, 0.3), torch.stack(terms).mean())
    # Descent on it lowers every label's log-probability, and touches nothing that is no answer.
    moved = losses.token_log_probs(logits - 0.1 * logits.grad, labels) < losses.token_log_probs(logits, labels)
    assert moved[labels >= 0].all() and not logits.grad[labels < 0].any()


def test_dpo_on_values_by_hand():
    # p / p_ref of the answer: (1/4) / (1/2); of the refusal, two tokens: ((1/2) / (1/4)) ** 2 = 4.
    # beta = 1: sigmoid(log 4 - log 1/2) = 8 / 9.
    two = torch.zeros(1, 2, dtype=torch.long)
    answer, refusal = (one_answer(0.25), one_answer(0.5), ZEROS), (one_answer(0.5, 2), one_answer(0.25, 2), two)
    torch.testing.assert_close(losses.dpo(*answer, *refusal, beta=1.0), 2 * torch.tensor(9 / 8).log())
    # beta = 1/2: sigmoid(log 8 / 2), times 2 / beta.
    torch.testing.assert_close(losses.dpo(*answer, *refusal, beta=0.5), 4 * torch.tensor(1 + 8**-0.5).log())


def test_dpo_without_a_preference_is_npo(case):
    logits, ref_logits, labels = case
    same = (logits, logits, labels)
    torch.testing.assert_close(
        losses.dpo(logits, ref_logits, labels, *same, beta=0.3), losses.npo(logits, ref_logits, labels, 0.3)
    )


def test_dpo_starts_with_the_gradients_of_both_sides(case):
    logits, _, labels = case
    answer, refusal = logits.clone().requires_grad_(), (logits + 0).flip(0).detach().requires_grad_()
    losses.dpo(answer, logits, labels, refusal, refusal.detach(), labels, beta=0.1).backward()
    expected = losses.token_log_probs(answer, labels).sum() / len(labels)
    torch.testing.assert_close(answer.grad, torch.autograd.grad(expected, answer)[0])
    expected = -losses.token_log_probs(refusal, labels).sum() / len(labels)
    torch.testing.assert_close(refusal.grad, torch.autograd.grad(expected, refusal)[0])


def test_rmu_on_values_by_hand():
    states = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[0.0, 2.0], [9.0, 9.0]]], requires_grad=True)
    control, kept = torch.tensor([1.0, 2.0]), torch.tensor([[True, True], [True, False]])
    # Squares over 2 dimensions: 4/2, (4 + 4)/2; 1/2. Example means 3 and 0.5.
    loss = losses.rmu(states, control, kept)
    assert loss.item() == 1.75
    loss.backward()
    # (h - c u) / (tokens of the example * examples): a step against it leads to the control vector.
    assert states.grad.tolist() == [[[0.0, -0.5], [0.5, 0.5]], [[-0.5, 0.0], [0.0, 0.0]]]
    assert losses.embed_diff(states, states, kept) == 0
    assert losses.embed_diff(states, states + 1, kept).item() == pytest.approx(1)


def test_the_control_vector():
    control = losses.rmu_control(64, 6.5, seed=3)
    assert control.norm().item() == pytest.approx(6.5) and (control >= 0).all() and control.std() > 0.1
    assert torch.equal(control, losses.rmu_control(64, 6.5, seed=3))
    assert not torch.equal(control, losses.rmu_control(64, 6.5, seed=4))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_states_are_what_the_block_gave_where_answers_are_predicted(make):
    model, encoded, seen = make(), rows([(4, 3), (6, 1), (2, 5), (0, 4)]), []
    block = model.model.layers[0] if make is llama else model.transformer.h[0]
    block.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    batch = collate(encoded, 0)
    logits, labels, states, kept = losses.answer_states(model, batch, 0)
    torch.testing.assert_close(logits, losses.answer_logits(model, batch)[0])
    assert torch.equal(kept, labels >= 0) and torch.equal(labels, losses.aligned_labels(batch))
    keep = batch["logits_to_keep"]
    assert torch.equal(states, seen[0][:, -keep:-1])
    # Row 1: the last token of the prompt predicts its only answer.
    assert kept[1].sum() == 1
    assert torch.equal(states[1][kept[1]][0], seen[0][1, -2])


def test_rms_difference_on_values_by_hand():
    labels = torch.tensor([[0, -100]])
    a = torch.tensor([[[3.0, 4.0], [100.0, 0.0]]])
    b = torch.zeros(1, 2, 2)
    values = {"per_logit": 12.5**0.5, "l2": 5.0, "linf": 4.0, "label": 3.0}
    for norm, expected in values.items():
        assert losses.rms_difference([(a, b, labels)], norm) == pytest.approx(expected)
        shifted = losses.rms_difference([(a + 7, a, labels)], norm, "log_probs")
        assert shifted == pytest.approx(0, abs=1e-5)
    # A mean over the tokens of all batches, not of batches.
    other = torch.zeros(1, 3, dtype=torch.long)
    pairs = [(a, b, labels), (torch.ones(1, 3, 2), torch.zeros(1, 3, 2), other)]
    assert losses.rms_difference(pairs, "label") == pytest.approx(((9 + 1 + 1 + 1) / 4) ** 0.5)
    assert losses.rms_difference([(a, b, torch.full_like(labels, -100))]) == 0


def test_npo_stays_finite_far_from_the_reference(case):
    logits, ref_logits, labels = case
    logits = (logits * 1e3).requires_grad_()
    loss = losses.npo(logits, ref_logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_klr_is_a_kl_divergence(case):
    logits, ref_logits, labels = case
    kl = losses.kl_to_reference(logits, ref_logits, labels)
    p, q = (torch.distributions.Categorical(logits=z[labels >= 0]) for z in (ref_logits, logits))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q).mean())
    assert kl > 0
    assert losses.kl_to_reference(logits, logits, labels).abs() < 1e-6
    shifted = losses.kl_to_reference(logits + 7, ref_logits - 3, labels)
    torch.testing.assert_close(shifted, kl, rtol=1e-4, atol=1e-5)


def test_count_adds_parts_up_to_the_whole(case):
    logits, ref, labels = case
    tokens, examples = losses.answer_tokens(labels), torch.tensor(3)
    for loss, count in (
        (lambda s, **k: losses.nll(logits[s], labels[s], **k), tokens),
        (lambda s, **k: losses.kl_to_reference(logits[s], ref[s], labels[s], **k), tokens),
        (lambda s, **k: losses.npo(logits[s], ref[s], labels[s], **k), examples),
        (lambda s, **k: losses.simnpo(logits[s], labels[s], **k), examples),
        (lambda s, **k: losses.dpo(logits[s], ref[s], labels[s], ref[s], logits[s], labels[s], **k), examples),
        (lambda s, **k: losses.embed_diff(logits[s], ref[s], labels[s] >= 0, **k), examples),
    ):
        parts = sum(loss(slice(i, i + 1), count=count) for i in range(3))
        torch.testing.assert_close(parts, loss(slice(None)))


def test_a_batch_without_answers_gives_zero(case):
    logits, ref, labels = case
    ignored = torch.full_like(labels, -100)
    assert losses.nll(logits, ignored) == 0 and losses.kl_to_reference(logits, ref, ignored) == 0


@pytest.mark.parametrize("make", [llama, gpt2])
def test_answers_in_a_padded_batch_are_those_of_each_row_alone(make):
    model, encoded = make(), rows([(4, 3), (6, 1), (2, 5), (0, 4)])
    logits, labels = losses.answer_logits(model, collate(encoded, pad_token_id=0))
    alone = []
    for row in encoded:
        ids = torch.tensor([row["input_ids"]])
        count = sum(label != -100 for label in row["labels"][1:])
        alone.append(model(input_ids=ids).logits[0, :-1][-count:])
    torch.testing.assert_close(logits[labels >= 0], torch.cat(alone))
    targets = [label for row in encoded for label in row["labels"][1:] if label != -100]
    assert labels[labels >= 0].tolist() == targets


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_gives_no_gradient_and_no_nan(make):
    model, encoded = make(), rows([(4, 3), (9, 2)])
    losses.nll(*losses.answer_logits(model, collate(encoded, pad_token_id=0))).backward()
    padded = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in padded)
    model.zero_grad()
    count = torch.tensor(5)
    for row in encoded:
        losses.nll(*losses.answer_logits(model, collate([row], pad_token_id=0)), count).backward()
    for grad, p in zip(padded, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)


def test_logits_to_keep_reaches_the_head_and_changes_nothing():
    model, batch = llama(), collate(rows([(20, 2), (18, 3)]), pad_token_id=0)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    short, short_labels = losses.answer_logits(model, batch)
    full, full_labels = losses.answer_logits(model, {k: v for k, v in batch.items() if k != "logits_to_keep"})
    assert seen == [batch["logits_to_keep"], batch["labels"].shape[1]]
    assert seen[0] < seen[1]
    torch.testing.assert_close(short, full[:, -short.shape[1] :])
    torch.testing.assert_close(losses.nll(short, short_labels), losses.nll(full, full_labels))


def test_paper_margin_is_half_the_step():
    model = llama()
    head = model.get_output_embeddings().weight.detach()
    assert losses.paper_margin(model) == losses.mean_step(head, "bnb-nf4") / 2
    assert losses.paper_margin(model, step=0.08) == 0.04
    uniform = (head.max() - head.min()) / 16
    assert losses.paper_margin(model, "minmax-int4") == pytest.approx(uniform.item() / 2, rel=1e-5)
    assert fake_quant(head, "minmax-int4").unique().numel() <= 16
    with pytest.raises(ValueError, match="^step: expected a positive number; got 0$"):
        losses.paper_margin(model, step=0)


def test_frozen_reference_does_not_move_with_the_model(batch):
    model = llama(attention_dropout=0.5).train()
    reference = make_reference(model)
    assert isinstance(reference, FrozenReference)
    before, _ = reference(batch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    after, _ = reference(batch)
    assert torch.equal(before, after) and not after.requires_grad
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_adapter_off_reference_is_the_base_model(batch):
    base = llama()
    expected, _ = losses.answer_logits(copy.deepcopy(base).eval(), batch)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()
    reference = make_reference(model)
    assert isinstance(reference, AdapterOffReference)
    logits, _ = reference(batch)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad and model.training
    moved, _ = losses.answer_logits(model, batch)
    assert (moved - expected).abs().max() > 1e-4


def test_the_model_is_no_reference_of_itself():
    model = llama()
    sharing = copy.copy(model)
    for ref_model in (model, sharing):
        with pytest.raises(ValueError, match="^ref_model: expected a model of its own; got .*shares[^\n]*$"):
            make_reference(model, ref_model)
    with pytest.raises(ValueError, match="^model: expected a PEFT model[^\n]*; got LlamaForCausalLM$"):
        AdapterOffReference(model)


def test_a_plain_loop_unlearns():
    model, forget, retain = llama(), rows([(4, 3), (3, 5)]), rows([(4, 6), (5, 2)], seed=1)
    forget, retain = collate(forget, pad_token_id=0), collate(retain, pad_token_id=0)
    before = losses.nll(*losses.answer_logits(model, forget)).item()
    alpha, gamma, margin = 1.0, 1.0, 0.5

    reference = make_reference(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        ref_logits, _ = reference(forget)
        logits, labels = losses.answer_logits(model, forget)
        loss = losses.gradient_ascent(logits, labels)
        loss = loss + alpha * losses.nll(*losses.answer_logits(model, retain))
        loss = loss + gamma * logit_margin_hinge(logits, ref_logits, labels, margin=margin)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses.nll(*losses.answer_logits(model, forget)).item() > before
