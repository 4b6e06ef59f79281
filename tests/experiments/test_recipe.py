"""A recipe is checked whole, and each of its faults is one line."""

import copy

import pytest
import yaml

from quail.cli import main
from quail.experiments.recipe import RecipeError, find_recipe, load_recipe, packaged_recipes


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("quick", [False, True])
def test_the_recipes_of_the_package_are_sound(name, quick):
    recipe = load_recipe(packaged_recipes()[name], quick=quick)
    assert recipe.name == name and recipe.quick is quick
    if quick:
        assert recipe.seeds == (0,)
        whole = load_recipe(packaged_recipes()[name])
        assert all(method.name in {each.name for each in whole.methods} for method in recipe.methods)
    else:
        assert len(recipe.seeds) == 3


def test_there_is_a_recipe_for_every_task_and_one_for_a_gpu():
    recipes = {name: load_recipe(path) for name, path in packaged_recipes().items()}
    assert {"tofu-forget01", "tofu-forget05", "muse-news-knowmem", "mide22-classification"} <= set(recipes)
    assert recipes["muse-news-llama2-7b"].model == "muse-bench/MUSE-News_target"
    assert recipes["muse-news-llama2-7b"].learn is None
    assert "not been run" in packaged_recipes()["muse-news-llama2-7b"].read_text(encoding="utf-8").split("\ntask:")[0]


def faults(path, **options):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **options)
    assert all("\n" not in line and line.startswith(f"{path.name}: ") for line in caught.value.problems)
    return caught.value.problems


def change(content, where, value):
    content = copy.deepcopy(content)
    *path, last = where.split("/")
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    return content


FAULTS = [
    ("sedes", [0], "sedes: expected one of"),
    ("task", "tofoo", "task: expected one of mide22-classification, "),
    ("settings/retane", 3, "settings.retane: expected one of forget, retain, "),
    ("settings/split", "forget02", "settings.split: expected forget01, forget05 or forget10; got 'forget02'"),
    ("settings/max_length", "long", "settings.max_length: expected an integer; got 'long'"),
    ("learn/epochs", 0, "learn.epochs: expected a number above 0; got 0"),
    ("learn", {"epochs": 1}, "learn.learning_rate: expected to be given; got nothing"),
    ("stop/metric", "accuracy", "stop.metric: expected one of exact, token_accuracy; got 'accuracy'"),
    ("stop/weights", "best", "stop.weights: expected one of trained, saved; got 'best'"),
    ("settings/utility", 3, "settings.utility: expected 0, or at least 4 with truth_ratio; got 3"),
    ("calibration", {"texts": 0}, "calibration.texts: expected a number above 0; got 0"),
    ("quantizers", ["none", "gptq:ct-int4-sym@64"], "calibration: expected {texts: N} for gptq:ct-int4-sym@64; got"),
    ("seeds", [0, 0], "seeds: expected different integers of at least 0; got [0, 0]"),
    ("seeds", [], "seeds: expected to be given; got nothing"),
    ("regimes", ["8bit"], "regimes: regime: expected 16bit or grid:FORMAT; got '8bit'"),
    ("regimes", ["grid:nf5"], "regimes: format: expected one of"),
    ("quantizers", ["none", "bnb-nf5"], "quantizers: quantizer: expected one of none, "),
    ("quantizers", ["rtn:bnb-nf4"], "quantizers: expected none among them"),
    ("quantizers", ["none", "none"], "quantizers: expected each name once"),
    ("keep_checkpoints", "some", "keep_checkpoints: expected one of starts, all; got 'some'"),
    ("methods/GA+GDR", {"forget_los": "ga"}, "methods.GA+GDR.forget_los: expected a field of QuailConfig"),
    ("methods/GA+GDR", {"forget_loss": "gaa"}, "methods.GA+GDR.forget_loss: expected one of ga, npo"),
    ("methods/GA+GDR", {"alpha": "much"}, "methods.GA+GDR.alpha: expected float; got 'much'"),
    ("methods/GA+GDR", {"seed": 3}, "methods.GA+GDR.seed: expected a field of QuailConfig"),
    ("methods/GA+GDR", {"fake_quant": "nf5"}, "methods.GA+GDR.fake_quant: "),
    ("methods/GA+GDR", {"max_steps": 0}, "methods.GA+GDR.max_steps: expected an integer above 0; got 0"),
    ("methods/GA+GDR", {"regimes": ["grid:x"]}, "methods.GA+GDR.regimes: expected some of 16bit, grid:bnb-nf4"),
    ("methods/GA+GDR", 3, "methods.GA+GDR: expected a mapping of fields; got 3"),
    ("data", None, "data: expected the folder of the data of tofu; got nothing"),
]


@pytest.mark.parametrize("where, value, line", FAULTS, ids=[f"{w}={v}" for w, v, _ in FAULTS])
def test_a_fault_is_named(recipe_file, where, value, line):
    path = recipe_file(**change(recipe_file.content, where, value))
    found = faults(path)
    assert any(problem.startswith(f"small.yaml: {line}") for problem in found), found
    assert len(found) == 1, found


def test_all_faults_are_found_at_once_and_the_exit_code_is_2(recipe_file, capsys, tmp_path):
    content = change(recipe_file.content, "regimes", ["8bit"])
    content = change(content, "methods/GA+GDR", {"forget_los": "ga", "alpha": "much"})
    content = change(content, "stop/metric", "loss")
    path = recipe_file(**content)
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(faults(path)) == 4
    assert all(line.startswith("quail: small.yaml: ") for line in lines)
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_no_refusals(recipe_file):
    settings = {"events": ["EN01", "EN02"], "forget_event": "EN01"}
    changes = {"task": "mide22-classification", "settings": settings, "stop": {"metric": "accuracy", "at": 0.1}}
    path = recipe_file(**changes, methods={"idk": {"forget_loss": "idk"}})
    assert faults(path) == [
        "small.yaml: methods.idk.forget_loss: expected one of ga, npo, simnpo, rmu for mide22-classification; got 'idk'"
    ]


def test_a_classifier_has_no_calibrated_quantizer(recipe_file):
    settings = {"events": ["EN01", "EN02"], "forget_event": "EN01"}
    path = recipe_file(
        task="mide22-classification",
        settings=settings,
        stop={"metric": "accuracy", "at": 0.2},
        quantizers=["none", "awq:ct-int4-asym@64"],
        calibration={"texts": 8},
        methods={"GA": {}},
    )
    (line,) = faults(path)
    assert "quantizers: expected none that calibrates for mide22-classification, no language model; got awq:" in line


def test_numbers_as_people_write_them(recipe_file):
    path = recipe_file()
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert yaml.safe_load(path.read_text())["defaults"]["learning_rate"] == "1e-3"
    assert load_recipe(path).methods[0].fields["learning_rate"] == 1e-3


def test_the_quick_form_changes_only_what_it_names(recipe_file):
    quick = {"seeds": [4], "settings": {"retain_scored": 2}, "methods": ["NPO"], "regimes": ["16bit"]}
    path = recipe_file(quick=quick)
    whole, short = load_recipe(path), load_recipe(path, quick=True)
    assert whole.seeds == (0,) and short.seeds == (4,)
    assert short.settings.retain_scored == 2 and short.settings.max_length == whole.settings.max_length
    assert [method.name for method in whole.methods] == ["GA+GDR", "NPO"]
    assert [method.name for method in short.methods] == ["NPO"]
    assert short.learn == whole.learn


def test_faults_of_the_quick_form_are_found_without_it(recipe_file):
    path = recipe_file(quick={"methods": ["DPO"], "seedz": [1]})
    assert len(faults(path)) == 2
    path = recipe_file()
    assert faults(path, quick=True) == ["small.yaml: quick: expected a section of that name in the recipe; got none"]


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    assert "expected a YAML file" in faults(path)[0]
    path.write_text("- a")
    assert faults(path) == ["broken.yaml: expected a mapping of keys; got list"]


def test_a_recipe_is_found_by_path_and_by_name(recipe_file):
    path = recipe_file()
    assert find_recipe(str(path)) == path
    for name in ("tofu-forget01", "tofu-forget01.yaml", "recipes/tofu-forget01.yaml"):
        assert find_recipe(name) == packaged_recipes()["tofu-forget01"]
    with pytest.raises(ValueError, match="recipe: expected a YAML file or one of .*tofu-forget01.*; got 'tofu'"):
        find_recipe("tofu")


def test_data_is_looked_for_where_it_was_said_to_be(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file())
    monkeypatch.delenv("QUAIL_DATA", raising=False)
    assert recipe.data_folder() == recipe_file.data
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    monkeypatch.setenv("QUAIL_DATA", str(elsewhere))
    assert recipe.data_folder() == elsewhere / "data"
    assert recipe.data_folder(tmp_path) == recipe_file.data
    recipe = load_recipe(recipe_file(data="nowhere"))
    with pytest.raises(ValueError, match="data: expected the folder nowhere below --data, QUAIL_DATA or the recipe's"):
        recipe.data_folder()


def test_the_list_names_every_recipe(capsys):
    assert main(["run", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(packaged_recipes())
    assert all(line.partition(": ")[2] for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "nothing"],
        ["run", "tofu-forget01", "--seeds", "a"],
        ["run", "tofu-forget01", "--budget-minutes", "0"],
    ],
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
