"""HumanEval's pass@1: programs that a model wrote, run against their tests in a process of their own."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.sandbox import runs_to_its_end
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

__all__ = ["Problem", "load_problems", "measure_human_eval", "pass_at_k", "passes"]

# Where a function ends and something else begins (HumanEval, section 2.2).
_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Problem:
    """A function to be written.

    Attributes:
        task_id: its name.
        prompt: imports, signature and docstring.
        entry_point: the function's name.
        canonical_solution: a right body.
        test: source of `check(candidate)`.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def load_problems(file: str | Path) -> list[Problem]:
    """Reads HumanEval.jsonl.

    Raises:
        InputError: the file is not there, or not of that form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return [Problem(**{name: str(row[name]) for name in Problem.__annotations__}) for row in map(json.loads, lines)]
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; it is human-eval's HumanEval.jsonl") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no HumanEval.jsonl: {error}") from error


def passes(problem: Problem, completion: str, *, seconds: float = 10.0, memory: int = 2**30) -> bool:
    r"""Runs a program against its tests, in a Python process of its own.

    See `jaxsparse.evaluate.sandbox` for what the process may do, and what nothing protects from.

    Args:
        problem: the problem.
        completion: what follows the prompt; cut where the function ends.
        seconds: of processor time and of the clock.
        memory: bytes of address space.

    Returns:
        Whether all tests passed.

    Example:
        >>> one = Problem("t/0", "def f():\n", "f", "    return 1\n", "def check(f):\n    assert f() == 1\n")
        >>> passes(one, "    return 1"), passes(one, "    return 2")
        (True, False)
    """
    program = f"{problem.prompt}{_cut(completion)}\n{problem.test}\ncheck({problem.entry_point})\n"
    return runs_to_its_end(program, seconds=seconds, memory=memory)


def _cut(completion: str) -> str:
    ends = [at for end in _ENDS if (at := completion.find(end)) >= 0]
    return completion[: min(ends)] if ends else completion


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k (HumanEval, equation 1).

    Args:
        samples: programs written for a problem, at least k.
        right: of them those that pass.
        k: how many are tried.

    Raises:
        InputError: there are fewer samples than k.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4)
        (0.25, 1.0)
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise InputError(f"k={k} must lie between 1 and samples={samples}, and right={right} between 0 and samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def measure_human_eval(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    batch: int = 8,
    seconds: float = 10.0,
    advance: Callable[[int], None] = lambda problems: None,
) -> dict[str, bool]:
    """Writes a program for every problem, greedily, and returns which pass; their mean is pass@1.

    Args:
        model: the language model.
        params: its parameters.
        tokenizer: its tokenizer.
        problems: the problems; none: an empty result.
        max_new_tokens: longest program in tokens.
        batch: problems at a time.
        seconds: see `passes`.
        advance: called with the number of problems done since the last call.
    """
    found: dict[str, bool] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(problems), batch):
            own = problems[start : start + batch]
            prompts = [tokenizer.encode(problem.prompt) for problem in own]
            prompts += [prompts[0]] * (batch - len(own))
            written = generate(model, params, prompts, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
            texts = [tokenizer.decode(ids) for ids in written[: len(own)]]
            right = pool.map(lambda each: passes(each[0], each[1], seconds=seconds), zip(own, texts, strict=True))
            found |= {problem.task_id: passed for problem, passed in zip(own, right, strict=True)}
            advance(len(own))
    return found
