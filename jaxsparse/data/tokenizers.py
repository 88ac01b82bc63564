"""Text to token ids and back, by the `tokenizers` library, with chat templates as Hugging Face renders them."""

import datetime as dt
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, read_json

__all__ = ["Tokenizer", "check_fits"]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what a model's folder says about it.

    Attributes:
        backend: the tokenizer of the `tokenizers` library.
        bos_id: the id of the token that begins a text, or None.
        eos_id: the id of the token that ends a text, or None.
        pad_id: the id for padding: the padding token, else the end token, else 0.
        stop_ids: all ids that end an answer; the end token first.
        add_bos: whether `encode` begins with `bos_id` unless told otherwise.
        chat_template: a jinja2 template, or None for a model without one.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: any text; special tokens spelled out in it become those tokens.
            add_bos: begin with `bos_id`; None: as the model expects. Give False for a rendered chat template.

        Returns:
            The ids.

        Raises:
            InputError: `add_bos` is True and the tokenizer has no such token.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise InputError("add_bos=True, but this tokenizer has no token that begins a text; use add_bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids.

        Args:
            ids: token ids, on the host.
            skip_special_tokens: leave out tokens such as those that begin and end a text.

        Returns:
            The text; bytes that are not UTF-8 become replacement characters.
        """
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Renders a conversation as the text that the model was trained on.

        Args:
            messages: mappings with "role" (system, user, assistant) and "content".
            add_generation_prompt: end with the beginning of an assistant's answer.

        Returns:
            The text, beginning token included: encode it with `add_bos=False`.

        Raises:
            InputError: there is no chat template, or it rejects the messages.
        """
        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; use a plain prompt")
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        tokens = {name: "" if i is None else self.backend.id_to_token(i) for name, i in named.items()}
        try:
            return _compiled(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **tokens
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template rejects these messages: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json.

        The layout is Hugging Face's, so that its libraries read it too.

        Args:
            folder: an existing folder.

        Raises:
            InputError: a file cannot be written.
        """
        folder = Path(folder)
        token = self.backend.id_to_token
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        special = {name: token(i) for name, i in ids.items() if i is not None and token(i) is not None}
        config = {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **({"chat_template": self.chat_template} if self.chat_template is not None else {}),
        }
        generation = {
            **({"bos_token_id": self.bos_id} if self.bos_id is not None else {}),
            "eos_token_id": list(self.stop_ids),
            "pad_token_id": self.pad_id,
        }
        atomic_write_text(folder / "tokenizer.json", self.backend.to_str(pretty=False))
        atomic_write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
        atomic_write_text(folder / "special_tokens_map.json", json.dumps(special, indent=2, ensure_ascii=False))
        atomic_write_text(folder / "generation_config.json", json.dumps(generation, indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a tokenizer as Hugging Face lays it out.

        Args:
            folder: a folder with tokenizer.json; tokenizer_config.json, special_tokens_map.json,
                generation_config.json, config.json and chat_template.jinja are read where present.

        Returns:
            The tokenizer.

        Raises:
            InputError: there is no tokenizer.json, a file is malformed, or names a token that the vocabulary lacks.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"{path} is not a tokenizer: {error}") from error
        # The tokenizer.json of some models truncates or pads to a length; here that is the batches' work.
        backend.no_truncation()
        backend.no_padding()
        settings = {
            **_optional_json(folder / "special_tokens_map.json"),
            **_optional_json(folder / "tokenizer_config.json"),
        }
        ids = {name: _token_id(backend, settings, name, folder) for name in ("bos_token", "eos_token", "pad_token")}
        generation = {**_optional_json(folder / "config.json"), **_optional_json(folder / "generation_config.json")}
        ends = generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        stop_ids = tuple(dict.fromkeys(i for i in (ids["eos_token"], *ends) if i is not None))
        begins = backend.encode("a").ids[:1]
        return cls(
            backend=backend,
            bos_id=ids["bos_token"],
            eos_id=ids["eos_token"],
            pad_id=first_id(ids["pad_token"], ids["eos_token"]),
            stop_ids=stop_ids,
            add_bos=bool(settings.get("add_bos_token", begins == [ids["bos_token"]])),
            chat_template=_read_chat_template(folder, settings),
        )


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that a model has an embedding for every token.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the model's vocabulary; it may be larger, as some are padded.

    Raises:
        InputError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer does not fit the model: it has {tokenizer.vocab_size} tokens, "
            f"the model's vocabulary has {vocab_size}; give the tokenizer that belongs to this model"
        )


def first_id(*ids: int | None) -> int:
    """Returns the first id that is not None, else 0."""
    return next((i for i in ids if i is not None), 0)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_id(backend: tokenizers.Tokenizer, settings: dict[str, Any], name: str, folder: Path) -> int | None:
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    token_id: int | None = backend.token_to_id(token)
    if token_id is None:
        raise InputError(f"{folder}: the {name} {token!r} is not in the vocabulary of tokenizer.json")
    return token_id


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


@functools.lru_cache(maxsize=8)
def _compiled(chat_template: str) -> jinja2.Template:
    """A chat template, compiled once: rendering takes a hundredth of that."""
    return _chat_environment().from_string(chat_template)


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's templates are written for; sandboxed, as they come with a model."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
    return environment
