"""`jaxsparse delta`: what can be done with deltas; one subcommand a function."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from jaxsparse import deltas
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.delta_files import check_out, dtype_of, named_paths, said_of, size_on_disk
from jaxsparse.cli.delta_info import InfoConfig, info
from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.common.progress import progress
from jaxsparse.models.checkpoints import Checkpoint, export_hugging_face, load, save
from jaxsparse.subspaces.targets import matrix_view, tree_size

__all__ = ["main"]

_DType = Literal["float32", "bfloat16", "float16"] | None
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class DiffConfig:
    """Makes a delta of two models: what turns the base into the tuned one, bit for bit.

    Matrices of which whole input or output slices changed are kept as slices.

    Example: jaxsparse delta diff --base models/smollm2 --tuned models/tuned --out runs/first/delta
    """

    base: str
    """The base: a folder (ours or Hugging Face's), a .gguf or llama2.c file, or a known name such as smollm2-135m."""
    tuned: str
    """The tuned model, of the same architecture."""
    out: Path
    """The folder to make, or a file that ends in .safetensors for the form of a single file."""
    dtype: _DType = None
    """Dtype of both models' weights, to which the delta then belongs; None keeps what their files have."""
    overwrite: _Flag = False
    """Replace what is there."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class ApplyConfig:
    """Merges a delta into its base and writes the tuned model as a checkpoint of its own.

    Example: jaxsparse delta apply --model smollm2-135m --delta runs/first/delta --out models/tuned
    """

    model: str
    """The delta's base: a folder, a file or a known name."""
    delta: Path
    """The delta."""
    out: Path
    """The folder to make."""
    to: Literal["jaxsparse", "hugging_face"] = "jaxsparse"
    """The format to write."""
    name: str | None = None
    """What reports call the model; None: the names of base and delta."""
    overwrite: _Flag = False
    """Replace a folder that exists."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class RevertConfig:
    """Takes a delta out of a tuned model again and writes the base, bit for bit.

    Example: jaxsparse delta revert --model models/tuned --delta runs/first/delta --out models/base
    """

    model: str
    """The tuned model: a folder, a file or a known name."""
    delta: Path
    """The delta that made it."""
    out: Path
    """The folder to make."""
    base: str | None = None
    """The base, for deltas with low-rank factors: out of a rounded sum it does not come back."""
    to: Literal["jaxsparse", "hugging_face"] = "jaxsparse"
    """The format to write."""
    name: str | None = None
    """What reports call the model; None: what the delta calls its base."""
    overwrite: _Flag = False
    """Replace a folder that exists."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class MixConfig:
    """Makes one delta of several deltas of one base.

    sum adds what they change, times weights; ties trims, elects signs and takes means; dare drops at random and
    rescales; dare_ties does both. Deltas that change no weight in common are mixed exactly; `jaxsparse delta info` of
    several tells how many they share.

    Example: jaxsparse delta mix --model smollm2-135m --delta runs/math/delta --delta runs/code/delta --weights 0.7 0.3
    --out runs/both
    """

    model: str
    """The base of all of them: a folder, a file or a known name."""
    delta: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
    """The deltas: NAME=PATH, or a path, whose folder's name then names it."""
    out: Path
    """The folder to make, or a file that ends in .safetensors for the form of a single file."""
    weights: tuple[float, ...] | None = None
    """A weight for each delta; None: 1 for all."""
    how: Literal["sum", "ties", "dare", "dare_ties"] = "sum"
    """How to mix."""
    density: float | None = None
    """The share of its changes that every delta keeps, for all but sum."""
    seed: int = 0
    """The only source of randomness, for dare and dare_ties."""
    overlap: Literal["sum", "first", "error"] = "sum"
    """What to do with weights that several deltas change: add, leave them to the first delta, or stop."""
    overwrite: _Flag = False
    """Replace what is there."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class ExportConfig:
    """Writes a delta for others: PEFT's adapter folder, a file of entries, or a merged Hugging Face model.

    Example: jaxsparse delta export --delta runs/lora/delta --model smollm2-135m --to peft --out adapters/lora
    """

    delta: Path
    """The delta."""
    model: str
    """Its base: a folder, a file or a known name."""
    to: Literal["peft", "entries", "hugging_face"]
    """peft: a LoRA adapter, of factors or slices; entries: index, old and new value of every entry that changes, in a
    .safetensors file for a few lines of torch; hugging_face: the tuned model."""
    out: Path
    """The folder or, for entries, the .safetensors file to make."""
    base_name: str | None = None
    """For peft: the base as its users name it, such as HuggingFaceTB/SmolLM2-135M; None: what the delta calls it."""
    overwrite: _Flag = False
    """Replace what is there."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class ImportConfig:
    """Makes a delta of an adapter that others trained.

    Example: jaxsparse delta import --from-peft adapters/lora --model smollm2-135m --out runs/lora/delta
    """

    from_peft: Path
    """A folder of PEFT's, with adapter_config.json and adapter_model.safetensors."""
    model: str
    """Its base: a folder, a file or a known name."""
    out: Path
    """The folder to make, or a file that ends in .safetensors for the form of a single file."""
    dtype: _DType = None
    """Dtype of the weights, to which the delta then belongs; None keeps what the model's files have."""
    overwrite: _Flag = False
    """Replace what is there."""
    json: _Flag = False
    """Print JSON."""


def _diff(config: DiffConfig) -> None:
    check_out(config.out, config.overwrite, config.base, config.tuned)
    with progress("diff", 3) as advance:
        advance(0, "reading the base")
        base = load(config.base, dtype=config.dtype)
        advance(1, "reading the tuned model")
        tuned = load(config.tuned, dtype=config.dtype)
        advance(1, "comparing")
        # Layers are stacked on the first axis of this package's models.
        slices = {
            path: matrix_view(leaf.shape, (0,), (1,), (2,))
            for path, leaf in flatten_with_paths(base.params)[0]
            if path.endswith("/kernel") and leaf.ndim == 3
        }
        delta = deltas.diff(
            base.params, tuned.params, slices=slices, base_name=base.name, base_fingerprint=base.fingerprint
        )
        deltas.save(config.out, delta, overwrite=config.overwrite)
        advance(1, "written")
    _say_delta(config.out, delta, as_json=config.json)


def _apply(config: ApplyConfig) -> None:
    check_out(config.out, config.overwrite, config.model, config.delta)
    with progress("apply", 3) as advance:
        advance(0, "reading the model")
        delta = deltas.load(config.delta)
        base = load(config.model, dtype=dtype_of(delta))
        advance(1, "applying")
        params = deltas.apply(base.params, delta, donate=True, base_fingerprint=base.fingerprint)
        advance(1, "writing")
        name = config.name or f"{base.name}+{next(iter(named_paths([str(config.delta)])))}"
        tuned = _write(config, base, params, name, f"{config.model} with the delta {config.delta}")
        advance(1, "written")
    _say_model(config.out, tuned, {}, as_json=config.json)


def _revert(config: RevertConfig) -> None:
    check_out(config.out, config.overwrite, config.model, config.delta)
    with progress("revert", 3) as advance:
        advance(0, "reading the model")
        delta = deltas.load(config.delta)
        if not delta.exact and config.base is None:
            raise InputError(
                f"{config.delta} holds low-rank factors, out of which no base comes back: give --base MODEL"
            )
        dtype = dtype_of(delta)
        tuned = load(config.model, dtype=dtype)
        base = load(config.base, dtype=dtype).params if config.base is not None and not delta.exact else None
        advance(1, "reverting")
        params = deltas.revert(tuned.params, delta, base=base, donate=True)
        advance(1, "writing")
        name = config.name or delta.metadata.base_name or tuned.name
        restored = _write(config, tuned, params, name, f"{config.model} without the delta {config.delta}")
        advance(1, "written")
    expected = delta.metadata.base_fingerprint
    is_base = None if expected is None else restored.fingerprint == expected
    _say_model(config.out, restored, {"is_base": is_base}, as_json=config.json)


def _mix(config: MixConfig) -> None:
    paths = named_paths([text for group in config.delta for text in group])
    check_out(config.out, config.overwrite, config.model, *paths.values())
    if not paths:
        raise InputError("give at least one --delta to mix")
    with progress("mix", 3) as advance:
        advance(0, "reading the model")
        loaded = {name: deltas.load(path) for name, path in paths.items()}
        base = load(config.model, dtype=dtype_of(next(iter(loaded.values()))))
        advance(1, "mixing")
        options = {name: getattr(config, name) for name in ("weights", "how", "density", "seed", "overlap")}
        mixed = deltas.mix(loaded, base=base.params, base_fingerprint=base.fingerprint, **options)
        advance(1, "writing")
        deltas.save(config.out, mixed, overwrite=config.overwrite)
        advance(1, "written")
    _say_delta(config.out, mixed, as_json=config.json)


def _export(config: ExportConfig) -> None:
    if config.to == "entries" and config.out.suffix != ".safetensors":
        raise InputError(f"--out of entries is a file and must end in .safetensors, got {config.out}")
    check_out(config.out, config.overwrite, config.model, config.delta)
    with progress("export", 2) as advance:
        advance(0, "reading the model")
        delta = deltas.load(config.delta)
        base = load(config.model, dtype=dtype_of(delta))
        advance(1, "writing")
        given: dict[str, Any] = {"base": base.params, "config": base.config, "base_fingerprint": base.fingerprint}
        if config.to == "peft":
            deltas.export_peft(config.out, delta, base_name=config.base_name, overwrite=config.overwrite, **given)
        elif config.to == "entries":
            deltas.export_entries(config.out, delta, overwrite=config.overwrite, **given)
        else:
            deltas.export_merged(config.out, delta, base, overwrite=config.overwrite)
        advance(1, "written")
    said = {"out": str(config.out), "to": config.to, "bytes_on_disk": size_on_disk(config.out)}
    said |= {"bytes_of_the_delta": size_on_disk(config.delta)}
    _say(said, as_json=config.json)


def _import(config: ImportConfig) -> None:
    check_out(config.out, config.overwrite, config.model, config.from_peft)
    with progress("import", 2) as advance:
        advance(0, "reading the model")
        base = load(config.model, dtype=config.dtype)
        advance(1, "reading the adapter")
        delta = deltas.import_peft(
            config.from_peft,
            base=base.params,
            config=base.config,
            base_fingerprint=base.fingerprint,
            base_name=base.name,
        )
        deltas.save(config.out, delta, overwrite=config.overwrite)
        advance(1, "written")
    _say_delta(config.out, delta, as_json=config.json)


def _write(config: ApplyConfig | RevertConfig, origin: Checkpoint, params: Any, name: str, source: str) -> Checkpoint:
    """Writes a model in the format that is asked for, with the tokenizer of the one it was made of."""
    if config.to == "jaxsparse":
        parts = (origin.config, params, origin.tokenizer, name)
        return save(config.out, *parts, source=source, overwrite=config.overwrite)
    made = dataclasses.replace(origin, params=params, name=name, fingerprint=fingerprint(params))
    return export_hugging_face(config.out, made, overwrite=config.overwrite)


# ---- what is said ----------------------------------------------------------------------------------------------


def _say_delta(out: Path, delta: deltas.Delta, *, as_json: bool) -> None:
    _say({"out": str(out), **said_of(out, delta)}, as_json=as_json)


def _say_model(out: Path, made: Checkpoint, more: dict[str, Any], *, as_json: bool) -> None:
    said = {"out": str(out), "name": made.name, "parameters": tree_size(made.params), "fingerprint": made.fingerprint}
    _say(said | more, as_json=as_json)


def _say(said: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(said, allow_nan=False))
        return
    out = said.pop("out")
    shown = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in said.items() if value is not None]
    Console(soft_wrap=True).print(f"{out}: {', '.join(shown)}", highlight=False, markup=False)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)[:64]


# ---- which subcommand ------------------------------------------------------------------------------------------

_COMMANDS: dict[str, tuple[Any, Any, str]] = {
    "info": (InfoConfig, info, "what deltas hold, what they share, and a picture of where they are"),
    "diff": (DiffConfig, _diff, "the delta of two models"),
    "apply": (ApplyConfig, _apply, "base and delta as a tuned model"),
    "revert": (RevertConfig, _revert, "the base out of a tuned model"),
    "mix": (MixConfig, _mix, "one delta of several: sum, TIES, DARE"),
    "export": (ExportConfig, _export, "for PEFT, torch or Hugging Face"),
    "import": (ImportConfig, _import, "from PEFT"),
}
_USAGE = "\n".join(
    [
        "usage: jaxsparse delta SUBCOMMAND [--help] ...",
        "",
        "Sparse deltas: what fine-tuning changed, against a named base.",
        "",
        *(f"  {name:8} {text}" for name, (_, _, text) in _COMMANDS.items()),
        "",
        "Example: jaxsparse delta info runs/first/delta --picture changes.png",
        "jaxsparse delta SUBCOMMAND --help tells more.",
    ]
)


def main(arguments: Sequence[str]) -> int:
    """Runs a subcommand."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in _COMMANDS:
        raise InputError(f"unknown subcommand {name!r}; subcommands: {', '.join(_COMMANDS)}")
    config_class, run, _ = _COMMANDS[name]
    run(parse(lambda given: config_class, f"jaxsparse delta {name}", rest))
    return 0
