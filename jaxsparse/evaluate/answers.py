"""Answers: reading the answer out of what a model wrote, and comparing it with the right one.

What counts as the same depends on the right answer:

* A number ("36", "1,250.0", "-4.5", "3/4", "$7", "50%"): the last number of the prediction, as LLM-Adapters
  takes it, so that a rationale may come first. Thousands separators, currency and percent signs and units do
  not count, and 36 equals 36.0. The two may differ by 0.001, LLM-Adapters' tolerance, or by a thousandth of a
  right answer below 1, because the files hold rounded quotients (0.6666666666666666).
* A numbered option ("answer3", "Option 2", "solution1", "ending4"), or true or false: the first of the family
  in the prediction, as LLM-Adapters takes it; case and a space before the number do not count.
* A capital letter from A to E: the last one in the prediction that stands alone, as the letter follows a rationale.
* Anything else ("June"): the first line of the prediction must be those words, in any case; "the answer is"
  before them and punctuation after them do not count.
"""

import re
from fractions import Fraction

__all__ = ["extract_number", "is_correct"]

# No letter or digit may stand right before a number (CO2 holds none), and a minus right after one subtracts.
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![^\W_])(?<![)\]])-)?
    (?<![^\W_])
    (?:
        (?:(?P<whole>\d+)\ )?(?P<fraction>\d+\s?/\s?0*[1-9]\d*)(?!\.\d)
      | (?P<decimal>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?![^\W_]))?)
    )
    """,
    re.VERBOSE,
)
_CURRENCY = re.compile(r"((?<![^\W_])-)?[$€£¥₹]\s?")
_OPTION = re.compile(r"(answer|option|solution|ending|choice)\s*(\d+)")
_TRUTH = re.compile(r"\b(true|false)\b")
_LETTER = re.compile(r"(?<![^\W_])(?<!['’])[A-E](?![^\W_])(?!['’])")
_PREAMBLE = re.compile(r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:correct |final |right )?answer(?: is)?:? ")

_TOLERANCE = Fraction(1, 1000)


def extract_number(text: str) -> str | None:
    """Returns the last number of a text.

    Args:
        text: any text.

    Returns:
        The number without thousands separators, currency or unit; a fraction stays one ("7/2"); None where
        the text has no number.

    Example:
        >>> extract_number("60 - 8 = 52, so the CO2 costs $1,052.50 a ton.")
        '1052.50'
        >>> extract_number("It takes 3 1/2 hours."), extract_number("No idea")
        ('7/2', None)
    """
    matches = list(_NUMBER.finditer(_plain_signs(text)))
    return _spelled(matches[-1]) if matches else None


def is_correct(prediction_text: str, answer_text: str) -> bool:
    """Returns whether a prediction gives the right answer, by the rules at the head of this module.

    Args:
        prediction_text: what the model wrote; a rationale may come with it.
        answer_text: the right answer and nothing else.

    Returns:
        Whether they agree; never for an empty prediction.

    Example:
        >>> is_correct("The movie is 60 - 8 = 52 minutes long.", "52.0")
        True
        >>> is_correct("The correct answer is option 2.", "Option 1")
        False
    """
    answer = answer_text.strip()
    right = _NUMBER.fullmatch(_plain_signs(answer).strip().rstrip("%").rstrip())
    if right:
        return _same_number(extract_number(prediction_text), _spelled(right))
    if option := _OPTION.fullmatch(answer.lower()):
        found = [match for match in _OPTION.finditer(prediction_text.lower()) if match[1] == option[1]]
        return bool(found) and int(found[0][2]) == int(option[2])
    if _TRUTH.fullmatch(answer.lower()):
        truth = _TRUTH.search(prediction_text.lower())
        return truth is not None and truth[0] == answer.lower()
    if _LETTER.fullmatch(answer):
        return _LETTER.findall(prediction_text)[-1:] == [answer]
    return _words(prediction_text) == _words(answer) != ""


def _plain_signs(text: str) -> str:
    """Returns the text with one kind of minus sign and no currency signs."""
    return _CURRENCY.sub(r" \1", text.replace("−", "-").replace("–", "-"))


def _spelled(match: re.Match[str]) -> str:
    """Returns a matched number in a form that Fraction reads."""
    number = (match["decimal"] or match["fraction"]).replace(",", "").replace(" ", "")
    if match["whole"]:
        numerator, denominator = number.split("/")
        number = f"{int(match['whole']) * int(denominator) + int(numerator)}/{denominator}"
    return (match["sign"] or "") + number


def _same_number(predicted: str | None, right: str) -> bool:
    if predicted is None or predicted == right:
        return predicted is not None
    try:
        difference, size = abs(Fraction(predicted) - Fraction(right)), abs(Fraction(right))
    except ValueError:  # thousands of digits, more than Python reads
        return False
    return difference <= _TOLERANCE * min(size, Fraction(1))


def _words(text: str) -> str:
    """Returns the first line in lower case, without what leads up to an answer and what follows it."""
    first_line = " ".join(text.strip().split("\n")[0].lower().split())
    return _PREAMBLE.sub("", first_line + " ").strip(" .,;:!?\"'*()")
