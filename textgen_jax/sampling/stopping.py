"""Where a row's text ends by what it says: stop texts, an expression, a number of lines or of sentences."""

import functools
import importlib
import itertools
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from textgen_jax import errors
from textgen_jax.text import base

_NARROW, _WIDE = '.!?…', '。！？'  # no white space follows a wide one
_SIGNS = _NARROW + _WIDE
_CLOSERS = '"\'”’»›)]}」』）】》〉〕］｝'
# A run of signs is tried at its first one alone, and nothing is given back: a text that is all dots takes linear time.
_SENTENCE, _LAST_SENTENCE = (
  re.compile(
    rf'(?<![{_SIGNS}])(?:[{_SIGNS}]++[{re.escape(_CLOSERS)}]*+(?={follows})'
    rf'|[{_NARROW}]*+[{_WIDE}][{_SIGNS}]*+[{re.escape(_CLOSERS)}]*+(?=[^{_SIGNS}]))'
  )
  for follows in (r'\s', r'\s|\Z')
)
# What looks at the text's end or ahead, or doesn't try every way: without it what matches still does when more text follows.
_FICKLE = re.compile(r'\$|\\[bBZ]|\(\?[=!>]|[*+?}]\+')


class Rules(Protocol):
  """The settings that are read here."""

  @property
  def stop(self) -> Sequence[str]:
    """The text ends before the first of these."""

  @property
  def stop_regex(self) -> str:
    """The text ends before a match; empty: there is none."""

  @property
  def lines(self) -> int:
    """The text is so many lines; 0: any number."""

  @property
  def sentences(self) -> int:
    """The text is so many sentences; 0: any number."""


class Regex(NamedTuple):
  """A `stop_regex`, and what is known of its matches."""

  pattern: re.Pattern[str]
  hold: int  # a match that more text makes begins at most so many characters before that text
  fickle: bool  # more text may undo a match


class Text:
  """One row's ids and their text, to where a rule of `settings` ends it.

  After each id the rules are asked, and the row ends with the first id after which one holds, however ids are cut into feeds.
  The text ends where the first of the rules that hold then wants it, counted from the first generated character:

    stop: before a stop text.
    stop_regex: before a match of the expression anywhere in the text (Python's `re`, searched anew after each id).
    lines: before the n-th newline. One that begins the text ends a line, which is empty.
    sentences: after the n-th sentence, which ends with one or more of . ! ? … 。 ！ ？ and the quotes and brackets that close
      there, where white space follows, or anything where a wide sign is among them, or nothing at the end of the stream.
      Abbreviations aren't known: 'Mr. Smith' has a sentence's end in it, and so has '1. One'.

  Args:
    tokenizer: the one that the ids are of.
    prompt_ids: what stands before: a word's leading space depends on it. No rule looks there.
    settings: the rules; any `Rules` will do.

  Attributes:
    ids: what was fed, to the id that completes a rule.
    text: their text, cut where the rule wants it; never half a UTF-8 character.
    stopped: the rule that ended the text, 'stop' (a stop text or stop_regex), 'lines' or 'sentences'; None: none has.

  Raises:
    UserError: stop_regex is no expression, or matches the empty text.
  """

  def __init__(self, tokenizer: base.Tokenizer, prompt_ids: Sequence[int], settings: Rules):
    self._tokenizer, self._prompt, self._rules = tokenizer, prompt_ids, settings
    self._regex = compile_regex(settings.stop_regex) if settings.stop_regex else None
    self._hold = max([len(stop) - 1 for stop in settings.stop] + ([self._regex.hold] if self._regex else []), default=0)
    self._decoder = self._new_decoder()
    self._flushed = False
    self.ids: list[int] = []
    self.text = ''
    self.stopped: str | None = None

  def feed(self, ids: Sequence[int]) -> None:
    """Adds `ids`, to the first one that completes a rule; nothing once the text has ended."""
    if self._regex and self._regex.fickle:
      self._feed_each(ids)
    elif not self.stopped:
      size, text = len(self.ids), self.text
      self._add(ids, self._decoder.feed(ids))
      if self.stopped and len(ids) > 1:  # which of them?
        self.ids, self.text, self.stopped = self.ids[:size], text, None
        self._decoder = self._new_decoder()
        self._decoder.feed(self.ids)
        self._feed_each(ids)

  def flush(self) -> None:
    """Ends the stream: adds what it leaves, U+FFFD for half a character, where no rule ended it before. No ids come after it."""
    if not self.stopped:
      self._flushed = True
      self._add((), self._decoder.flush())

  def ready(self) -> int:
    """How many characters of `text` stay, whatever follows, so that they can be shown already.

    A stop text may have begun at the end, and so may a match of `stop_regex`: as many characters as its longest match has wait,
    all where its length has no bound or it looks ahead. '\\n[A-Z]{2,20}:' is thus shown in pieces, '\\n[A-Z]+:' when it has ended.
    """
    return len(self.text) if self.stopped or self._flushed else max(0, len(self.text) - self._hold)

  def _feed_each(self, ids: Sequence[int]) -> None:
    for i in ids:
      if self.stopped:
        return
      self._add([i], self._decoder.feed([i]))

  def _add(self, ids: Sequence[int], new: str) -> None:
    since = len(self.text)
    self.ids += ids
    self.text += new
    found = self._ends(since)
    if found:
      at, self.stopped = min(found, key=lambda end: end[0])
      self.text = self.text[:at]

  def _ends(self, since: int) -> list[tuple[int, str]]:
    """Where rules want the text to end that didn't hold when it was text[:since], and which they are."""
    text, rules = self.text, self._rules
    found = [(at, 'stop') for stop in rules.stop if (at := text.find(stop, max(0, since - len(stop) + 1))) >= 0]
    if self._regex and (match := self._regex.pattern.search(text, max(0, since - self._regex.hold))):
      found.append((match.start(), 'stop'))
    if rules.lines and (line := _end_of_line(text, since, rules.lines)) is not None:
      found.append((line, 'lines'))
    if rules.sentences and (sentence := _end_of_sentence(text, since, rules.sentences, self._flushed)) is not None:
      found.append((sentence, 'sentences'))
    return found

  def _new_decoder(self) -> base.IncrementalDecoder:
    decoder = self._tokenizer.incremental_decoder()
    decoder.feed(self._prompt)
    return decoder


@functools.lru_cache
def compile_regex(stop_regex: str) -> Regex:
  """The expression, ready for use. Raises UserError for what is none, and for one that matches the empty text."""
  try:
    pattern = re.compile(stop_regex)
  except (re.error, OverflowError, RecursionError) as error:
    raise errors.UserError(f'stop_regex={stop_regex!r:.60} is not a regular expression: {error}') from error
  if pattern.search(''):
    raise errors.UserError(f'stop_regex={stop_regex!r:.60} matches the empty text, so every text would end before it begins')
  fickle = bool(_FICKLE.search(stop_regex))
  if '(?=' in stop_regex or '(?!' in stop_regex:  # what a lookahead sees has no part in the width
    return Regex(pattern, sys.maxsize, fickle)
  width = importlib.import_module('re._parser').parse(stop_regex).getwidth()[1]
  # $ tells whether at most one character follows, a newline: a character that comes can decide it two places before.
  return Regex(pattern, width + 1 if fickle else max(0, width - 1), fickle)


def _end_of_line(text: str, since: int, n: int) -> int | None:
  """Where the n-th newline is; None where it isn't, or no newline came after text[:since]."""
  if text.find('\n', since) < 0:
    return None
  parts = text.split('\n', n)
  return len(text) - len(parts[n]) - 1 if len(parts) > n else None


def _end_of_sentence(text: str, since: int, n: int, ended: bool) -> int | None:
  """Where the n-th sentence ends; None where it doesn't, or no sentence was seen to end after text[:since]."""
  pattern = _LAST_SENTENCE if ended else _SENTENCE
  run = len(text[:since].rstrip(_CLOSERS).rstrip(_SIGNS))  # whether signs at the end ended a sentence is told by what follows
  if not pattern.search(text, run):
    return None
  match = next(itertools.islice(pattern.finditer(text), n - 1, None), None)
  return match.end() if match else None
