"""Generation against running the whole sequence again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.models import checkpoints
from jaxsparse.models import generate as generation
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate
from tests.models.small import CONFIGS, GPT2, LLAMA, random_params, random_tokens

FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def random_prompts(rng, *lengths):
    return [random_tokens(rng, length).tolist() for length in lengths]


def greedy_without_cache(model, params, prompts, new):
    """One forward pass of everything so far for each token; padded behind, where nothing looks."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + new), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows, logits = np.arange(len(prompts)), jax.jit(model.logits)
    for end in range(new):
        likeliest = np.argmax(logits(params, tokens), axis=-1)
        tokens[rows, lengths + end] = likeliest[rows, lengths + end - 1]
    return [row[length : length + new].tolist() for row, length in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_with_a_cache_equal_those_of_whole_rows(config, rng):
    model = LanguageModel(config)
    params, next_logits = random_params(model, rng), jax.jit(model.next_logits)
    tokens, pieces, padding = random_tokens(rng, 2, 11), [4, 1, 5, 1], 3
    padded = np.concatenate([random_tokens(rng, 2, padding), tokens], axis=1)
    positions = np.tile(np.maximum(np.arange(-padding, 11), -1), (2, 1)).astype(np.int32)
    whole = jax.jit(model.logits)(params, tokens)
    cache, end = model.empty_cache(2, padding + 12, jnp.float32), 0
    for piece in [padding + pieces[0], *pieces[1:]]:
        new = slice(end, end + piece)
        logits, cache = next_logits(params, padded[:, new], positions[:, new], cache)
        end += piece
        np.testing.assert_allclose(logits, whole[:, end - padding - 1], rtol=1e-4, atol=1e-5)
    assert cache.used == end == padding + 11


@pytest.mark.parametrize("name", ["grouped", "sliding_window", "gpt2"])
def test_greedy_generation_equals_recomputing_everything(name, rng):
    model = LanguageModel(CONFIGS[name])
    params = random_params(model, rng)
    prompts = random_prompts(rng, 5, 1, 9)
    expected = greedy_without_cache(model, params, prompts, 12)
    assert generate(model, params, prompts, max_new_tokens=12, stop_ids=[]) == expected


def test_prompts_longer_than_a_bucket_are_no_exception(rng):
    model = LanguageModel(LLAMA)
    params = random_params(model, rng)
    prompts = random_prompts(rng, 64, 65, 130)
    expected = greedy_without_cache(model, params, prompts, 5)
    assert generate(model, params, prompts, max_new_tokens=5, stop_ids=[]) == expected


@FAMILIES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_other_rows(config, temperature, rng):
    model = LanguageModel(config)
    params = random_params(model, rng)
    first, *others = random_prompts(rng, 4, 7, 30, 2, 61)
    arguments = {"max_new_tokens": 12, "stop_ids": [], "temperature": temperature, "key": jax.random.key(5)}
    one = generate(model, params, [first, *others[:2]], **arguments)
    two = generate(model, params, [first, *others[2:]], **arguments, pad_id=3)
    assert one[0] == two[0]
    if temperature == 0:
        assert one[0] == generate(model, params, [first], **arguments)[0]


@FAMILIES
def test_rows_end_before_the_stop_token(config, rng):
    model = LanguageModel(config)
    params = random_params(model, rng)
    prompts = random_prompts(rng, 5, 3, 8)
    free = generate(model, params, prompts, max_new_tokens=12, stop_ids=[])
    stops = [free[0][2], free[1][5], -1]
    expected = [row[: min([row.index(s) for s in stops if s in row], default=12)] for row in free]
    assert generate(model, params, prompts, max_new_tokens=12, stop_ids=stops) == expected
    at_once = [row[0] for row in free]
    assert generate(model, params, prompts, max_new_tokens=12, stop_ids=at_once) == [[], [], []]


def test_temperature_draws_from_the_softmax(rng):
    model = LanguageModel(LLAMA)
    params = random_params(model, rng)
    prompt, draws, temperature = random_prompts(rng, 2)[0], 2000, 1.7
    key = jax.random.key(int(rng.integers(2**31)))
    rows = generate(
        model,
        params,
        [prompt] * draws,
        max_new_tokens=1,
        stop_ids=[],
        temperature=temperature,
        key=key,
    )
    counts = np.bincount([row[0] for row in rows], minlength=LLAMA.vocab_size)
    logits = jax.jit(model.logits)(params, np.array([prompt]))[0, -1]
    expected = draws * np.asarray(jax.nn.softmax(logits / temperature))
    common = expected > 5
    assert common.sum() > 10
    # Pearson's statistic has about this many degrees of freedom, and a deviation of √2 times their root.
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < common.sum() + 7 * np.sqrt(2 * common.sum())


def test_sampling_is_reproducible_and_varies_with_key_and_row(rng):
    model = LanguageModel(LLAMA)
    params = random_params(model, rng)
    prompts = random_prompts(rng, 6) * 3

    def sample(seed):
        key = jax.random.key(seed)
        return generate(model, params, prompts, max_new_tokens=12, stop_ids=[], temperature=2.0, key=key)

    once = sample(1)
    assert once == sample(1)
    assert once != sample(2)
    assert once[0] != once[1]
    assert len(set(once[0])) > 3


def test_prompts_of_one_bucket_compile_once(rng):
    model = LanguageModel(LLAMA)
    params = random_params(model, rng)
    generate(model, params, random_prompts(rng, 5, 7, 1), max_new_tokens=12, stop_ids=[])
    compiled = generation._generate._cache_size()
    for lengths in [(1, 64, 2), (20, 3, 5), (40, 41, 42)]:
        generate(model, params, random_prompts(rng, *lengths), max_new_tokens=12, stop_ids=[])
    assert generation._generate._cache_size() == compiled
    generate(model, params, random_prompts(rng, 65, 3, 9), max_new_tokens=9, stop_ids=[])
    assert generation._generate._cache_size() == compiled + 1


def test_bfloat16_parameters_generate(rng):
    model = LanguageModel(LLAMA)
    params = random_params(model, rng, jnp.bfloat16)
    rows = generate(model, params, random_prompts(rng, 5, 7), max_new_tokens=6, stop_ids=[])
    assert [len(row) for row in rows] == [6, 6]


def test_no_prompts_give_no_rows(rng):
    model = LanguageModel(LLAMA)
    assert generate(model, random_params(model, rng), [], max_new_tokens=3, stop_ids=[]) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [61]], {}, "prompt 1 has tokens from 61 to 61, but the vocabulary has 61"),
        ([[-1, 2]], {}, "prompt 0 has tokens from -1 to 2"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt 0 has 250 tokens.*max_position_embeddings 256"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([[1]], {"temperature": -0.5}, "temperature must be 0 or more, not -0.5"),
        ([[1]], {"temperature": 0.5}, "temperature 0.5 draws tokens at random and needs a key"),
    ],
)
def test_bad_input_is_named(prompts, changes, message, rng):
    model = LanguageModel(LLAMA)
    arguments = {"max_new_tokens": 4, "stop_ids": []} | changes
    with pytest.raises(InputError, match=message):
        generate(model, random_params(model, rng), prompts, **arguments)


def test_a_trained_llama_tells_its_story_to_the_letter(shared):
    folder = shared / "models/stories260k"
    checkpoint = checkpoints.load(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    assert checkpoint.tokenizer is not None
    prompt = [checkpoint.tokenizer.bos_id]
    rows = generate(LanguageModel(checkpoint.config), checkpoint.params, [prompt], max_new_tokens=256, stop_ids=[])
    golden = (folder / "golden_greedy.txt").read_text(encoding="utf-8")
    assert checkpoint.tokenizer.decode(rows[0]).strip() == golden.strip()
