import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.data import Row, TokenizerLike, answer_text, render_prompt
from tests.data.character_tokenizer import CHAT, TRIMMING_CHAT, CharacterTokenizer

filled = st.text(min_size=1, max_size=30).filter(str.strip)


def test_the_tokenizers_follow_the_protocol() -> None:
    from jaxsparse.data.tokenizers import Tokenizer

    assert isinstance(CharacterTokenizer(), TokenizerLike)
    assert all(hasattr(Tokenizer, name) for name in ("encode", "apply_chat_template"))
    assert {"eos_id", "chat_template"} <= set(Tokenizer.__dataclass_fields__)


@given(instruction=filled, context=st.text(max_size=20))
def test_a_chat_prompt_is_what_the_tokenizer_renders(instruction: str, context: str) -> None:
    tokenizer = CharacterTokenizer(CHAT)
    prompt = render_prompt(Row(instruction, context, "", "36"), tokenizer, "chat")
    content = instruction.strip() + (f"\n\n{context.strip()}" if context.strip() else "")
    assert prompt.text == tokenizer.apply_chat_template([{"role": "user", "content": content}], True)
    assert (prompt.head, prompt.content, prompt.tail) == (
        "<bos><turn>user\n",
        content,
        "<eos>\n<turn>assistant\n",
    )
    assert prompt.add_bos is False


def test_a_template_that_alters_the_content_still_gives_its_own_text() -> None:
    prompt = render_prompt(Row("add", "", "", "36"), CharacterTokenizer(TRIMMING_CHAT))
    assert prompt.text == "<bos><turn>user\nADD<eos>\n<turn>assistant\n"


def test_plain_prompts_are_worded_like_alpaca() -> None:
    tokenizer = CharacterTokenizer()
    assert render_prompt(Row("Add. ", "", "", "36"), tokenizer, "plain").text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert render_prompt(Row("Add.", "17 and 19\n", "", "36"), tokenizer, "plain").text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n17 and 19"
        "\n\n### Response:\n"
    )


def test_auto_is_chat_where_there_is_a_chat_template() -> None:
    row = Row("Add.", "", "", "36")
    with_template, without = CharacterTokenizer(CHAT), CharacterTokenizer()
    assert render_prompt(row, with_template) == render_prompt(row, with_template, "chat")
    assert render_prompt(row, without) == render_prompt(row, without, "plain")
    assert render_prompt(row, with_template, "plain") == render_prompt(row, without, "plain")


def test_a_chat_prompt_without_a_template_is_an_error() -> None:
    with pytest.raises(InputError, match="no chat template; use 'plain' or 'auto'"):
        render_prompt(Row("Add.", "", "", "36"), CharacterTokenizer(), "chat")


def test_the_answer_or_the_output_is_trained_on() -> None:
    row = Row("Add.", "", " 17 + 19 = 36\n", " 36 ")
    assert answer_text(row) == "36"
    assert answer_text(row, "output") == "17 + 19 = 36"
    assert answer_text(Row("Add.", "", " ", "36"), "output") == "36"
