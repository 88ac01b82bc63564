"""Real models: what a trained LLaMA must say, and how unlikely it finds plain prose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.models import checkpoints
from jaxsparse.models.fetch import cache_folder
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

PROSE = """The water cycle describes how water moves around the Earth. Water evaporates from the oceans, lakes and \
rivers when it is heated by the sun. The water vapor rises into the atmosphere, where it cools and condenses into \
tiny droplets that form clouds. When the droplets become heavy enough, they fall back to the ground as rain or \
snow. Some of this water flows over the land into streams and rivers, and eventually returns to the ocean. Some of \
it soaks into the soil, where it is taken up by the roots of plants or becomes groundwater."""


@pytest.fixture(scope="module")
def smollm2() -> checkpoints.Checkpoint:
    if not (cache_folder() / "smollm2-135m").is_dir():
        pytest.skip(f"smollm2-135m is not in {cache_folder()}; `make demo` fetches it")
    return checkpoints.load("smollm2-135m")


def test_stories260k_says_what_llama2c_says(shared):
    folder = shared / "models" / "stories260k"
    loaded = checkpoints.load(folder / "stories260K.bin")
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == 512
    golden = (folder / "golden_greedy.txt").read_text(encoding="utf-8")
    prompts = [[loaded.tokenizer.bos_id]]
    stop_ids = loaded.tokenizer.stop_ids
    model = LanguageModel(loaded.config)
    # llama2.c's default of 256 steps.
    rows = generate(model, loaded.params, prompts, max_new_tokens=256, stop_ids=stop_ids)
    assert loaded.tokenizer.decode(rows[0]) == golden
    assert loaded.tokenizer.encode(golden)[1:] == rows[0]


def test_smollm2_is_whole(smollm2):
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert smollm2.config.rope_theta == 1e5
    assert smollm2.config.rms_norm_eps == 1e-5
    assert smollm2.config.tie_word_embeddings
    assert smollm2.tokenizer.vocab_size == smollm2.config.vocab_size == 49152


def test_smollm2_tokenizer(smollm2):
    """Ids that Hugging Face's tokenizer of this model gives."""
    tokenizer = smollm2.tokenizer
    assert tokenizer.encode("Hello world 12") == [19556, 905, 216, 33, 34]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = smollm2.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(question, True), add_bos=False)
    model, stop_ids = LanguageModel(smollm2.config), tokenizer.stop_ids
    rows = generate(model, smollm2.params, [prompt], max_new_tokens=16, stop_ids=stop_ids)
    assert "Paris" in tokenizer.decode(rows[0])


@pytest.mark.slow
def test_smollm2_finds_prose_likely(smollm2):
    tokens = jnp.asarray([smollm2.tokenizer.encode(PROSE)])
    model = LanguageModel(smollm2.config)

    def perplexity(params) -> float:
        chances = jax.nn.log_softmax(model.logits(params, tokens)[0, :-1])
        return float(np.exp(-np.mean(np.take_along_axis(np.asarray(chances), np.asarray(tokens).T[1:], 1))))

    # About 6 with the right rotary layout and 27 with the wrong one, on prose of this kind.
    assert 3 < perplexity(smollm2.params) < 9
    attention = dict(smollm2.params["layers"]["self_attn"])
    kernel = np.asarray(attention["q_proj"]["kernel"])
    pairs = kernel.reshape(*kernel.shape[:2], smollm2.config.num_heads, 2, -1)
    attention["q_proj"] = {"kernel": jnp.asarray(pairs.swapaxes(3, 4).reshape(kernel.shape))}
    wrong = {**smollm2.params, "layers": {**smollm2.params["layers"], "self_attn": attention}}
    assert perplexity(wrong) > 12
