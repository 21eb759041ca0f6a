"""What a corpus is: splits of documents, read in order and never all at once."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Part(NamedTuple):
  """Some of a document's text."""

  text: str              # not empty
  is_reply: bool = True  # False: said only to be answered (`data.loss_on_replies`); parts that differ meet at a line's beginning


@dataclasses.dataclass(frozen=True)
class Document:
  name: str
  parts: Iterable[Part]  # read once, before the next document is asked for; joined they are the text


@dataclasses.dataclass(frozen=True)
class Corpus:
  name: str
  key: str  # decides the documents; found without reading them where the source is pinned
  splits: tuple[str, ...]  # 'train', 'val' and maybe 'test'
  read: Callable[[str], Iterator[Document]]  # a split's documents, the same at every call
  characters: int | None = None  # of all splits, where that is known before they are read
