"""All methods by name, and each one's own options as a dataclass, for command lines and config files."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import docstring_parser
import jax
import tyro

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import SlotsDType, SubspaceTransformation
from jaxsparse.methods.baselines import saft, shira, sift, super_tuning
from jaxsparse.methods.cheap_lora import c3la, cla, r_c3la, r_cla
from jaxsparse.methods.dora import dora
from jaxsparse.methods.full import bitfit, full
from jaxsparse.methods.gallop import gallop
from jaxsparse.methods.gasdu import fixed_mask, gasdu
from jaxsparse.methods.gradient_lora import lora_ga, lora_one
from jaxsparse.methods.lisa import lisa
from jaxsparse.methods.lora import asym_lora, cola, lora, lora_plus, rac_lora
from jaxsparse.methods.neuroada import neuroada
from jaxsparse.methods.paca import c_paca, d_paca, paca
from jaxsparse.methods.s2ft import s2ft
from jaxsparse.methods.smt import smt
from jaxsparse.methods.spiel import spiel
from jaxsparse.select.schedules import RefreshEvery

__all__ = ["METHODS", "PAPERS", "constructor_of", "options_class"]

# A method stands here under its paper, so that none is without one.
_METHODS_OF: dict[str, tuple[Callable[..., SubspaceTransformation], ...]] = {
    "GASDU": (gasdu, fixed_mask),
    "NeuroAda (arXiv 2510.18940)": (neuroada,),
    "S2FT (arXiv 2412.06289)": (s2ft,),
    "GaLLoP (arXiv 2510.19778)": (gallop,),
    "Beyond LoRA (arXiv 2606.13767)": (cla, r_cla, c3la, r_c3la),
    "PaCA (arXiv 2503.01905)": (paca, d_paca, c_paca),
    "LoRA (arXiv 2106.09685)": (lora,),
    "LoRA+ (arXiv 2402.12354)": (lora_plus,),
    "CoLA (arXiv 2401.04151)": (cola,),
    "Asymmetric LoRA (arXiv 2402.16842)": (asym_lora,),
    "RAC-LoRA (arXiv 2410.08305)": (rac_lora,),
    "DoRA (arXiv 2402.09353)": (dora,),
    "LoRA-GA (arXiv 2407.05000)": (lora_ga,),
    "LoRA-One (arXiv 2502.01235)": (lora_one,),
    "SIFT (arXiv 2312.11875)": (sift,),
    "SAFT (arXiv 2407.03036)": (saft,),
    "SHiRA (arXiv 2406.13175)": (shira,),
    "Super-Tuning (arXiv 2607.09287)": (super_tuning,),
    "LISA (arXiv 2403.17919)": (lisa,),
    "BitFit (arXiv 2106.10199)": (bitfit,),
    "full fine-tuning": (full,),
    "SMT (arXiv 2405.15525)": (smt,),
    "SpIEL (arXiv 2401.16405)": (spiel,),
}

METHODS: dict[str, Callable[..., SubspaceTransformation]] = {
    constructor.__name__: constructor for constructors in _METHODS_OF.values() for constructor in constructors
}
PAPERS: dict[str, str] = {
    constructor.__name__: paper for paper, constructors in _METHODS_OF.items() for constructor in constructors
}

# Arguments that every method has, and that a run sets in one place for all of them.
_COMMON = ("inner", "targets", "seed", "gradients", "activations", "learning_rate", "weight_decay", "clip")
# What can be written on a command line, for arguments that take more than that from Python.
_WRITTEN: dict[Any, Any] = {RefreshEvery: int | str, SlotsDType: str | None, float | jax.Array: float}


def constructor_of(method: str) -> Callable[..., SubspaceTransformation]:
    """Returns the constructor of a method.

    Raises:
        InputError: there is no method of that name.

    Example:
        >>> constructor_of("gasdu").__name__
        'gasdu'
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known methods: {', '.join(sorted(METHODS))}")
    return METHODS[method]


def options_class(method: str) -> type:
    """Makes a dataclass of a method's own options from its constructor: names, types, defaults and help.

    Args:
        method: the method's name.

    Returns:
        A frozen dataclass; its fields are keywords of the constructor.

    Raises:
        InputError: there is no method of that name.

    Example:
        >>> options_class("gasdu")(density=1e-4).refresh_every
        50
    """
    constructor = constructor_of(method)
    described = docstring_parser.parse(constructor.__doc__ or "")
    help_texts = {param.arg_name: " ".join((param.description or "").split()) for param in described.params}
    fields = []
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.name in _COMMON:
            continue
        written: Any = _WRITTEN.get(parameter.annotation, parameter.annotation)
        annotation: Any = Annotated[written, tyro.conf.arg(help=help_texts[parameter.name])]
        fields.append((parameter.name, annotation, dataclasses.field(default=parameter.default)))
    options = dataclasses.make_dataclass(f"{method}_options", fields, frozen=True)
    options.__doc__ = f"{method}: {described.short_description}"
    return options
