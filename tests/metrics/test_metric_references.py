"""Metrics against what the reference implementations of MUSE, TOFU and open-unlearning gave on the same inputs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quail import evaluate, inference
from quail.data import Example
from quail.metrics import memorization, muse, tofu
from quail.metrics.classification import classification
from quail.metrics.measurement import Measurement

REFERENCE = json.loads((Path(__file__).parent / "reference_values.json").read_text(encoding="utf-8"))
INPUTS, MUSE, TOFU = REFERENCE["inputs"], REFERENCE["muse"], REFERENCE["tofu"]
OPEN_UNLEARNING = REFERENCE["open-unlearning"]
SETS = {"retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World", "forget": "Forget"}


class Bigram(torch.nn.Module):
    """The model of the reference values: logits of the next token by a table, whatever came before."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.table = torch.tensor(INPUTS["bigram_logits"])

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids])

    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, do_sample, **options):
        assert not do_sample and options == {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        ended = torch.zeros(len(input_ids), 1, dtype=torch.bool)
        for _ in range(max_new_tokens):
            said = self.table[input_ids[:, -1]].argmax(-1, keepdim=True).masked_fill(ended, pad_token_id)
            ended |= said == eos_token_id
            input_ids = torch.cat([input_ids, said], dim=1)
        return input_ids


@pytest.fixture(scope="module")
def model():
    return Bigram()


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(INPUTS["words"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture(scope="module")
def scores(model, tokenizer):
    rows = [
        {"input_ids": s["prompt"] + s["answer"], "labels": [-100] * len(s["prompt"]) + s["answer"]}
        for s in INPUTS["sequences"]
    ]
    return inference.row_scores(model, rows, tokenizer, batch_size=4)


def assert_close(values, reference, rel=1e-6):
    assert np.shape(values) == np.shape(reference) and np.size(values), "nothing is compared"
    np.testing.assert_allclose(values, reference, rtol=rel, atol=0)


def test_rouge_of_muse_is_without_stems_and_that_of_tofu_with_them():
    expected, said = zip(*INPUTS["rouge"], strict=True)
    plain, stemmed = (memorization.rouge_l(expected, said, stem=stem) for stem in (False, True))
    for name in ("f1", "recall"):
        assert getattr(plain, name).per_example.tolist() == MUSE["rouge"][name]
        assert_close(getattr(plain, name).value, MUSE["rouge"][f"mean_{name}"], 1e-15)
    assert stemmed.recall.per_example.tolist() == TOFU["rouge_recall"] != MUSE["rouge"]["recall"]


def test_knowmem():
    questions, expected, said = zip(*INPUTS["knowmem"], strict=True)
    assert [muse.knowmem_prompt(q, INPUTS["shots"]) for q in questions] == MUSE["knowmem"]["prompts"]
    assert [muse.cut_answer(s) for s in said] == MUSE["knowmem"]["cut"]
    result = muse.knowmem(expected, said)
    assert result.f1.per_example.tolist() == MUSE["knowmem"]["f1"]
    assert result.recall.per_example.tolist() == MUSE["knowmem"]["recall"]
    assert_close(result.f1.value, MUSE["knowmem"]["mean_f1"], 1e-15)


def test_verbmem_of_a_model(model, tokenizer):
    rows = [{"prompt": prompt, "gt": gt} for prompt, gt in INPUTS["verbmem"]]
    result = evaluate.score_verbmem(model, tokenizer, rows, max_new_tokens=INPUTS["verbmem_new_tokens"])
    assert result.f1.per_example.tolist() == MUSE["verbmem"]["f1"]
    assert result.recall.per_example.tolist() == MUSE["verbmem"]["recall"]
    assert_close(result.f1.value, MUSE["verbmem"]["mean_f1"], 1e-15)


def test_verbmem_texts_are_cut_and_cleaned_as_in_muse(model, tokenizer):
    room = INPUTS["verbmem_new_tokens"]
    prompts, expected = zip(*INPUTS["verbmem"], strict=True)
    said = inference.greedy(model, tokenizer, prompts, max_new_tokens=room, batch_size=2, clean_up=True)
    assert said == MUSE["verbmem"]["said"]
    cut = inference.decode(tokenizer, [tokenizer(text).input_ids[:room] for text in expected], clean_up=True)
    assert cut == MUSE["verbmem"]["expected"]


def test_what_is_said_is_cleaned_as_what_is_expected(tokenizer):
    model = Bigram()
    words = [INPUTS["words"].index(word) for word in ("the", "do", "n't", ".", "</s>")]
    for before, after in zip(words, words[1:], strict=False):
        model.table[before, after] = 99
    (f1,) = evaluate.score_verbmem(model, tokenizer, [{"prompt": "the", "gt": "do n't ."}]).f1.per_example
    assert f1 == 1
    rows = [{"question": "the", "answer": "don't."}]
    model.table[INPUTS["words"].index("<unk>")] = model.table[words[0]]  # "Answer:" is no word of the table
    assert evaluate.score_knowmem(model, tokenizer, rows).f1.value == 1


@pytest.mark.parametrize("percent", [5, 10, 20, 30, 40, 50, 60])
def test_min_k_and_the_auc_of_muse(percent):
    share, log_probs = percent / 100, MUSE["privleak"]["log_probs"]
    scored = {name: muse.min_k(texts, share) for name, texts in log_probs.items()}
    for name, values in scored.items():
        assert_close(values, [text[f"Min-{percent}%"] for text in MUSE["privleak"]["min_k"][name]], 1e-12)
    for other in ("holdout", "retain"):
        auc = muse.membership_auc(scored["forget"], scored[other])
        assert_close(auc.value, MUSE["privleak"]["auc"][f"forget_{other}_Min-{percent}%"], 1e-12)


def test_privleak_of_a_model(model, tokenizer):
    texts, auc = INPUTS["privleak_texts"], MUSE["privleak"]["auc"]["forget_holdout_Min-40%"]
    result = evaluate.score_privleak(model, tokenizer, texts["forget"], texts["holdout"], 0.4772, batch_size=2)
    assert_close(result.auc.value, auc)
    assert_close(result.privleak.value, (auc - 0.4772) / 0.4772)
    same = evaluate.score_privleak(model, tokenizer, texts["forget"], texts["holdout"], model)
    assert same.privleak.value == pytest.approx(0, abs=1e-15) and same.auc.value == result.auc.value
    with pytest.raises(ValueError, match="retrained_auc"):
        evaluate.score_privleak(model, tokenizer, texts["forget"], texts["holdout"], 0.0)


def test_log_probabilities_of_a_text_are_those_of_muse(model, tokenizer):
    for name, texts in INPUTS["privleak_texts"].items():
        found = inference.token_scores(model, tokenizer, [Example("", text) for text in texts], batch_size=3)
        for score, reference in zip(found, MUSE["privleak"]["log_probs"][name], strict=True):
            assert_close(score.without_end().log_probs, reference)


def test_privleak_has_the_sign_of_muse():
    """open-unlearning turns the usual AUC round to get it, and guards the quotient with 1e-10."""
    for attack_auc, attack_retrained, percent in OPEN_UNLEARNING["privleak"]:
        known = round((1 - attack_auc) * 10_000)
        forget, holdout = np.full(5, 0.5), np.r_[np.zeros(known), np.ones(10_000 - known)]
        result = muse.privleak(forget, holdout, 1 - attack_retrained)
        assert 100 * result.privleak.value == pytest.approx(percent, rel=1e-6, abs=1e-9)
        assert result.privleak.per_example.shape == (5,)


def test_min_k_of_short_texts_is_open_unlearnings():
    case = OPEN_UNLEARNING["min_k_short"]
    assert_close(muse.min_k(case["log_probs"], case["k"]), case["scores"])


@pytest.mark.parametrize("share", ["0.2", "0.4"])
def test_the_membership_attack_of_open_unlearning(share):
    case = OPEN_UNLEARNING["mia_min_k"][share]
    log_probs = MUSE["privleak"]["log_probs"]
    scored = {name: muse.min_k(log_probs[name], float(share)) for name in ("forget", "holdout")}
    for name, values in scored.items():
        assert_close(values, case[name])
    assert_close(1 - muse.membership_auc(**scored).value, case["auc"])
    # The same attack as a classifier that has to tell holdout (class 1) from forget.
    x = np.concatenate([scored["forget"], scored["holdout"]])
    odds = np.stack([1 - x / x.max(), x / x.max()], axis=1)
    labels = [0] * len(scored["forget"]) + [1] * len(scored["holdout"])
    assert_close(classification(odds, labels).auc.value, case["auc"])


def test_answers_by_teacher_forcing(scores):
    for score, hits, log_probs, nll, probability, of_tofu in zip(
        scores,
        OPEN_UNLEARNING["hits"],
        OPEN_UNLEARNING["log_probs"],
        OPEN_UNLEARNING["probability"]["nll"],
        OPEN_UNLEARNING["probability"]["per_example"],
        TOFU["nll"],
        strict=True,
    ):
        assert score.without_end().hits.tolist() == hits and len(score.hits) == len(hits) + 1
        assert_close(score.without_end().log_probs, log_probs)
        assert_close([score.nll, score.nll], [nll, of_tofu])
        assert_close(np.exp(-score.nll), probability)
    assert_close(tofu.probability([s.nll for s in scores]).value, OPEN_UNLEARNING["probability"]["value"])


@pytest.mark.parametrize("name", ["exact_memorization", "extraction_strength"])
def test_memorization(scores, name):
    result = getattr(memorization, name)([s.without_end().hits for s in scores])
    assert_close(result.per_example, OPEN_UNLEARNING[name]["per_example"])
    assert_close(result.value, OPEN_UNLEARNING[name]["value"])


def test_memorization_of_a_model(model, tokenizer):
    def text(ids):
        return " ".join(INPUTS["words"][i] for i in ids)

    examples = [Example(text(s["prompt"][1:]), " " + text(s["answer"][:-1])) for s in INPUTS["sequences"]]
    found = evaluate.score_memorization(model, tokenizer, examples, batch_size=4)
    assert_close(found.exact.per_example, OPEN_UNLEARNING["exact_memorization"]["per_example"])
    assert_close(found.extraction.per_example, OPEN_UNLEARNING["extraction_strength"]["per_example"])


def test_truth_ratio_of_a_model(scores):
    nll, case = [s.nll for s in scores], TOFU["perturbation"]
    count = len(case["paraphrased_nll"])
    perturbed = [[nll[i + 1], nll[i + 2]] for i in range(count)]
    assert_close(nll[:count], case["paraphrased_nll"])
    assert_close(perturbed, case["perturbed_nll"])
    assert_close(tofu.truth_ratio(nll[:count], perturbed), case["truth_ratio"])


def tofu_scores(name, mean):
    case = INPUTS["tofu"][name]
    kind = {"retain": "retain", "forget": "forget"}.get(name, "options")
    return tofu.tofu_scores(
        kind,
        nll=case["answer_nll"],
        correct_nll=case["paraphrased_nll"],
        perturbed_nll=case["perturbed_nll"],
        rouge=Measurement.mean(case["rouge"]),
        mean=mean,
    )


@pytest.mark.parametrize(
    ("mean", "script", "names"),
    [
        ("geometric", "aggregate_eval_stat", "{metric} {set}"),
        ("arithmetic", "utils", "{set} {metric}"),
    ],
)
def test_tofu_sets_and_model_utility(mean, script, names):
    reference = TOFU[script]
    sets = {name: tofu_scores(name, mean) for name in SETS}
    for name, title in SETS.items():
        probability = "Prob." if script == "aggregate_eval_stat" else "Probability"
        for metric, field in ((probability, "probability"), ("ROUGE", "rouge"), ("Truth Ratio", "truth_ratio")):
            figure = getattr(sets[name], field)
            assert_close(figure.value, reference[names.format(metric=metric, set=title)], 1e-12)
            assert_close(figure.per_example.mean(), figure.value, 1e-15)
    utility = tofu.model_utility(sets["retain"], sets["real_authors"], sets["world_facts"])
    assert_close(utility, reference["Model Utility"], 1e-12)


def test_truth_ratio_and_probability_of_open_unlearning():
    for name, case in INPUTS["tofu"].items():
        reference = OPEN_UNLEARNING["truth_ratio"]
        ratios = tofu.truth_ratio(case["paraphrased_nll"], case["perturbed_nll"])
        assert_close(ratios, reference[f"{name} per_example"])
        assert_close(tofu.forget_truth_ratio(ratios).value, reference[f"{name} closer_to_1_better"])
        assert_close(tofu.utility_truth_ratio(ratios).value, reference[f"{name} true_better"])
    for name, reference in OPEN_UNLEARNING["probability_w_options"].items():
        assert_close(tofu_scores(name, "geometric").probability.value, reference)


def test_forget_quality():
    found = tofu.forget_quality(*(tofu_scores(name, "geometric").ratios for name in ("forget", "retrained_forget")))
    for script in ("forget_quality", "forget_quality_aggregate"):
        assert_close(found.p_value, TOFU[script]["Forget Quality"], 1e-12)
        assert_close(found.statistic, TOFU[script]["KS Test Forget"], 1e-12)
    assert_close(found.p_value, OPEN_UNLEARNING["ks_test"], 1e-12)


def test_model_utility_is_the_harmonic_mean_of_nine():
    figures = iter(Measurement.mean([value]) for value in INPUTS["utility"])
    sets = [
        tofu.TofuScores(kind, next(figures), next(figures), next(figures), np.ones(1))
        for kind in ("retain", "options", "options")
    ]
    assert_close(tofu.model_utility(*sets), OPEN_UNLEARNING["hm_aggregate"], 1e-12)
    nothing = tofu.TofuScores("options", Measurement.mean([0.0]), sets[1].rouge, sets[1].truth_ratio, np.ones(1))
    assert tofu.model_utility(sets[0], nothing, sets[2]) == 0
