"""Tokenizers out of GGUF metadata and llama2.c files, expressed with the models of the `tokenizers` library."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizers import Tokenizer, first_id

__all__ = ["tokenizer_from_gguf", "tokenizer_from_llama2c"]

# GGUF's tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

# Texts that end an answer in the model families here, whichever of them a file names as its end token.
_END_TEXTS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|EOT|>", "</s>")

# How tokenizer.ggml.pre cuts text before the merges, beside GPT-2's own regular expression.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_NAMES = ("gpt-2", "gpt2", "default")
_SINGLE_DIGITS_NAMES = ("smollm", "starcoder", "refact", "codeshell")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs, `tokenizer.ggml.*` and `tokenizer.chat_template` among them.

    Returns:
        The tokenizer.

    Raises:
        InputError: a key is missing, or a kind of tokenizer that is not supported.
    """
    kind = _required(metadata, "tokenizer.ggml.model")
    tokens: list[str] = _required(metadata, "tokenizer.ggml.tokens")
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        backend = _byte_level(tokens, _required(metadata, "tokenizer.ggml.merges"), _pre(metadata))
    elif kind == "llama":
        scores = _required(metadata, "tokenizer.ggml.scores")
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = _scored_pieces(tokens, scores, space="\u2581", prefix=prefix)
    else:
        raise InputError(f"tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2', 'llama'")
    for type_, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, t in zip(tokens, types, strict=True)
                if t == type_
            ]
        )
    key = "tokenizer.ggml.{}_token_id".format
    bos, eos, pad = (metadata.get(key(name)) for name in ("bos", "eos", "padding"))
    ends = [eos, metadata.get(key("eot")), metadata.get(key("eom"))]
    ends += [tokens.index(text) for text in _END_TEXTS if text in tokens]
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    return _finish(backend, bos, eos, pad, ends, add_bos, metadata.get("tokenizer.chat_template"))


def tokenizer_from_llama2c(path: str | Path) -> Tokenizer:
    """Reads the tokenizer file of llama2.c (tok512.bin, tokenizer.bin): scores and pieces.

    As there, id 1 begins a text and ends an answer, a text is encoded with a space before it, and decoding
    takes that space away.

    Args:
        path: the file: an int32 (longest piece), then for every piece a float32 score, an int32 length
            and the bytes.

    Returns:
        The tokenizer.

    Raises:
        InputError: there is no such file, or it is truncated or something else.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            piece = data[offset + 8 : offset + 8 + length]
            if length < 0 or len(piece) != length:
                raise ValueError(f"piece {len(pieces)} ends after the end of the file")
            pieces.append(piece.decode("utf-8"))
            scores.append(score)
            offset += 8 + length
        if len(pieces) < 259:
            raise ValueError(f"{len(pieces)} pieces, fewer than the 256 bytes and 3 special tokens")
    except (struct.error, ValueError) as error:
        raise InputError(f"{path} is not a tokenizer of llama2.c, or truncated: {error}") from error
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the files spell them with line breaks around
    backend = _scored_pieces(pieces, scores, space=" ", prefix=True)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    return _finish(backend, bos=1, eos=2, pad=None, ends=[2, 1], add_bos=True, chat_template=None)


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise InputError(f"the GGUF file has no {key}, so its tokenizer cannot be built")
    return metadata[key]


def _finish(
    backend: Backend,
    bos: int | None,
    eos: int | None,
    pad: int | None,
    ends: Sequence[int | None],
    add_bos: bool,
    chat_template: str | None,
) -> Tokenizer:
    if add_bos and bos is not None:
        token = backend.id_to_token(bos)
        added = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
        )
        # The byte-level processor trims offsets; only one of the two can come first, and offsets go unused.
        backend.post_processor = added
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_id=eos,
        pad_id=first_id(pad, eos),
        stop_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=add_bos and bos is not None,
        chat_template=chat_template,
    )


def _pre(metadata: Mapping[str, Any]) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """Returns the pre-tokenizer, and whether whole words in the vocabulary skip the merges (LLaMA 3)."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _GPT2_NAMES:
        return gpt2, False
    if name in _SINGLE_DIGITS_NAMES:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), False
    if name in _LLAMA3_NAMES:
        split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated", invert=False)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain]), True
    known = ", ".join((*_GPT2_NAMES, *_SINGLE_DIGITS_NAMES, *_LLAMA3_NAMES))
    raise InputError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {known}")


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: tuple[pre_tokenizers.PreTokenizer, bool]) -> Backend:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre[1]))
    backend.pre_tokenizer = pre[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _scored_pieces(tokens: Sequence[str], scores: Sequence[float], *, space: str, prefix: bool) -> Backend:
    """Sentencepiece's BPE: of all neighbours the pair whose union has the highest score merges first.

    As ranked merges: every split of a piece into two pieces, ranked by the whole piece's score.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        splits = ((tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i])))
        merges += [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[0], fuse_unk=True, byte_fallback=True)
    )
    before = [normalizers.Prepend(space)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend
