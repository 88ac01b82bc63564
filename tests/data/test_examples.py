import dataclasses
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.data import Row, encode_prompt, encode_rows, load_rows, render_prompt
from jaxsparse.data.tokenizer_formats import tokenizer_from_llama2c
from tests.data.character_tokenizer import CHAT, TRIMMING_CHAT, CharacterTokenizer

words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40)
templates = st.sampled_from([CHAT, TRIMMING_CHAT, None])


@given(
    instruction=words,
    answer=words,
    template=templates,
    max_length=st.integers(2, 300),
    prefix_space=st.booleans(),
    add_bos=st.booleans(),
)
def test_truncation_keeps_the_answer_whole_and_the_end_of_the_prompt(
    instruction: str, answer: str, template: str | None, max_length: int, prefix_space: bool, add_bos: bool
) -> None:
    tokenizer = CharacterTokenizer(template, prefix_space=prefix_space, add_bos=add_bos)
    row = Row(instruction, "", "", answer)
    assume(len(answer) + 2 + prefix_space <= max_length)
    (whole,) = encode_rows([row], tokenizer, max_length=10_000)
    (example,) = encode_rows([row], tokenizer, max_length=max_length)
    assert example.answer_ids == whole.answer_ids
    assert len(example) == len(example.prompt_ids) + len(example.answer_ids) <= max_length
    assert len(example.prompt_ids) + example.truncated == len(whole.prompt_ids) > example.truncated
    assert tuple(encode_prompt(row, tokenizer, max_length=len(example.prompt_ids))) == example.prompt_ids
    if example.truncated:
        assert len(example) == max_length or prefix_space
        assert tokenizer.decode(whole.prompt_ids).endswith(tokenizer.decode(example.prompt_ids[-1:]))
    else:
        assert example == whole


@given(instruction=words, answer=words, template=templates, add_bos=st.booleans())
def test_what_fits_decodes_to_the_prompt_the_answer_and_the_closing_token(
    instruction: str, answer: str, template: str | None, add_bos: bool
) -> None:
    tokenizer = CharacterTokenizer(template, add_bos=add_bos)
    row = Row(instruction, "and 1", "", answer)
    (example,) = encode_rows([row], tokenizer)
    begin = "<bos>" if add_bos and template is None else ""
    assert tokenizer.decode(example.prompt_ids) == begin + render_prompt(row, tokenizer).text
    assert tokenizer.decode(example.answer_ids) == f"{answer}<eos>"
    assert example.truncated == 0


def test_the_templates_frame_survives_truncation() -> None:
    tokenizer = CharacterTokenizer(CHAT)
    question = "x" * 400 + " How many are left?"
    (example,) = encode_rows([Row(question, "", "", "36")], tokenizer, max_length=60)
    text = tokenizer.decode(example.prompt_ids)
    assert text.startswith("<bos><turn>user\n")
    assert text.endswith(" How many are left?<eos>\n<turn>assistant\n")
    assert len(example) == 60


def test_where_the_frame_does_not_fit_the_end_of_the_prompt_stays() -> None:
    tokenizer = CharacterTokenizer(CHAT)
    (example,) = encode_rows([Row("Add.", "", "", "36")], tokenizer, max_length=13)
    assert tokenizer.decode(example.prompt_ids) == "assistant\n"


def test_the_answer_has_the_ids_it_has_after_the_prompt() -> None:
    (example,) = encode_rows([Row("Add.", "", "", "36")], CharacterTokenizer(prefix_space=True))
    assert CharacterTokenizer().decode(example.answer_ids) == "36<eos>"
    melting = CharacterTokenizer(merge="\n3")
    (example,) = encode_rows([Row("Add.", "", "", "36")], melting)
    assert melting.decode(example.prompt_ids).endswith("### Response:\n")
    assert melting.decode(example.answer_ids) == "36<eos>"


def test_the_output_can_be_trained_on() -> None:
    tokenizer = CharacterTokenizer(CHAT)
    (example,) = encode_rows([Row("Add.", "", "so it is 36", "36")], tokenizer, train_on="output")
    assert tokenizer.decode(example.answer_ids) == "so it is 36<eos>"


def test_a_row_whose_answer_does_not_fit_is_an_error_or_dropped_with_a_warning() -> None:
    tokenizer = CharacterTokenizer(CHAT)
    rows = [Row("Add.", "", "", answer) for answer in ("36", "9" * 50, "7")]
    with pytest.raises(InputError, match=r"row 2: its answer takes 51 tokens.*max_length=51"):
        encode_rows(rows, tokenizer, max_length=51)
    with pytest.warns(UserWarning, match="dropped 1 of 3 rows"):
        kept = encode_rows(rows, tokenizer, max_length=51, too_long="drop")
    assert [tokenizer.decode(example.answer_ids) for example in kept] == ["36<eos>", "7<eos>"]
    assert encode_rows(rows, tokenizer, max_length=52)[1].prompt_ids == (ord("\n") + 100,)


CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_a_real_tokenizer_reads_back_what_was_encoded(shared: Path, chat_template: str | None) -> None:
    plain = tokenizer_from_llama2c(shared / "models" / "stories260k" / "tok512.bin")
    tokenizer = dataclasses.replace(plain, chat_template=chat_template)
    rows = load_rows(shared / "data" / "numglue" / "type1" / "test.json")
    for row, example, short in zip(
        rows,
        encode_rows(rows, tokenizer, max_length=2048),
        encode_rows(rows, tokenizer, max_length=150),
        strict=True,
    ):
        ids = [*example.prompt_ids, *example.answer_ids]
        whole = tokenizer.encode(render_prompt(row, tokenizer).text + row.answer, render_prompt(row, tokenizer).add_bos)
        assert ids == [*whole, tokenizer.eos_id]
        assert tokenizer.decode(example.answer_ids).strip() == row.answer
        # The plain prompt gets its beginning token from the tokenizer, the other from the template: never two.
        assert [i == tokenizer.bos_id for i in example.prompt_ids[:2]] == [True, False]
        assert short.answer_ids == example.answer_ids
        assert len(short) <= 150


def test_bad_arguments_are_named() -> None:
    row, tokenizer = Row("Add.", "", "", "36"), CharacterTokenizer()
    with pytest.raises(InputError, match="max_length=1"):
        encode_rows([row], tokenizer, max_length=1)
    with pytest.raises(InputError, match="max_length=0"):
        encode_prompt(row, tokenizer, max_length=0)
    with pytest.raises(InputError, match="no rows"):
        encode_rows([], tokenizer)
    with pytest.raises(InputError, match="no row fits in max_length=2"):
        encode_rows([row], tokenizer, max_length=2, too_long="drop")
    with pytest.raises(InputError, match="no end-of-text token"):
        encode_rows([row], CharacterTokenizer(eos_id=None))
