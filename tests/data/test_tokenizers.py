"""Tokenizers agree with their definitions, survive saving, and say clearly what does not work."""

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizer_formats import tokenizer_from_gguf, tokenizer_from_llama2c
from jaxsparse.data.tokenizers import Tokenizer, check_fits
from tests.models.formats import byte_level_metadata, llama2c_tokenizer

MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "i n", "a a"]
CHATML = (
    "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "<|im_end|>\n{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level(**more) -> Tokenizer:
    return tokenizer_from_gguf(byte_level_metadata(MERGES, **{"tokenizer.chat_template": CHATML, **more}))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.fixture
def llama2c(tmp_path) -> Tokenizer:
    llama2c_tokenizer(
        tmp_path / "tok.bin", [" t", "he", " the", "th", " ", "t", "h", "e"], [-1, -2, -5, -4, -9, -9, -9, -9]
    )
    return tokenizer_from_llama2c(tmp_path / "tok.bin")


def test_byte_level_merges_and_single_digits():
    tokenizer = byte_level()
    assert pieces(tokenizer, "in the 12") == ["in", "Ġthe", "Ġ", "1", "2"]
    assert pieces(byte_level(**{"tokenizer.ggml.pre": "gpt-2"}), "in the 12") == ["in", "Ġthe", "Ġ", "12"]


def test_llama3_pre_tokenizer_keeps_whole_words_and_three_digits():
    merges = ["1 2", "12 3", "123 4", "l o"]
    metadata = byte_level_metadata(merges, **{"tokenizer.ggml.pre": "llama-bpe"})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "hello"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert pieces(tokenizer_from_gguf(metadata), "hello1234") == ["hello", "123", "4"]


@hypothesis.given(st.text(max_size=40))
@hypothesis.settings(deadline=None, max_examples=60)
def test_byte_level_round_trip(text):
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_llama2c_merges_the_best_score_first(llama2c):
    # " t" (-1) and "he" (-2) win over "th" (-4), then they join.
    assert pieces(llama2c, "the")[1:] == [" the"]
    # Without a "he" to make, "th" is left.
    assert pieces(llama2c, "tth")[1:] == [" t", "th"]


def test_llama2c_falls_back_to_bytes_and_takes_the_first_space_away(llama2c):
    ids = llama2c.encode("the ☃")
    assert ids[0] == llama2c.bos_id == 1
    assert ids[-3:] == [3 + byte for byte in "☃".encode()]
    assert llama2c.decode(ids) == "the ☃"
    assert llama2c.stop_ids == (2, 1)


def scored_pieces_as_llama2c(tokens: list[str], scores: list[float], text: str) -> list[int]:
    """run.c's encode(), without BOS: merge the best pair of neighbours until there is none."""
    index = {token: i for i, token in enumerate(tokens)}
    ids = []
    for letter in (" " + text) if text else "":
        ids += [index[letter]] if letter in index else [3 + byte for byte in letter.encode()]
    while True:
        joined = [
            (scores[i], -n, i)
            for n, i in enumerate(index.get(tokens[a] + tokens[b]) for a, b in itertools.pairwise(ids))
            if i is not None
        ]
        if not joined:
            return ids
        _, n, best = max(joined)
        ids[-n : -n + 2] = [best]


@hypothesis.given(st.text("the ☃", max_size=12))
@hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_llama2c_agrees_with_its_algorithm(llama2c, text):
    tokens = [llama2c.backend.id_to_token(i) for i in range(llama2c.vocab_size)]
    scores = [0.0] * 259 + [-1, -2, -5, -4, -9, -9, -9, -9]
    assert llama2c.encode(text, add_bos=False) == scored_pieces_as_llama2c(tokens, scores, text)


def test_sentencepiece_metadata_of_gguf():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "t", "h", "e", "he", "\u2581the", "\u2581t"]
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -3.0, -2.0],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    assert pieces(tokenizer, "the the") == ["<s>", "\u2581the", "\u2581the"]
    assert tokenizer.decode(tokenizer.encode("the ☃ the")) == "the ☃ the"
    assert tokenizer.encode("</s>", add_bos=False)[-1] == 2
    assert tokenizer.pad_id == 2


def test_special_tokens_are_one_token_and_left_out_of_the_text():
    tokenizer = byte_level()
    ids = tokenizer.encode("<|im_start|>in<|im_end|>")
    assert [ids[0], ids[-1]] == [1, 2]
    assert tokenizer.decode(ids) == "in"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>in<|im_end|>"
    assert tokenizer.stop_ids == (2, 0)


def test_add_bos():
    tokenizer = byte_level()
    assert tokenizer.encode("in", add_bos=True) == [1, *tokenizer.encode("in")]
    assert byte_level(**{"tokenizer.ggml.add_bos_token": True}).encode("in")[0] == 1
    bare = Tokenizer(tokenizer.backend)
    with pytest.raises(InputError, match="no token that begins a text"):
        bare.encode("in", add_bos=True)


def test_chat_template_trims_blocks_as_hugging_face_does():
    messages = [{"role": "user", "content": "in the"}]
    assert byte_level().apply_chat_template(messages) == "<|im_start|>user\nin the<|im_end|>\n"
    assert byte_level().apply_chat_template(messages, True).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<|im_start|>é<|im_end|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é"}]'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% if strftime_now('%Y') | int > 2000 %}now{% endif %}", "now"),
    ],
)
def test_chat_template_surroundings(template, expected):
    tokenizer = byte_level(**{"tokenizer.chat_template": template})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "é"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{% if %}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        (None, "no chat template"),
    ],
)
def test_chat_template_errors(template, message):
    tokenizer = Tokenizer(byte_level().backend, chat_template=template)
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("add_bos", [False, True])
def test_saving_and_loading_keeps_everything(tmp_path, add_bos):
    tokenizer = byte_level(**{"tokenizer.ggml.add_bos_token": add_bos})
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "chat_template", "vocab_size"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    text = "<|im_start|>the 12 ☃\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    # Hugging Face's own libraries look at the post-processor alone.
    assert (loaded.backend.encode("in").ids[0] == 1) == add_bos


def test_loading_llama2c_again(tmp_path, llama2c):
    llama2c.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("the ☃ the") == llama2c.encode("the ☃ the")
    assert loaded.decode(loaded.encode("the ☃ the")) == "the ☃ the"


def test_loading_what_hugging_face_writes(tmp_path):
    """Tokens as objects, several named templates, ends in generation_config.json, no add_bos_token."""
    byte_level().save(tmp_path)
    token = {"content": "<|im_end|>", "special": True}
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"eos_token": token, "bos_token": None, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (None, 2, 2, (2, 0))
    assert (loaded.add_bos, loaded.chat_template) == (False, "d")
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert Tokenizer.load(tmp_path).chat_template == "newer"


def test_a_tokenizer_that_truncates_is_told_not_to(tmp_path):
    backend = byte_level().backend
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("abcdefg")) == 7


def test_loading_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    byte_level().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<nowhere>"}')
    with pytest.raises(InputError, match="bos_token '<nowhere>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "jais"}, "'jais' is not supported; supported: gpt-2"),
    ],
)
def test_gguf_errors(change, message):
    with pytest.raises(InputError, match=message):
        byte_level(**change)


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_gguf_missing_keys(key):
    metadata = byte_level_metadata(MERGES)
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError, match=rf"no tokenizer\.ggml\.{key}"):
        tokenizer_from_gguf(metadata)


def test_llama2c_errors(tmp_path):
    path = tmp_path / "tok.bin"
    with pytest.raises(InputError, match=r"cannot read .*tok\.bin: No such file"):
        tokenizer_from_llama2c(path)
    llama2c_tokenizer(path, ["ab"], [-1.0])
    whole = path.read_bytes()
    for cut in (1, 5, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(InputError, match="truncated"):
            tokenizer_from_llama2c(path)


def test_check_fits():
    tokenizer = byte_level()
    size = tokenizer.vocab_size
    check_fits(tokenizer, size)
    check_fits(tokenizer, size + 64)
    with pytest.raises(InputError, match=f"has {size} tokens, the model's vocabulary has {size - 1}"):
        check_fits(tokenizer, size - 1)


def test_backend_is_the_library_s():
    assert isinstance(byte_level().backend, tokenizers.Tokenizer)
