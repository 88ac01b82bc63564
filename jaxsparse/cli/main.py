"""The command line: one command a module."""

import sys
from collections.abc import Sequence
from importlib import import_module

from jaxsparse.cli.errors import reported

__all__ = ["main"]

_COMMANDS = {
    "finetune": "fine-tune a model by a sparse method; leaves a delta and a report",
    "evaluate": "measure loss, perplexity and exact match of a model, with or without a delta",
    "generate": "continue prompts, with any number of deltas side by side in one batch",
    "delta": "describe, make, apply, revert, mix and exchange deltas",
    "plan": "memory, time at least and delta of fine-tuning on a device that need not be here",
    "methods": "list all methods; with --model, what each of them trains and stores",
    "convert": "convert Hugging Face, GGUF and llama2.c models to a Flax checkpoint, and back to Hugging Face",
    "demo": "all of it on SmolLM2-135M and arithmetic problems, in minutes",
}
_USAGE = "\n".join(
    [
        "usage: jaxsparse COMMAND [--help] ...",
        "",
        "Sparse and structured fine-tuning of language models in JAX.",
        "",
        *(f"  {name:10} {text}" for name, text in _COMMANDS.items()),
        "",
        "jaxsparse COMMAND --help tells more.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a failed check, 2 for bad input, 130 or 143 after a signal.

    Args:
        arguments: the command line without the program's name; None: that of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if given else 2
    command, *rest = given
    if command not in _COMMANDS:
        print(f"jaxsparse: unknown command {command!r}; commands: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    # Each command is imported on demand: `jaxsparse --help` need not wait for jax.
    return reported(command, lambda: import_module(f"jaxsparse.cli.{command}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
