"""The command ``quail``. Exit code 0: done; 1: a gate or cells failed; 2: bad input, in one line; 130: interrupted."""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

EXIT_GATE_FAILED, EXIT_CELLS_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 1, 2, 130
DEFAULT_FORMATS = "bnb-nf4,bnb-fp4,ct-int4-sym,minmax-int4"
DEFAULT_CALIBRATION_TOKENS = 2048
DEFAULT_FAKE_QUANT = "bnb-nf4"
# Of the rise in the forget set's NLL, what storing a checkpoint may take back before that is said.
LARGEST_UNDONE = 0.1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(EXIT_BAD_INPUT, f"quail: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by the OpenMP runtime when torch is imported
    args = _parser().parse_args(argv)
    _quiet()
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"quail: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("quail: interrupted, nothing half-written was left", file=sys.stderr)
        return EXIT_INTERRUPTED


def _quiet() -> None:
    """Our own bars and errors only: loading a dozen checkpoints would draw a dozen more."""
    # transformers imports torchao where it is installed, which tells of its GPU libraries and of its own enums.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="quail", description="Unlearn, quantize and audit language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a real model learns, forgets, and is deployed in 4 bits")
    demo.add_argument("--out", default="demo-out", help="new folder for checkpoints and report (%(default)s)")
    demo.add_argument("--model", help="a folder or hub name instead of SmolLM2-135M-Instruct")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    unlearn = commands.add_parser("unlearn", help="make a model forget a set of examples")
    unlearn.add_argument("--model", required=True, help="a folder or hub name")
    unlearn.add_argument("--forget", required=True, help="JSON or JSON-lines file")
    unlearn.add_argument("--retain", help="JSON or JSON-lines file; without one, retain_loss is none")
    unlearn.add_argument("--out", required=True, help="new folder for the unlearned checkpoint")
    unlearn.add_argument("--config", help="YAML file of QuailConfig and TrainingArguments fields")
    unlearn.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="one such field; may be repeated"
    )
    unlearn.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="stored weights; default: as MODEL"
    )
    unlearn.add_argument("--lora-rank", type=int, metavar="R", help="train adapters of this rank; saved merged")
    unlearn.add_argument("--max-length", type=int, default=512, help="tokens an example (%(default)s)")
    unlearn.set_defaults(run=_unlearn)

    audit = commands.add_parser("audit", help="compare the buckets of two checkpoints")
    audit.add_argument("before", help="a folder, a GGUF file or a hub name")
    audit.add_argument("after", help="the same, or the folder of a PEFT adapter of BEFORE")
    audit.add_argument("--formats", default=DEFAULT_FORMATS, help="comma-separated (%(default)s)")
    audit.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in which the deployment loads")
    audit.add_argument("--device", help="where weights are compared; default: a CUDA device, else the CPU")
    audit.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a text file or a JSON set: AFTER reads it, and the report says what arrives in the layers' outputs; "
        "takes the memory of one model",
    )
    audit.add_argument(
        "--calibration-tokens", type=int, default=DEFAULT_CALIBRATION_TOKENS, help="of it at most (%(default)s)"
    )
    audit.add_argument("--json", metavar="FILE", help="also write the whole report there")
    audit.add_argument("--html", metavar="FILE", help="also write it as a page, with a heat map of layers")
    audit.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 where it holds of a recipe, as 'delivered_share<0.5' or 'bnb-nf4:lost_layers>0'; "
        "may be repeated",
    )
    audit.add_argument("--resume", metavar="FILE", help="keep what is done there, go on from it, remove it at the end")
    audit.set_defaults(run=_audit)

    evaluate = commands.add_parser("evaluate", help="score checkpoints as deployed")
    evaluate.add_argument("models", nargs="+", metavar="MODEL")
    evaluate.add_argument("--quantizers", default="none,bnb-nf4,bnb-fp4", help="comma-separated (%(default)s)")
    evaluate.add_argument("--forget", required=True)
    evaluate.add_argument("--retain")
    evaluate.add_argument("--text", help="a text file for perplexity; default: the embedded one")
    evaluate.add_argument("--calibration", metavar="FILE", help="a text file, for the quantizers gptq:... and awq:...")
    evaluate.add_argument("--limit", type=int, help="only the first so many examples of each set")
    evaluate.add_argument("--json", metavar="FILE", help="also write every answer there")
    evaluate.set_defaults(run=_evaluate)

    run = commands.add_parser("run", help="run a recipe: learn, unlearn by many methods, score at every precision")
    run.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe of the package")
    run.add_argument("--list", action="store_true", help="the recipes of the package")
    run.add_argument("--out", metavar="RUN", help="the run's folder, new or to go on with (runs/RECIPE)")
    run.add_argument("--quick", action="store_true", help="the recipe's short form")
    run.add_argument("--seeds", metavar="LIST", help="instead of the recipe's, as 0,1,2")
    run.add_argument("--only", metavar="GLOB,...", help="methods that fit one, by name or as REGIME/METHOD")
    run.add_argument("--data", metavar="FOLDER", help="where the recipe's data folder lies; default: $QUAIL_DATA")
    run.add_argument("--budget-minutes", type=float, metavar="N", help="stop before a cell that would end later")
    run.set_defaults(run=_run)

    report = commands.add_parser("report", help="what a run found: a page, and Markdown")
    report.add_argument("path", metavar="RUN", help="a run's folder or its RESULTS.json")
    report.add_argument("--html", metavar="FILE", help="write a page that needs nothing beside it")
    report.add_argument("--markdown", metavar="FILE", help="write the Markdown that is printed")
    report.set_defaults(run=_report)
    return parser


def _demo(args) -> None:
    from .demo import run_demo
    from .report import markdown

    print(markdown(run_demo(args.out, args.model, args.seed)))
    print(f"Written: {args.out}/report.md, report.json, report.png, and the checkpoints beside them.")


def _unlearn(args) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output_dir whether it writes or not
        _unlearn_into(args, scratch)


def _unlearn_into(args, scratch: str) -> None:
    import torch

    from .data import load_examples, load_refusals
    from .models import load_for_training, refuse_to_overwrite, save_checkpoint
    from .trainer import QuailConfig, QuailTrainer, make_dataset
    from .weights import store_in_

    out = refuse_to_overwrite(args.out)
    forget = load_examples(args.forget)
    retain = load_examples(args.retain) if args.retain else None
    chosen = _chosen(args)
    config = QuailConfig(**_settings(chosen, scratch, retain is not None))
    load_refusals(config.idk_answers)  # a file that cannot be read is said before a model is loaded
    stored = _stored_dtype(args.model)
    model, tokenizer = load_for_training(args.model)
    if config.fake_quant and "fake_quant" not in chosen:
        config.fake_quant = _recipe_for(model, args.model)
    dataset = make_dataset(config, tokenizer, forget, retain, args.max_length)
    trainer = QuailTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    dtype = (getattr(torch, args.dtype) if args.dtype else stored) or torch.float32
    before = _mean_nll(trainer.model, dataset.forget, tokenizer)
    trainer.train()
    unlearned = trainer.unlearned()
    trained = _mean_nll(unlearned, dataset.forget, tokenizer)
    saved = _mean_nll(store_in_(unlearned, dtype), dataset.forget, tokenizer)
    save_checkpoint(unlearned.cpu(), tokenizer, out, dtype)
    how = f"hinge margin {trainer.hinge_margin:.4g}" if config.gamma else "no hinge"
    if config.fake_quant:
        how += f", passes on {config.fake_quant} weights"
    name = str(dtype).removeprefix("torch.")
    print(f"Unlearned {len(forget)} examples in {trainer.state.global_step} steps ({how}); saved {out} in {name}.")
    print(f"NLL of the forget set per token: {before:.3f} before, {trained:.3f} trained, {saved:.3f} as saved.")
    undone = (trained - saved) / (trained - before) if trained > before else 0.0
    if undone > LARGEST_UNDONE:
        print(
            f"quail: storing it in {name} undoes {undone:.0%} of that: its numbers are coarser than the update; "
            "--dtype float32 keeps all of it, a higher learning rate or more epochs more",
            file=sys.stderr,
        )


def _mean_nll(model, rows, tokenizer) -> float:
    """Nats per token of all answers together, without dropout."""
    from .inference import row_scores

    log_probs = [score.log_probs for score in row_scores(model, rows, tokenizer)]
    return -sum(map(sum, log_probs)) / sum(map(len, log_probs))


def _recipe_for(model, name: str) -> str:
    """On whose weights the training passes run where nothing is said: the recipe that the model was shipped in, or NF4.

    In the experiments they held on the grid that the weights started on, and not from there on another one (README).
    """
    from .weights import lies_on_a_grid, recipe_of_grid

    found = recipe_of_grid(model)
    if found is None and lies_on_a_grid(model):
        print(
            f"quail: {name} lies on the grid of a 4-bit recipe that cannot be told from its weights; what passes on "
            f"{DEFAULT_FAKE_QUANT} weights unlearn can come back in that recipe: name it, --set fake_quant=RECIPE",
            file=sys.stderr,
        )
    elif found not in (None, DEFAULT_FAKE_QUANT):
        print(f"quail: {name} lies on the grid of {found}: training passes run on its weights", file=sys.stderr)
    return found or DEFAULT_FAKE_QUANT


def _chosen(args) -> dict:
    """QuailConfig's fields that the user gives: the YAML file, then --set."""
    import yaml

    chosen = {}
    if args.config:
        try:
            loaded = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{args.config}: expected a YAML file; got {error}") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"{args.config}: expected a mapping of fields; got {type(loaded).__name__}")
        chosen |= loaded
    for pair in args.set:
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected FIELD=VALUE; got {pair!r}")
        chosen[field] = _number(yaml.safe_load(value))
    if args.lora_rank is not None:
        chosen["lora_rank"] = args.lora_rank
    return chosen


def _settings(chosen: dict, scratch: str, has_retain: bool) -> dict:
    """QuailConfig's fields: our defaults, then what the user chose.

    The default method is GA+GDR with training passes on the weights as they are deployed (``_recipe_for``), which with
    NF4 came third in the experiments' classifier and first in their language model (README); without those passes where
    another way to the weights is chosen.
    """
    import dataclasses

    import torch

    from .trainer import QuailConfig

    settings = {
        "output_dir": scratch,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "num_train_epochs": 5,
        "gamma": 0.0,
        "learning_rate": 1e-5,
    }
    other_ways = {"lora_rank": None, "floor_format": None, "weight_noise": "none", "saliency": "none"}
    is_plain = any(chosen.get(field, unset) != unset for field, unset in other_ways.items())
    if chosen.get("fake_quant", None if is_plain else DEFAULT_FAKE_QUANT) is not None:
        # Master weights have to go a whole step before what the passes see of them changes.
        settings |= {"fake_quant": DEFAULT_FAKE_QUANT, "learning_rate": 1e-4}
    if not has_retain:
        settings["retain_loss"] = "none"
    settings |= chosen
    known = {field.name: field.type for field in dataclasses.fields(QuailConfig) if field.init}
    for field, value in settings.items():
        if field not in known:
            raise ValueError(f"{field}: expected a field of QuailConfig or TrainingArguments; got {field!r}")
        kind = known[field]
        if kind in (bool, int, float) and type(value) not in {bool: (bool,), int: (int,), float: (int, float)}[kind]:
            raise ValueError(f"{field}: expected {kind.__name__}; got {value!r}")
    return settings


def _number(value):
    """YAML 1.1 reads 1e-5 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _stored_dtype(model: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).dtype
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: expected a model's folder or hub name; got {str(error):.200}") from None


def _audit(args) -> int:
    from .auditing import audit
    from .auditing.gates import parse_gate

    formats = _names(args.formats)
    gates = [parse_gate(text, formats, args.calibration is not None) for text in args.fail_if]
    for option in ("json", "html"):
        _refuse_to_overwrite(option, getattr(args, option))
    report = audit(
        args.before,
        args.after,
        formats,
        dtype=args.dtype,
        device=args.device,
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
        resume=args.resume,
    )
    if args.json:
        _write("json", args.json, report.to_json())
    if args.html:
        _write("html", args.html, report.to_html())
    print(report.to_markdown())
    failures = [line for gate in gates for line in gate.failures(report)]
    for line in failures:
        print(f"quail: gate failed: {line}", file=sys.stderr)
    return EXIT_GATE_FAILED if failures else 0


def _evaluate(args) -> None:
    from importlib import resources

    from .data import load_examples
    from .evaluate import evaluate
    from .models import load_tokenizer
    from .quantizers import check, deploy

    quantizers = _names(args.quantizers)
    for quantizer in quantizers or ("",):
        check(quantizer)
    forget = load_examples(args.forget)[: args.limit]
    retain = load_examples(args.retain)[: args.limit] if args.retain else []
    embedded = resources.files("quail") / "sets" / "general_text.txt"
    text = _text(args.text) if args.text else embedded.read_text(encoding="utf-8")
    calibration = [_text(args.calibration)] if args.calibration else None
    results = []
    print("| model | quantizer | forget NLL | RgL | EM | retain NLL | RgL | EM | ppl |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        tokenizer = load_tokenizer(name)
        for quantizer in quantizers:
            model = deploy(name, quantizer, calibration=calibration)
            r = evaluate(model, tokenizer, forget, retain, name=name, quantizer=quantizer, text=text)
            sides = [
                f"{side.nll:.3f} | {side.rouge_l:.2f} | {side.exact:.2f}" if side else "- | - | -"
                for side in (r.forget, r.retain)
            ]
            print(f"| {name} | {quantizer} | {sides[0]} | {sides[1]} | {r.perplexity:.1f} |", flush=True)
            results.append(r.to_dict())
    if args.json:
        _write("json", args.json, json.dumps(results, indent=1))


def _run(args) -> int:
    from .experiments.recipe import RecipeError, about, find_recipe, load_recipe, packaged_recipes
    from .experiments.runner import run

    if args.list:
        for name, path in packaged_recipes().items():
            print(f"{name}: {about(path)}")
        return 0
    if args.recipe is None:
        raise ValueError("recipe: expected a YAML file or the name of a recipe of the package (--list); got nothing")
    if args.budget_minutes is not None and not args.budget_minutes > 0:
        raise ValueError(f"budget-minutes: expected a number above 0; got {args.budget_minutes}")
    try:
        seeds = None if args.seeds is None else tuple(dict.fromkeys(int(seed) for seed in _names(args.seeds)))
    except ValueError:
        seeds = ()
    if seeds is not None and (not seeds or min(seeds) < 0):
        raise ValueError(f"seeds: expected integers of at least 0, as 0,1,2; got {args.seeds!r}")
    try:
        recipe = load_recipe(find_recipe(args.recipe), quick=args.quick)
    except RecipeError as error:
        for line in error.problems:
            print(f"quail: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    out = args.out or f"runs/{recipe.name}{'-quick' if args.quick else ''}"
    outcome = run(
        recipe,
        out,
        seeds=seeds,
        only=args.only,
        data=args.data,
        budget_minutes=args.budget_minutes,
        say=lambda line: print(line, flush=True),
    )
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    print(f"{outcome.done} of {outcome.planned} cells done{failed}; results: {out}/RESULTS.json")
    return EXIT_CELLS_FAILED if outcome.failed else 0


def _report(args) -> None:
    from .reporting import markdown, page, read_run

    for option in ("html", "markdown"):
        _refuse_to_overwrite(option, getattr(args, option))
    run = read_run(args.path)
    text = markdown(run)
    if args.html:
        _write("html", args.html, page(run))
    if args.markdown:
        _write("markdown", args.markdown, text)
    print(text, end="")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: expected a text file; got {error.strerror}") from None


def _refuse_to_overwrite(option: str, path: str | None) -> None:
    if path is not None and Path(path).exists():
        raise ValueError(f"{option}: expected a new file; got {path}, which already exists")


def _write(option: str, path: str, text: str) -> None:
    """Whole or not at all, and never over something that is there."""
    _refuse_to_overwrite(option, path)
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        raise ValueError(f"{option}: expected a file that can be written; got {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
