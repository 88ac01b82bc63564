"""Prompts: from an instruction row to the text a model sees and the text it should say."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxsparse.common.errors import InputError
from jaxsparse.data.rows import Row

__all__ = ["Prompt", "Template", "TokenizerLike", "TrainOn", "answer_text", "render_prompt"]

Template = Literal["auto", "chat", "plain"]
TrainOn = Literal["answer", "output"]

# The wording of Alpaca, which LLM-Adapters trains and evaluates with.
_PLAIN_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n"
)
_PLAIN_HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_PLAIN_TAIL = "\n\n### Response:\n"

# Stands for the content while a chat template is rendered, to see which text the template puts around it;
# from Unicode's private use area, so that no template and no data contain it.
_SENTINEL = "\ue000content\ue001"


@runtime_checkable
class TokenizerLike(Protocol):
    """What this layer needs of a tokenizer; `jaxsparse.data.tokenizers.Tokenizer` has it."""

    @property
    def eos_id(self) -> int | None:
        """The id of the token that closes an answer."""

    @property
    def chat_template(self) -> str | None:
        """A jinja2 template, or None for a model without one."""

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Returns the token ids of a text; `add_bos` None begins it as the model expects."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """Returns a conversation as the text the model was trained on."""


class Prompt(NamedTuple):
    """The text before the answer, in three parts, of which only the middle may be truncated.

    Attributes:
        head: what the template puts before the content.
        content: the row's instruction and input.
        tail: what the template puts after it, up to where the answer starts.
        add_bos: as `encode` wants it for the head: False where the template spells such a token out.
    """

    head: str
    content: str
    tail: str
    add_bos: bool | None

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.content + self.tail


def render_prompt(row: Row, tokenizer: TokenizerLike, template: Template = "auto") -> Prompt:
    """Renders the prompt of a row.

    Args:
        row: the instruction row.
        tokenizer: brings the chat template.
        template: "chat" is the tokenizer's own chat template, with the instruction and, after an empty line,
            the input as the user's message; "plain" is Alpaca's and LLM-Adapters' wording; "auto" is "chat"
            where the tokenizer has a chat template, else "plain".

    Returns:
        The prompt; its `text` is what the model sees before the answer.

    Raises:
        InputError: "chat" was asked for and the tokenizer has no chat template, or the template is unknown.
    """
    if template not in ("auto", "chat", "plain"):
        raise InputError(f"template={template!r}: must be 'auto', 'chat' or 'plain'")
    if template == "chat" and tokenizer.chat_template is None:
        raise InputError("template='chat': this tokenizer has no chat template; use 'plain' or 'auto'")
    if template == "plain" or tokenizer.chat_template is None:
        return _plain_prompt(row)
    return _chat_prompt(row, tokenizer)


def answer_text(row: Row, train_on: TrainOn = "answer") -> str:
    """Returns the text that a model should say to a row, without surrounding space.

    Args:
        row: the instruction row.
        train_on: "answer" (default) is what is scored; "output" is the full response, whose rationale may be
            wrong where a model wrote it, and falls back to the answer where a row has no output.

    Returns:
        The text; never empty.

    Raises:
        InputError: `train_on` is neither.

    Example:
        >>> row = Row("What is 17 + 19?", "", output="the correct answer is 36", answer="36")
        >>> answer_text(row), answer_text(row, "output")
        ('36', 'the correct answer is 36')
    """
    if train_on not in ("answer", "output"):
        raise InputError(f"train_on={train_on!r}: must be 'answer' or 'output'")
    output = row.output.strip()
    return output if train_on == "output" and output else row.answer.strip()


def _plain_prompt(row: Row) -> Prompt:
    instruction, context = row.instruction.strip(), row.input.strip()
    if not context:
        return Prompt(_PLAIN_HEAD, instruction, _PLAIN_TAIL, add_bos=None)
    return Prompt(_PLAIN_HEAD_WITH_INPUT, f"{instruction}\n\n### Input:\n{context}", _PLAIN_TAIL, add_bos=None)


def _chat_prompt(row: Row, tokenizer: TokenizerLike) -> Prompt:
    content = "\n\n".join(part for part in (row.instruction.strip(), row.input.strip()) if part)
    text = _apply(tokenizer, content)
    head, found, tail = _apply(tokenizer, _SENTINEL).partition(_SENTINEL)
    if found and text == head + content + tail:
        return Prompt(head, content, tail, add_bos=False)
    # The template changes what it is given, so its frame is unknown: all of it may be truncated.
    return Prompt("", text, "", add_bos=False)


def _apply(tokenizer: TokenizerLike, content: str) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
