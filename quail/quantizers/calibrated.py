"""GPTQ and AWQ by llm-compressor: writes an ordinary compressed-tensors checkpoint.

    python -m quail.quantizers.calibrated CHECKPOINT OUT --method gptq --format ct-int4-sym@64 --calibration TEXT

llm-compressor pins other versions of transformers and compressed-tensors than the rest of the package is tested with,
so it has an environment of its own, and nothing here imports anything of ``quail``: the file runs by its path, too.
GPTQ (https://arxiv.org/abs/2210.17323): blocks of 128 columns, damping of 1 % of the mean diagonal, columns in the
order of their activations with the groups of the original order, so that the scales are those of round-to-nearest. AWQ
(https://arxiv.org/abs/2306.00978): a grid of 20 scales a layer, from activations and weights, then round-to-nearest.
Both are llm-compressor's defaults.
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from unittest import mock

METHODS = ("gptq", "awq")
FORMATS = ("ct-int4-sym", "ct-int4-asym")
DTYPES = ("bfloat16", "float16", "float32")
WINDOWS, LENGTH = 64, 512


def calibrate(
    checkpoint: str,
    out: str,
    method: str,
    format: str,
    texts: list[str],
    dtype: str = "bfloat16",
    windows: int = WINDOWS,
    length: int = LENGTH,
) -> None:
    """Quantizes the linear layers of a causal language model, output head left alone, and saves it to ``out``.

    Args:
        format: one of ``FORMATS``, groups along in_features, of 128 or of the size after an ``@``.
        texts: calibration texts, tokenized, joined and cut into ``windows`` windows of ``length`` tokens; fewer where
            they are shorter.
        dtype: in which the weights are loaded, quantized, and their scales stored.

    Raises:
        ValueError: on a value out of its range, where ``out`` holds something already, where a group does not divide
            a layer, or where llm-compressor is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    recipe, _, group = format.partition("@")
    if recipe not in FORMATS or not (group or "128").isdecimal() or int(group or 128) < 1:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, optionally with @group_size; got {format!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder; got {out}, which already holds something")
    try:
        import llmcompressor
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
    except ImportError as error:
        raise ValueError(f"{method}: expected llm-compressor (pip install llmcompressor); got {error}") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint}: expected a causal language model's folder; got {str(error):.200}") from None
    head = model.get_output_embeddings()
    group = int(group or 128)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head and layer.in_features % group:
            expected = f"a group that divides the {layer.in_features} in_features of {name}"
            raise ValueError(f"format: expected {expected}; got {group}")
    batches = _windows(tokenizer, texts, windows, length)
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    options = {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": scheme | {"symmetric": recipe == "ct-int4-sym"}}
        },
        "ignore": [name for name, module in model.named_modules() if module is head],
    }
    gptq = [GPTQModifier(block_size=128, dampening_frac=0.01, **options)]
    modifiers = gptq if method == "gptq" else [AWQModifier(n_grid=20), QuantizationModifier(**options)]
    with _without_pinned_memory():
        llmcompressor.oneshot(model=model, dataset=torch.utils.data.DataLoader(batches, batch_size=1), recipe=modifiers)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, save_compressed=True)
        tokenizer.save_pretrained(partial)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _without_pinned_memory():
    """llm-compressor 0.14 pins AWQ's cached activations for copies to a GPU where there is none, too, and fails."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available() or not hasattr(IntermediatesCache, "pin_memory"):
        yield
    else:
        with mock.patch.object(IntermediatesCache, "pin_memory", lambda *args, **kwargs: None):
            yield


def _windows(tokenizer, texts: list[str], windows: int, length: int) -> list[dict]:
    import torch

    ids = torch.tensor([token for text in texts for token in tokenizer(text).input_ids], dtype=torch.long)
    pieces = [piece for piece in ids.split(length)[:windows] if len(piece) == length] or [ids]
    if len(pieces[0]) < 2:
        raise ValueError(f"calibration: expected a text of at least two tokens; got {len(pieces[0])}")
    return [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in pieces]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quail.quantizers.calibrated", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="a folder or hub name")
    parser.add_argument("out", help="new folder")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--format", default="ct-int4-sym", help="%(default)s, ct-int4-asym; @64 for another group")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="a text")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="how many windows of text (%(default)s)")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a window (%(default)s)")
    args = parser.parse_args(argv)
    try:
        try:
            texts = [Path(args.calibration).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"calibration: expected a text file; got {args.calibration}: {error}") from None
        for name in ("windows", "length"):
            if getattr(args, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(args, name)}")
        calibrate(args.checkpoint, args.out, args.method, args.format, texts, args.dtype, args.windows, args.length)
    except ValueError as error:
        print(f"quail: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
