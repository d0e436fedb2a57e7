"""Tokenizers through `tokenizers`: byte-level BPE, characters, bytes, in one tokenizer.json."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from minilm.choices import choose
from minilm.config import TokenizerConfig
from minilm.errors import UserError

PAD, EOS = "<|pad|>", "<|endoftext|>"
CHUNK = 4096  # texts encoded at once


class Tokenizer:
    """Text to ids and back, exactly. End-of-text is also the start token; padding is another id.

    Text that looks like a special token is plain text: the specials are ids without a spelling.
    """

    pad_id, eos_id = 0, 1

    def __init__(self, inner: hf.Tokenizer):
        self._inner = inner
        self.vocab_size = inner.get_vocab_size()
        self._characters = isinstance(inner.model, models.WordLevel)

    def encode(self, text: str) -> list[int]:
        """Raises UserError on a character that the alphabet lacks, with its offset."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._characters:
            return [self._letters(text) for text in texts]
        for text in texts:
            _check_encodable(text)
        out: list[list[int]] = []
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start : start + CHUNK])
            out += [e.ids for e in self._inner.encode_batch_fast(part, add_special_tokens=False)]
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are dropped."""
        kept = [int(i) for i in ids if i not in (self.pad_id, self.eos_id)]
        if self._characters:
            return "".join(self._alphabet[i] for i in kept)
        return self._inner.decode(kept, skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """A readable piece an id."""
        names = {self.pad_id: PAD, self.eos_id: EOS}
        return [names[int(i)] if int(i) in names else self.decode([i]) for i in ids]

    def save(self, path: Path) -> None:
        from minilm.checkpoint import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self._inner.to_str(pretty=True).encode())

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError: missing or damaged file, or one whose special tokens are others."""
        try:
            inner = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError("no tokenizer here", where=path) from None
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"damaged tokenizer file: {error}", where=path) from error
        if (inner.id_to_token(cls.pad_id), inner.id_to_token(cls.eos_id)) != (PAD, EOS):
            raise UserError(
                "ids 0 and 1 must be the padding and end-of-text tokens", where=path,
                value=(inner.id_to_token(0), inner.id_to_token(1)), allowed=f"{PAD}, {EOS}",
            )
        return cls(inner)

    @functools.cached_property
    def _alphabet(self) -> list[str]:
        return [self._inner.id_to_token(i) or "" for i in range(self.vocab_size)]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {c: i for i, c in enumerate(self._alphabet) if i > self.eos_id}

    def _letters(self, text: str) -> list[int]:
        try:
            return [self._index[c] for c in text]
        except KeyError:
            at = next(i for i, c in enumerate(text) if c not in self._index)
            raise UserError(
                f"character {text[at]!r} at offset {at} is not in the alphabet",
                where="tokenizer", hint='tokenizer.kind "bpe" or "bytes" take any text',
            ) from None


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of the configured kind; the same texts give the same one."""
    rows = {"bpe": _bpe, "bytes": _bpe, "characters": _characters}
    make = choose(rows, config.kind, "tokenizer.kind")
    size = config.vocab_size if config.kind == "bpe" else 258
    return Tokenizer(make(texts, size))


def _bpe(texts: Iterable[str], size: int) -> hf.Tokenizer:
    """Byte-level BPE (Radford et al. 2019); without merges it is bytes."""
    if size == 258:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {t: i for i, t in enumerate([PAD, EOS, *alphabet])}
        inner = hf.Tokenizer(models.BPE(vocab, []))
    else:
        inner = hf.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if size > 258:
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[PAD, EOS], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        inner.train_from_iterator(_checked(texts), trainer)
    return _plain(inner)


def _characters(texts: Iterable[str], size: int) -> hf.Tokenizer:
    alphabet = sorted({c for text in texts for c in text})
    vocab = {t: i for i, t in enumerate([PAD, EOS, *alphabet])}
    return hf.Tokenizer(models.WordLevel(vocab, unk_token=PAD))


def _plain(inner: hf.Tokenizer) -> hf.Tokenizer:
    """Without added tokens: no spelling in a text turns into a special id."""
    import json

    state = json.loads(inner.to_str())
    state["added_tokens"] = []
    return hf.Tokenizer.from_str(json.dumps(state))


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _check_encodable(text)
        yield text


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"not Unicode text: lone surrogate at offset {error.start}", where="tokenizer"
        ) from None
