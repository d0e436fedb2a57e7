"""Tokenizers through `tokenizers`: byte-level BPE, characters, bytes, in one tokenizer.json."""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, SupportsInt

import numpy as np
import tokenizers as hf
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from minilm.choices import choose
from minilm.config import TokenizerConfig
from minilm.errors import UserError
from minilm.files import write_atomically

PAD, EOS = "<|pad|>", "<|endoftext|>"
BYTES = 258  # the smallest byte-level vocabulary: two special tokens and every byte
PIECE = 2**18  # characters; of a longer text the pieces are encoded beside each other
BLOCK = 2**21  # characters encoded at once: `tokenizers` needs a hundred bytes for each
CHUNK = 4096  # and no more pieces than these


class Tokenizer:
    """Text to ids and back, exactly. End-of-text is also the start token; padding is another id.

    Text that looks like a special token is plain text: the specials are ids without a spelling.

    >>> tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), [])
    >>> tokenizer.encode("hé")
    [106, 197, 171]
    >>> tokenizer.decode([1, 106, 197, 171, 1, 0])
    'hé'
    """

    pad_id, eos_id = 0, 1

    def __init__(self, inner: hf.Tokenizer):
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()

    @functools.cached_property
    def kind(self) -> Literal["bpe", "characters", "bytes"]:
        """Bytes are byte-level BPE without a merge; one of the user's own counts as "bpe"."""
        if isinstance(self._inner.model, models.WordLevel) and not any(
            len(token) > 1 for token in self._vocabulary[2:]
        ):
            return "characters"
        return "bytes" if self.vocab_size == BYTES else "bpe"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-text.

        Raises:
          UserError: a character outside the alphabet of a character tokenizer, or half a surrogate
            pair, which is no Unicode text; with its offset.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; one call for many texts uses all cores."""
        return [ids.tolist() for ids in self.stream(texts)]

    def stream(self, texts: Iterable[str]) -> Iterator[Integer[np.ndarray, " n"]]:
        """The ids of each text, as `dtype`, of texts that are read when their turn comes.

        All cores encode a few million characters at a time. Pieces of a long text are cut where a
        byte-level tokenizer cuts anyway, so its ids are those of the whole.
        """
        if self.kind == "characters":
            yield from map(self._letters, texts)
            return
        pieces: list[str] = []
        ends: list[bool] = []  # whether a piece is the last of its text
        parts: list[np.ndarray] = []
        size = 0

        def encoded() -> Iterator[np.ndarray]:
            found = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
            for ids, end in zip(found, ends, strict=True):
                parts.append(np.array(ids.ids, self.dtype))
                if end:
                    yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                    parts.clear()

        for text in _checked(texts):
            *most, last = cut(text, PIECE)
            for piece, end in [*((piece, False) for piece in most), (last, True)]:
                pieces.append(piece)
                ends.append(end)
                size += len(piece)
                if size >= BLOCK or len(pieces) == CHUNK:
                    yield from encoded()
                    pieces, ends, size = [], [], 0
        yield from encoded()

    @property
    def dtype(self) -> type[np.generic]:
        """The smaller of uint16 and int32 that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.int32

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text; special tokens are dropped, bytes that are no UTF-8 read as U+FFFD."""
        kept = [i for i in map(int, ids) if i not in (self.pad_id, self.eos_id)]
        return self._inner.decode(kept, skip_special_tokens=False)

    def tokens(self, ids: Iterable[SupportsInt]) -> list[str]:
        r"""A readable piece an id; a part of a character reads like `\xc3`."""
        return [self._pieces[int(i)] for i in ids]

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        write_atomically(path, self._inner.to_str(pretty=True).encode())

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON: equal for equal tokenizers only."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError: missing or damaged file, or one whose special tokens are others."""
        inner = _read(path)
        specials = (inner.id_to_token(cls.pad_id), inner.id_to_token(cls.eos_id))
        if specials != (PAD, EOS):
            raise UserError(
                "ids 0 and 1 must be the padding and end-of-text tokens",
                where=path,
                value=specials,
                allowed=f"{PAD}, {EOS}",
            )
        return cls(inner)

    @functools.cached_property
    def _vocabulary(self) -> list[str]:
        return [self._inner.id_to_token(i) or "" for i in range(self.vocab_size)]

    @functools.cached_property
    def _pieces(self) -> list[str]:
        if self.kind == "characters":
            return self._vocabulary
        bytes_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        return (
            self._vocabulary[:2]
            + [
                bytes(bytes_of[c] for c in token).decode(errors="backslashreplace")
                if all(c in bytes_of for c in token)
                else token  # of a user's own tokenizer that is not on bytes
                for token in self._vocabulary[2:]
            ]
        )

    @functools.cached_property
    def _ids(self) -> Integer[np.ndarray, " C"]:
        """The id of each code point, 0 of those that have none."""
        table = np.zeros(sys.maxunicode + 1, self.dtype)
        for i, letter in enumerate(self._vocabulary):
            if i > self.eos_id and letter:
                table[ord(letter)] = i
        return table

    def _letters(self, text: str) -> Integer[np.ndarray, " n"]:
        """Looked up here, much faster than `tokenizers` does, and with an offset for the error."""
        ids = self._ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        if ids.all():
            return ids
        offset = int(np.argmin(ids))
        raise UserError(
            f"character {text[offset]!r} at offset {offset} is not in the alphabet "
            f"of {len(self._vocabulary) - 2} characters",
            where="tokenizer",
            hint='tokenizer.kind "bpe" or "bytes" take any text',
        )


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of the configured kind; the same texts give the same one.

    "bpe" has at most `vocab_size` tokens, fewer where the texts have no more pairs to merge;
    "characters" one for each distinct character of the texts; "bytes" one for each byte; "file" is
    one of the user's own.

    Raises:
      UserError: as `Tokenizer.encode`; a file that is missing or no tokenizer.
    """
    return Tokenizer(choose(KINDS, config.kind, "tokenizer.kind")(texts, config))


def cut(text: str, size: int) -> Iterator[str]:
    """A text in pieces of at most `size` characters, one at least; all but the first begin with a
    space or an end of line, where the piece before has any after a word.

    Byte-level pre-tokenization (GPT-2's) begins a new part at every such place.

    >>> list(cut("one two  three", 8))
    ['one two', '  three']
    """
    start = 0
    while len(text) - start > size:
        found = _PLACE.match(text, start, start + size + 1)
        end = found.end() if found else start + size
        yield text[start:end]
        start = end
    yield text[start:]


# Whitespace that every splitter of the library knows as such.
_PLACE = re.compile(r".*\S(?=[ \n\t\r\f\v\u00a0\u3000])", re.DOTALL)


def _read(path: Path) -> hf.Tokenizer:
    try:
        return hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no tokenizer here", where=path) from None
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"damaged tokenizer file: {error}", where=path) from error


def _from_file(texts: Iterable[str], config: TokenizerConfig) -> hf.Tokenizer:
    """A tokenizer.json of any making, every id two higher: 0 and 1 are padding and end-of-text.

    What it would add around a text (its post-processor) is left out; its own end-of-text stays a
    token like others.
    """
    path = Path(config.file or "")
    inner = _read(path)
    if (inner.id_to_token(0), inner.id_to_token(1)) == (PAD, EOS):
        return inner
    record = json.loads(inner.to_str())
    model = record["model"]
    own = {PAD, EOS}
    if isinstance(model["vocab"], dict):
        ids = {(f"{t} (own)" if t in own else t): i + 2 for t, i in model["vocab"].items()}
        model["vocab"] = {PAD: 0, EOS: 1} | ids
    else:  # Unigram: pieces with scores, an id being the place
        least = min((score for _, score in model["vocab"]), default=0.0) - 100.0
        model["vocab"] = [[PAD, least], [EOS, least], *model["vocab"]]
        model["unk_id"] = None if model.get("unk_id") is None else model["unk_id"] + 2
    added = [token | {"id": token["id"] + 2} for token in record["added_tokens"]]
    record["added_tokens"] = [token for token in added if token["content"] not in own]
    record |= {"post_processor": None, "truncation": None, "padding": None}
    try:
        moved = hf.Tokenizer.from_str(json.dumps(record))
    except Exception as error:
        raise UserError(f"cannot add the special tokens: {error}", where=path) from error
    gaps = [i for i in range(moved.get_vocab_size()) if moved.id_to_token(i) is None]
    if gaps:
        raise UserError("its ids have gaps", where=path, value=gaps[:5])
    return moved


def _bpe(texts: Iterable[str], config: TokenizerConfig) -> hf.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019)."""
    inner = _bytes((), config)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, EOS],
        show_progress=False,
        initial_alphabet=_byte_letters(),
    )
    pieces = (piece for text in _checked(texts) for piece in cut(text, PIECE))
    inner.train_from_iterator(pieces, trainer)
    # The trainer registers the special tokens as strings to look for in texts: undone.
    return hf.Tokenizer.from_str(json.dumps(json.loads(inner.to_str()) | {"added_tokens": []}))


def _bytes(texts: Iterable[str], config: TokenizerConfig) -> hf.Tokenizer:
    """Byte b is id b + 2."""
    vocabulary = {t: i for i, t in enumerate([PAD, EOS, *_byte_letters()])}
    inner = hf.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _characters(texts: Iterable[str], config: TokenizerConfig) -> hf.Tokenizer:
    alphabet: set[str] = set()
    for text in _checked(texts):
        alphabet.update(text)
    vocabulary = {t: i for i, t in enumerate([PAD, EOS, *sorted(alphabet)])}
    inner = hf.Tokenizer(models.WordLevel(vocabulary))  # no unknown token: `tokenizers` raises too
    inner.pre_tokenizer = pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return inner


KINDS = {"bpe": _bpe, "bytes": _bytes, "characters": _characters, "file": _from_file}


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's encoder.py).

    Printable Latin-1 stands for itself, every other byte for a letter from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The same texts; half a surrogate pair has no UTF-8 form."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"not Unicode text: lone surrogate {text[error.start]!r} at offset {error.start}",
                where="tokenizer",
            ) from None
        yield text
