"""A token for each frequent word and symbol; spaces follow from a rule, and markers stand where a text departs from it."""

import collections
import fractions
import functools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from textgen_jax import errors
from textgen_jax.text import base

# Name and printed form, in order of id. No piece of a text is spelled like these: '<' is always a piece of its own.
SPECIALS = {'unknown': '<unk>', 'end_of_line': '<eol>', 'end_of_text': base.END_OF_TEXT, 'glue': '<glue>', 'space': '<space>'}
_MARKERS = ('glue', 'space')  # what standardising leaves out

# Signs that open and close alike have two ids, told apart by their neighbours, or each would cost a marker. While a text is
# split, an opening one is half a surrogate pair, which no text holds.
_SIGNS = '"\'`*_'
_OPENING = {sign: chr(0xD800 + place) for place, sign in enumerate(_SIGNS)}
_SPELLING = {ord(opening): sign for sign, opening in _OPENING.items()}
_PRINTED = {opening: f'<open{sign}>' for sign, opening in _OPENING.items()}
_OPENING_SIGN = re.compile(rf"""[{_SIGNS}](?<![^\s(\[{{<“‘«„¿¡—–{_SIGNS}\-].)(?!\s|\Z)""", re.DOTALL)

_PART_CHARS = 1 << 20  # a text is split by so much at a time, which takes 26 bytes for each
_MAX_COUNTED = 2_000_000  # distinct pieces, some 250 MB


class WordTokenizer:
  """Ids are the special ones, then `words`.

  A text is words (letters, digits and marks, with apostrophes and hyphens inside), runs of hyphens or of dots, and every other
  character but the space alone. Between two of these readers expect one space or none (`_sides`). Where a text has what they
  expect nothing is said; '<glue>' takes the expected space away, and '<space>' is one more. So decoding gives back the very
  text, but for unknown pieces, which become '<unk>', spaced as words.

  Trailing spaces are a '<glue>' and as many '<space>': a word that continues the text then follows with no second space.

  Args:
    words: distinct pieces, as `_split` gives them.
    standardize: text is standardised first, and spaces are where the rule has them; there are no markers.
  """

  kind = 'word'

  def __init__(self, words: Sequence[str], standardize: bool):
    self._words = list(words)
    self.standardizes = standardize
    names = _special_names(standardize)
    self.special_ids = {name: i for i, name in enumerate(names)}
    self.vocab_size = len(names) + len(words)
    texts = {'unknown': '<unk>', 'end_of_line': '\n', 'space': ' '}
    self._texts = [texts.get(name, '') for name in names] + [word.translate(_SPELLING) for word in words]
    sides = [(name == 'unknown',) * 2 for name in names] + [_sides(word) for word in words]
    self._before, self._after = np.array(sides, bool).T

    ids = {word: i for i, word in enumerate(words, len(names))} | {'\n': self.special_ids['end_of_line']}
    for sign, opening in _OPENING.items():  # one id serves both where the other is too rare to have one
      known = ids.get(sign, ids.get(opening))
      if known is not None:
        ids.setdefault(sign, known)
        ids.setdefault(opening, known)
    self._codes = _Codes(ids, self.special_ids['unknown'], self.vocab_size)

  @classmethod
  def train(cls, config: base.TokenizerConfig, texts: Iterable[str]) -> 'WordTokenizer':
    """Learns the most frequent words of `texts`, the training split."""
    counts, total = _count(texts, config.standardize)
    if not counts:
      raise errors.UserError('tokenizer.kind=word needs a training text of at least 1 word')
    words = sorted(counts, key=lambda piece: (-counts[piece], piece))
    if config.vocab_size:
      num_special = len(_special_names(config.standardize))
      _check_size(config.vocab_size, len(words), num_special)
      size = config.vocab_size - num_special
    else:
      # As a fraction: in floating point 0.07 of 100 is more than 7.
      wanted = math.ceil(fractions.Fraction(str(config.coverage)) * total)
      size = int(np.searchsorted(np.cumsum([counts[word] for word in words]), wanted)) + 1
    tokenizer = cls(words[:size], config.standardize)
    num_bytes = len(json.dumps(tokenizer.fields()))
    if num_bytes >= base.MAX_FILE_BYTES:  # found now, not when the trained model is to be used
      raise errors.UserError(
          f'tokenizer.vocab_size={config.vocab_size}, tokenizer.coverage={config.coverage} make a vocabulary of {len(words[:size]):,} words'
          f' and {num_bytes:,} bytes: a tokenizer file has at most {base.MAX_FILE_BYTES:,}'
      )
    return tokenizer

  @classmethod
  def from_fields(cls, fields: dict, where: str) -> 'WordTokenizer':
    base.check_fields(fields, {'standardize': bool, 'words': list}, where)
    openings, words = {printed: opening for opening, printed in _PRINTED.items()}, fields['words']
    for place, word in enumerate(words):
      if not isinstance(word, str) or not (word in openings or _is_piece(word)):
        raise errors.UserError(f'{where}: words[{place}]={word!r:.60} must be one word or one symbol')
    if not words or len(set(words)) < len(words):
      raise errors.UserError(f'{where}: words must be at least one, and distinct')
    return cls([openings.get(word, word) for word in words], fields['standardize'])

  def encode(self, text: str) -> np.ndarray:
    _check_text(text, 'character')
    parts = [self._encode_part(part) for part in _parts(text)]
    return np.concatenate([np.zeros(0, np.int32), *parts])

  def _encode_part(self, text: str) -> np.ndarray:
    pieces, trailing_spaces = _split(text, self.standardizes)
    codes = np.fromiter(map(self._codes.__getitem__, pieces), np.int64, len(pieces))
    spaces, ids = np.divmod(codes, self.vocab_size)
    if self.standardizes:
      return ids.astype(np.int32)
    expected = np.zeros(len(ids), np.int64)
    expected[1:] = self._after[ids[:-1]] & self._before[ids[1:]]
    ends = np.cumsum(1 + np.abs(spaces - expected))
    out = np.full(ends[-1] if ends.size else 0, self.special_ids['space'], np.int32)
    out[ends - 1] = ids
    out[ends[spaces < expected] - 2] = self.special_ids['glue']
    # Before a word that continues the text, the rule would add a space to the trailing ones.
    glue = [self.special_ids['glue']] if trailing_spaces and ids.size and self._after[ids[-1]] else []
    return np.concatenate([out, np.array(glue + [self.special_ids['space']] * trailing_spaces, np.int32)])

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self.incremental_decoder().feed(ids)

  def unknowns(self, text: str) -> list[str]:
    _check_text(text, 'character')
    pieces = (piece.lstrip(' ') for part in _parts(text) for piece in _split(part, self.standardizes)[0])
    return [piece.translate(_SPELLING) for piece in pieces if piece not in self._codes]

  def cut(self, text: str) -> int:
    # A newline is a piece of its own, has no space expected about it, hides its neighbours' spaces and letters from each other
    # (signs that open, normal forms, the Greek final s), and a text that starts is like a line that starts.
    return text.rfind('\n') + 1

  def incremental_decoder(self) -> '_WordDecoder':
    return _WordDecoder(self._texts, self._before.tolist(), self._after.tolist(), self.special_ids.get('space', -1))

  def spelling(self) -> base.Spelling:
    """Two contexts: whether a space is expected after what came, should the next piece expect it too."""
    texts = tuple(text.encode() for text in self._texts)
    spaced = tuple(b' ' * before + text for before, text in zip(self._before.tolist(), texts, strict=True))
    next_CV = np.tile(self._after.astype(np.int32), (2, 1))
    if 'space' in self.special_ids:
      next_CV[:, self.special_ids['space']] = [0, 1]
    return base.Spelling((texts, spaced), next_CV)

  def pieces(self) -> list[str]:
    """What each id stands for, printable and distinct, in order of id."""
    words = (_PRINTED.get(word, word) for word in self._words)
    escaped = [word if word.isprintable() else word.encode('unicode_escape').decode() for word in words]
    return [SPECIALS[name] for name in self.special_ids] + escaped

  def save(self, directory: str | os.PathLike) -> None:
    base.write_fields(directory, self.fields())

  def fingerprint(self) -> str:
    return base.fingerprint(self.fields())

  def fields(self) -> dict:
    words = [_PRINTED.get(word, word) for word in self._words]
    return {'format': base.FORMAT, 'kind': self.kind, 'standardize': self.standardizes, 'words': words}


class _WordDecoder:
  """The space that a word expects is given with the word, and '<space>' at once, so nothing waits."""

  def __init__(self, texts: list[str], before: list[bool], after: list[bool], space: int):
    self._texts, self._before, self._after, self._space = texts, before, after, space
    self._expects = False  # whether a space is expected after what came, should the next piece expect it too

  def feed(self, ids: Sequence[int] | np.ndarray) -> str:
    parts, expects = [], self._expects
    for i in base.check_ids(ids, len(self._texts)).tolist():
      if expects and self._before[i]:
        parts.append(' ')
      parts.append(self._texts[i])
      if i != self._space:
        expects = self._after[i]
    self._expects = expects
    return ''.join(parts)

  def flush(self) -> str:
    self._expects = False
    return ''


class _Codes(dict):
  """A piece with the spaces before it, to spaces * vocab_size + id; without spaces and with one it is looked up, not worked out."""

  def __init__(self, ids: dict[str, int], unknown: int, vocab_size: int):
    super().__init__(ids)
    self.update((f' {piece}', vocab_size + i) for piece, i in ids.items())
    self._unknown, self._vocab_size = unknown, vocab_size

  def __missing__(self, spaced: str) -> int:
    piece = spaced.lstrip(' ')
    return (len(spaced) - len(piece)) * self._vocab_size + self.get(piece, self._unknown)


def _special_names(standardize: bool) -> list[str]:
  return [name for name in SPECIALS if not (standardize and name in _MARKERS)]


def _sides(piece: str) -> tuple[bool, bool]:
  """Whether a space is expected before `piece` and after it; there is one where both neighbours expect it."""
  first, category = piece[0], unicodedata.category(piece[0])
  if first in ',.;:!?%\u2026' or piece in _OPENING or category in ('Pe', 'Pf'):
    return False, True
  if first in '#@\u00bf\u00a1' or first in _PRINTED or category in ('Ps', 'Pi', 'Sc'):
    return True, False
  wide = category[0] == 'P' and unicodedata.east_asian_width(first) in 'FW'
  dash = category == 'Pd' and piece != '-'
  if wide or dash or first in '/\\' or category[0] in 'MZC':
    return False, False
  return True, True


@functools.cache
def _piece() -> re.Pattern:
  """Any piece of a text, whose signs that open are set apart."""
  # \w has no marks, which Hindi vowels and decomposed accents are; all but the variation selectors stand below 0x20000.
  points = [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]
  marks = ''.join(chr(point) for point in points if unicodedata.category(chr(point))[0] == 'M') + '\u200c\u200d'  # and the joiners
  letter, inner = r'[^\W_]', "['\u2019\u2010\u2011-]"
  # Most words end at a space: not to look for that among the marks makes splitting 7 times faster.
  marks = rf'(?![\x00-\u02ff])[{marks}]+'
  return re.compile(rf'{letter}+(?:{inner}(?={letter}){letter}*|{marks}{letter}*)*|-{{2,}}|\.{{2,}}|[^ ]')


@functools.cache
def _spaced_piece() -> re.Pattern:
  return re.compile(f' *(?:{_piece().pattern})')


def _is_piece(word: str) -> bool:
  # Not fullmatch, which tries every way to share out the marks of what doesn't match.
  match = _piece().match(word)
  return match is not None and match.end() == len(word) and word != '\n' and base.first_surrogate(word) < 0


def _split(text: str, standardize: bool) -> tuple[list[str], int]:
  """The pieces of `text`, each with the spaces before it, and how many spaces trail."""
  if standardize:
    text = _standardize(text)
  body = text.rstrip(' ')  # left there, they would be tried from each of them on: quadratic
  marked = _OPENING_SIGN.sub(lambda match: _OPENING[match[0]], body)
  return _spaced_piece().findall(marked), len(text) - len(body)


def _standardize(text: str) -> str:
  """NFKC, lower case, white space within a line as single spaces."""
  # Twice: capital H with a line below is two characters, lower h with it is one.
  text = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', text).lower())
  return re.sub(r'[^\S\n]+', ' ', text)


def _parts(text: str) -> Iterator[str]:
  """`text` in parts of whole lines, which can be encoded apart."""
  start = 0
  while start < len(text):
    end = text.find('\n', start + _PART_CHARS) + 1 or len(text)
    yield text[start:end]
    start = end


def _count(texts: Iterable[str], standardize: bool) -> tuple[collections.Counter[str], int]:
  """How often each word and symbol occurs, and all of them together; line ends aside, which always have an id.

  Past `_MAX_COUNTED` distinct pieces those seen once are dropped (twice, where that isn't enough, and so on), so memory stays
  bounded; such a piece starts again from nothing. They still count in the sum.
  """
  counts: collections.Counter[str] = collections.Counter()
  total = 0
  for text in texts:
    _check_text(text, 'the training text: character')
    for part in _parts(text):
      for spaced, count in collections.Counter(_split(part, standardize)[0]).items():
        piece = spaced.lstrip(' ')
        if piece != '\n':
          counts[piece] += count
          total += count
      seen = 1
      while len(counts) > _MAX_COUNTED:
        counts = collections.Counter({piece: count for piece, count in counts.items() if count > seen})
        seen += 1
  return counts, total


def _check_size(vocab_size: int, num_words: int, num_special: int) -> None:
  if vocab_size <= num_special:
    raise errors.UserError(f'tokenizer.vocab_size={vocab_size} leaves no id for a word: {num_special} are special')
  if vocab_size > num_words + num_special:
    raise errors.UserError(
        f'tokenizer.vocab_size={vocab_size} is above the {num_words + num_special:,} that the training text gives'
        f' ({num_words:,} distinct words and symbols and {num_special} special ids)'
    )


def _check_text(text: str, what: str) -> None:
  offset = base.first_surrogate(text)
  if offset >= 0:
    raise errors.UserError(f'{what} {text[offset]!r} at offset {offset} is half a surrogate pair, not text')
