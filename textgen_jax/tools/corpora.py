"""Lists the corpora that --config.data.corpus can name, or shows the beginning of their documents.

  python -m textgen_jax.tools.corpora
  python -m textgen_jax.tools.corpora --fetch
  python -m textgen_jax.tools.corpora --show=tunes --split=val --documents=3

A corpus is counted where its source is on this machine already; --fetch gets the others first.
"""

from textgen_jax import signals

if __name__ == '__main__':
  signals.watch()  # before anything that takes its time to import

import itertools
import sys
from collections.abc import Sequence

from absl import flags

from textgen_jax import command_line, errors
from textgen_jax.data import corpora, documents, downloads

SHOWN_CHARACTERS = 600  # of a document


def main(argv: Sequence[str]) -> int:
  return command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  flags.DEFINE_bool('fetch', False, 'fetch what is not on this machine, and count it', flag_values=values)
  flags.DEFINE_string('show', None, 'a corpus to show documents of; fetches it', flag_values=values)
  flags.DEFINE_string('split', 'train', "of --show: whose documents; 'train', 'val' or 'test'", flag_values=values)
  flags.DEFINE_integer('documents', 2, 'of --show: how many', lower_bound=1, upper_bound=1 << 30, flag_values=values)
  if not command_line.parsed(values, argv, __doc__):
    return
  if values.show is None:
    table, failures = _table(values.fetch)
    print(table)
    if failures:
      raise failures[0]
    return
  if values.show not in corpora.CORPORA:
    raise errors.not_among('show', values.show, corpora.CORPORA)
  corpus = corpora.CORPORA[values.show].open()
  if values.split not in corpus.splits:
    raise errors.not_among('split', values.split, corpus.splits)
  print('\n'.join(map(_beginning, itertools.islice(corpus.read(values.split), values.documents))))


def _table(fetch: bool) -> tuple[str, list[errors.MachineFailed]]:
  """A row of counts for each corpus, and below it what it is; with it what couldn't be fetched, which doesn't hide the rest."""
  failures = []
  rows = [['corpus', 'sha256', *(f'{split}: documents, characters' for split in corpora.SPLITS)]]
  for name, source in corpora.CORPORA.items():
    counts = ['not fetched']
    try:
      if fetch or _is_here(source):
        counts = _counts(source.open())
    except errors.MachineFailed as error:
      failures.append(error)
    rows.append([name, source.sha256[:12] or 'local', *counts])
  widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
  lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
  for i, source in reversed(list(enumerate(corpora.CORPORA.values(), start=1))):
    lines[i + 1 : i + 1] = [f'    {source.description}', f'    held out: {source.split}', f'    licence: {source.licence}']
  return '\n'.join(lines), failures


def _counts(corpus: documents.Corpus) -> list[str]:
  cells = []
  for split in corpora.SPLITS:
    lengths = [sum(len(part.text) for part in document.parts) for document in corpus.read(split)] if split in corpus.splits else []
    cells.append(f'{len(lengths):,} {sum(lengths):,}' if lengths else '-')
  return cells


def _is_here(source: corpora.Source) -> bool:
  found = (downloads.cache_directory() / 'downloads').glob(f'*{source.sha256[:12]}*')
  return not source.sha256 or any(path.suffix not in ('.lock', '.partial') for path in found)


def _beginning(document: documents.Document) -> str:
  """A document's name and first characters; replies are marked where it has both kinds of parts."""
  parts, text, left = list(document.parts), '', SHOWN_CHARACTERS
  for part in parts:
    mark = '[reply] ' if part.is_reply and not all(other.is_reply for other in parts) else ''
    text += mark + part.text[:left] if left else ''
    left -= min(left, len(part.text))
  more = sum(len(part.text) for part in parts) - SHOWN_CHARACTERS
  return f'== {document.name}\n{text}' + (f'... and {more:,} characters more\n' if more > 0 else '')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
