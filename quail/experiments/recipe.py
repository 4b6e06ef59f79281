"""What a recipe may hold, and its check: whole, before any model or data is loaded.

A recipe is a YAML file; ``README.md`` beside this file shows one and says what each key does. ``load_recipe`` finds
every fault of a file, not only the first: a ``RecipeError`` carries one line for each.
"""

import dataclasses
import functools
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from .tasks import TASKS

REGIME_16BIT, REGIME_GRID = "16bit", "grid:"
KEEP = ("starts", "all")
STOP_WEIGHTS = ("trained", "saved")
_OWN_METHOD_KEYS = {"stop_at": float, "regimes": list}
# The runner decides these: where a cell trains, what it writes, and its seed.
_RUNNERS_FIELDS = {"output_dir", "seed", "data_seed", "use_cpu", "bf16", "fp16", "save_strategy", "logging_strategy"}


class RecipeError(ValueError):
    """A recipe with faults; ``problems`` has one line for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Learn:
    """How the base model is fine-tuned on everything before anything is forgotten: AdamW on fp32 weights.

    The rate rises over ``warmup_steps`` and then falls linearly to 0 at the end of ``epochs``.
    """

    learning_rate: float
    epochs: int
    batch_size: int = 16
    warmup_steps: int = 5
    max_grad_norm: float = 1.0

    def __post_init__(self):
        _check_range(self, above_zero=("learning_rate", "epochs", "batch_size", "max_grad_norm"))
        _check_range(self, at_least_zero=("warmup_steps",))


@dataclass(frozen=True)
class Stop:
    """When unlearning ends: as soon as ``metric`` of the forget set's validation half is at most ``at``.

    It is looked at after every ``every``-th step, on the weights as they are ``trained``, in fp32, or as they are
    ``saved``, in bf16. A method's ``max_steps`` ends it in any case.
    """

    metric: str
    at: float
    every: int = 1
    weights: str = "trained"

    def __post_init__(self):
        _check_range(self, above_zero=("every",), at_least_zero=("at",))
        if self.weights not in STOP_WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(STOP_WEIGHTS)}; got {self.weights!r}")

    def inputs(self) -> dict:
        """What of it decides the result; as before ``weights`` could be chosen, where it is not."""
        fields = dataclasses.asdict(self)
        if self.weights == "trained":
            del fields["weights"]
        return fields


@dataclass(frozen=True)
class Calibration:
    """How many of the task's texts a quantizer that calibrates (``gptq:``, ``awq:``) is given, at most."""

    texts: int

    def __post_init__(self):
        _check_range(self, above_zero=("texts",))


@dataclass(frozen=True)
class Method:
    """One way to unlearn: fields of ``QuailConfig``, when it stops if not at ``stop.at``, and in which regimes."""

    name: str
    fields: dict
    stop_at: float | None = None
    regimes: tuple[str, ...] | None = None

    def inputs(self) -> dict:
        """What of it decides the result: neither its name nor the regimes that it is run in."""
        return {"fields": self.fields} | ({} if self.stop_at is None else {"stop_at": self.stop_at})


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``raw`` is the mapping that it was read from, the quick form's changes made."""

    name: str
    path: Path
    task: str
    settings: object
    data: str | None
    model: str | None
    learn: Learn | None
    stop: Stop
    seeds: tuple[int, ...]
    regimes: tuple[str, ...]
    quantizers: tuple[str, ...]
    calibration: Calibration | None
    methods: tuple[Method, ...]
    audit: tuple[str, ...]
    keep_checkpoints: str
    quick: bool
    raw: dict = field(repr=False)

    def data_folder(self, given: str | os.PathLike | None = None) -> Path | None:
        """The folder of the recipe's data: below ``given``, else $QUAIL_DATA, else the recipe's own folder.

        None where the task needs none. Raises ValueError where the folder is in none of them.
        """
        if self.data is None:
            return None
        places = [Path(place) for place in (given, os.environ.get("QUAIL_DATA"), self.path.parent) if place]
        for place in places:
            if (place / self.data).is_dir():
                return (place / self.data).resolve()
        expected = f"expected the folder {self.data} below --data, QUAIL_DATA or the recipe's folder"
        raise ValueError(f"data: {expected}; got none in {', '.join(map(str, places))}")


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("quail") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """The file that is meant: a path that exists, else a recipe of the package. Raises ValueError."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = packaged_recipes()
    if path.stem in known and str(path) in (path.stem, path.name, f"recipes/{path.name}"):
        return known[path.stem]
    raise ValueError(f"recipe: expected a YAML file or one of {', '.join(known)}; got {name_or_path!r}")


def about(path: str | os.PathLike) -> str:
    """A recipe's own line about itself, unchecked; empty where it has none."""
    return (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("about", "")


def load_recipe(path: str | os.PathLike, *, quick: bool = False) -> Recipe:
    """Reads and checks a recipe; ``quick`` makes the changes that its ``quick:`` section names.

    Raises RecipeError with every fault; nothing but the file itself, and no model and no data, is read.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError([f"{path.name}: expected a YAML file; got {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise RecipeError([f"{path.name}: expected a mapping of keys; got {type(raw).__name__}"])
    problems: list[str] = []
    raw = _with_numbers(raw)
    changes = raw.pop("quick", None)
    if changes is not None:
        # Both forms are checked whichever is run, so that the rarer one does not rot.
        changed = _changed(raw, changes, problems)
        checked = [_check(path, form, is_quick, problems) for form, is_quick in ((raw, False), (changed, True))]
    elif quick:
        problems.append("quick: expected a section of that name in the recipe; got none")
        checked = [None, None]
    else:
        checked = [_check(path, raw, False, problems), None]
    if problems:
        raise RecipeError([f"{path.name}: {line}" for line in dict.fromkeys(problems)])
    return checked[1 if quick else 0]


def _check(path: Path, raw: dict, quick: bool, problems: list[str]) -> Recipe | None:
    before = len(problems)
    known = {
        "about": str,
        "task": str,
        "data": str,
        "model": str,
        "settings": dict,
        "learn": dict,
        "stop": dict,
        "seeds": list,
        "regimes": list,
        "quantizers": list,
        "calibration": dict,
        "audit": list,
        "keep_checkpoints": str,
        "defaults": dict,
        "methods": dict,
    }
    for key, value in raw.items():
        if key not in known:
            problems.append(f"{key}: expected one of {', '.join(known)}, quick; got an unknown key")
        elif value is not None and not isinstance(value, known[key]):
            problems.append(f"{key}: expected {_kind(known[key])}; got {value!r:.80}")
    raw = {k: v for k, v in raw.items() if k in known and (v is None or isinstance(v, known[k]))}
    for key in ("task", "stop", "seeds", "regimes", "quantizers", "methods"):
        if not raw.get(key):
            problems.append(f"{key}: expected to be given; got nothing")
    task = TASKS.get(raw.get("task"))
    if raw.get("task") and task is None:
        problems.append(f"task: expected one of {', '.join(TASKS)}; got {raw['task']!r}")
    settings = _build(task.Settings, raw.get("settings") or {}, "settings", problems) if task else None
    learn = _build(Learn, raw["learn"], "learn", problems) if raw.get("learn") else None
    stop = _build(Stop, raw["stop"], "stop", problems) if raw.get("stop") else None
    if task and stop and stop.metric not in task.stop_metrics:
        problems.append(f"stop.metric: expected one of {', '.join(task.stop_metrics)}; got {stop.metric!r}")
    if task and task.needs_data and not raw.get("data"):
        problems.append(f"data: expected the folder of the data of {task.name}; got nothing")
    seeds = raw.get("seeds") or []
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        problems.append(f"seeds: expected different integers of at least 0; got {seeds}")
    regimes = _checked(raw.get("regimes"), "regimes", check_regime, problems)
    sound = len(regimes) == len(raw.get("regimes") or ())
    quantizers = _checked(raw.get("quantizers"), "quantizers", check_quantizer, problems)
    if quantizers and "none" not in quantizers:
        problems.append("quantizers: expected none among them, the unquantized model that others are compared with")
    calibration = None
    if raw.get("calibration") is not None:
        calibration = _build(Calibration, raw["calibration"], "calibration", problems)
    for name in filter(calibrates, quantizers):
        if raw.get("calibration") is None:
            problems.append(f"calibration: expected {{texts: N}} for {name}; got nothing")
        if task and task.auto is not AutoModelForCausalLM:
            problems.append(f"quantizers: expected none that calibrates for {task.name}, no language model; got {name}")
    audit = _checked(raw.get("audit"), "audit", _check_format, problems)
    keep = raw.get("keep_checkpoints") or "starts"
    if keep not in KEEP:
        problems.append(f"keep_checkpoints: expected one of {', '.join(KEEP)}; got {keep!r}")
    defaults = raw.get("defaults") or {}
    methods = []
    for name, own in (raw.get("methods") or {}).items():
        if not isinstance(own, dict):
            problems.append(f"methods.{name}: expected a mapping of fields; got {own!r:.80}")
            continue
        method = _method(str(name), defaults, own, regimes if sound else None, problems)
        if task and method and method.fields.get("forget_loss") not in (None, *task.forget_losses):
            expected = f"expected one of {', '.join(task.forget_losses)} for {task.name}"
            problems.append(f"methods.{name}.forget_loss: {expected}; got {method.fields['forget_loss']!r}")
        if method is not None:
            methods.append(method)
    if len(problems) > before:
        return None
    return Recipe(
        name=path.stem,
        path=path.resolve(),
        task=raw["task"],
        settings=settings,
        data=raw.get("data"),
        model=raw.get("model"),
        learn=learn,
        stop=stop,
        seeds=tuple(seeds),
        regimes=regimes,
        quantizers=quantizers,
        calibration=calibration,
        methods=tuple(methods),
        audit=audit,
        keep_checkpoints=keep,
        quick=quick,
        raw=raw,
    )


def check_regime(name: str) -> None:
    """Raises ValueError where ``name`` is neither ``16bit`` nor ``grid:FORMAT``."""
    if name == REGIME_16BIT:
        return
    if not name.startswith(REGIME_GRID):
        raise ValueError(f"regime: expected {REGIME_16BIT} or {REGIME_GRID}FORMAT; got {name!r}")
    _check_format(name.removeprefix(REGIME_GRID))


def check_quantizer(name: str) -> None:
    """Raises ValueError where ``quail.quantizers`` has no quantizer of that name."""
    from quail import quantizers

    quantizers.check(name)


def calibrates(quantizer: str) -> bool:
    """Whether a quantizer's result depends on calibration texts."""
    from quail.quantizers.calibrated import METHODS

    return quantizer.partition(":")[0] in METHODS


def _check_format(name: str) -> None:
    from quail_kernels import get_format

    get_format(name)


def _checked(names, where: str, check, problems: list[str]) -> tuple[str, ...]:
    good = []
    for name in names or ():
        try:
            if not isinstance(name, str):
                raise ValueError(f"expected a name; got {name!r}")
            check(name)
            good.append(name)
        except ValueError as error:
            problems.append(f"{where}: {' '.join(str(error).split())}")
    if len(set(good)) != len(good):
        problems.append(f"{where}: expected each name once; got {', '.join(good)}")
    return tuple(good)


def _method(name: str, defaults: dict, own: dict, regimes, problems: list[str]) -> Method | None:
    from ..trainer import QuailConfig

    kinds = {f.name: f.type for f in dataclasses.fields(QuailConfig) if f.init and f.name not in _RUNNERS_FIELDS}
    before, where = len(problems), f"methods.{name}"
    merged = {key: value for key, value in (defaults | own).items() if value is not None or key in own}
    extra = {key: merged.pop(key) for key in _OWN_METHOD_KEYS if key in merged}
    for key, value in merged.items():
        if key not in kinds:
            reason = "a field that the runner sets itself" if key in _RUNNERS_FIELDS else "an unknown field"
            expected = f"expected a field of QuailConfig or one of {', '.join(_OWN_METHOD_KEYS)}"
            problems.append(f"{where}.{key}: {expected}; got {reason}")
        elif kinds[key] in (bool, int, float) and not _is_of(value, kinds[key]):
            problems.append(f"{where}.{key}: expected {kinds[key].__name__}; got {value!r:.80}")
    for key, value in extra.items():
        if not _is_of(value, _OWN_METHOD_KEYS[key]):
            problems.append(f"{where}.{key}: expected {_kind(_OWN_METHOD_KEYS[key])}; got {value!r:.80}")
    if isinstance(extra.get("regimes"), list) and regimes is not None and not set(extra["regimes"]) <= set(regimes):
        problems.append(f"{where}.regimes: expected some of {', '.join(regimes)}; got {extra['regimes']!r:.80}")
    if not merged.get("max_steps", 0) or (_is_of(merged["max_steps"], int) and merged["max_steps"] < 1):
        problems.append(f"{where}.max_steps: expected an integer above 0; got {merged.get('max_steps')!r}")
    if len(problems) == before:
        if problem := _problem_of(json.dumps(merged, sort_keys=True)):
            problems.append(f"{where}.{problem}")
    if len(problems) > before:
        return None
    chosen = extra.pop("regimes", None)
    return Method(name, merged, regimes=tuple(chosen) if chosen is not None else None, **extra)


@functools.cache
def _problem_of(fields: str) -> str | None:
    """What QuailConfig says against fields, given as JSON. Kept, as making one takes a while."""
    from ..trainer import QuailConfig

    try:
        with tempfile.TemporaryDirectory() as scratch:
            QuailConfig(output_dir=scratch, use_cpu=True, save_strategy="no", **json.loads(fields))
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def _changed(raw: dict, changes, problems: list[str]) -> dict:
    """The quick form: mappings are merged, everything else is replaced; ``methods`` is a list of those to keep."""
    if not isinstance(changes, dict):
        problems.append(f"quick: expected a mapping of keys; got {type(changes).__name__}")
        return raw
    form = dict(raw)
    for key, value in changes.items():
        if key == "methods":
            known = raw.get("methods") or {}
            names = value if isinstance(value, list) else [value]
            for name in names:
                if name not in known:
                    problems.append(f"quick.methods: expected names of methods of the recipe; got {name!r}")
            form["methods"] = {name: known[name] for name in names if name in known} or known
        elif isinstance(value, Mapping) and isinstance(raw.get(key), Mapping):
            form[key] = raw[key] | value
        else:
            form[key] = value
    for name, own in (form.get("methods") or {}).items():
        if isinstance(own, dict) and isinstance(own.get("regimes"), list) and isinstance(form.get("regimes"), list):
            kept = [regime for regime in own["regimes"] if regime in form["regimes"]]
            form["methods"] = form["methods"] | {name: own | {"regimes": kept}}
    return form


def _build(kind, values: dict, where: str, problems: list[str]):
    """The dataclass ``kind`` from a mapping; faults become lines, and then it is None."""
    before = len(problems)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{where}.{key}: expected one of {', '.join(fields)}; got an unknown key")
        elif not _is_of(value, fields[key].type):
            problems.append(f"{where}.{key}: expected {_kind(fields[key].type)}; got {value!r:.80}")
    for name, f in fields.items():
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and name not in values:
            problems.append(f"{where}.{name}: expected to be given; got nothing")
    if len(problems) > before:
        return None
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except ValueError as error:
        problems.append(f"{where}.{' '.join(str(error).split())}")
        return None


def _is_of(value, kind) -> bool:
    """Whether a YAML value is of a field's type: a class, ``tuple[X, ...]`` or ``X | None``."""
    arguments = getattr(kind, "__args__", None)
    if arguments and getattr(kind, "__origin__", None) is tuple:
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value)
    if arguments:
        return any(_is_of(value, argument) for argument in arguments)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return type(value) is int
    return isinstance(value, kind)


def _kind(kind) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
    }
    if getattr(kind, "__origin__", None) is tuple:
        return "a list"
    arguments = getattr(kind, "__args__", None)
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _with_numbers(value):
    """YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_range(of, above_zero=(), at_least_zero=()) -> None:
    for name in above_zero:
        if not getattr(of, name) > 0:
            raise ValueError(f"{name}: expected a number above 0; got {getattr(of, name)}")
    for name in at_least_zero:
        if not getattr(of, name) >= 0:
            raise ValueError(f"{name}: expected a number of at least 0; got {getattr(of, name)}")
