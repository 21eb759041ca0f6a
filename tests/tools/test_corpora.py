import pytest

from textgen_jax.data import corpora, documents, downloads
from textgen_jax.tools import corpora as tool


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
  """One corpus that is here, and one that must be fetched; gives the names of those that were read."""
  read = []

  def source(name, sha256):
    def documents_of(split):
      read.append(name)
      parts = (documents.Part('USER:\nHi\n\n', False), documents.Part('BOT:\n' + 'x' * 1000 + '\n\n'))
      return iter([documents.Document(f'{name}-{split}-{i}', parts) for i in range(3)])

    return corpora.Source(f'about {name}', f'licence of {name}', 'none', sha256, lambda: documents.Corpus(name, '', ('train', 'val'), documents_of))

  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(corpora, 'CORPORA', {'here': source('here', ''), 'there': source('there', 'ab12' * 16)})
  return read


def test_table_counts_what_is_here(capsys, sources):
  assert tool.main(['corpora']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == ['here', 'local', '3', '3,048', '3', '3,048', '-']
  assert lines[2:5] == ['    about here', '    held out: none', '    licence: licence of here']
  assert lines[5].split() == ['there', 'ab12ab12ab12', 'not', 'fetched']
  assert set(sources) == {'here'}


@pytest.mark.parametrize(('file', 'counted'), [('x-ab12ab12ab12.whl', True), ('ab12ab12ab12-input.txt', True), ('x-ab12ab12ab12.whl.lock', False)])
def test_table_counts_what_was_fetched(capsys, sources, file, counted):
  folder = downloads.cache_directory() / 'downloads'
  folder.mkdir()
  (folder / file).touch()
  assert tool.main(['corpora']) == 0
  assert ('not fetched' not in capsys.readouterr().out) == counted == ('there' in sources)


def test_fetch_counts_all(capsys, sources):
  assert tool.main(['corpora', '--fetch']) == 0
  assert 'not fetched' not in capsys.readouterr().out
  assert set(sources) == {'here', 'there'}


def test_show_prints_the_beginning_of_documents(capsys):
  assert tool.main(['corpora', '--show=there', '--split=val', '--documents=1']) == 0
  assert capsys.readouterr().out == (
    '== there-val-0\nUSER:\nHi\n\n[reply] BOT:\n' + 'x' * (tool.SHOWN_CHARACTERS - 15) + '... and 416 characters more\n\n'
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--show=ther'], "show='ther' is none of here, there; did you mean 'there'?"),
    (['--show=here', '--split=test'], "split='test' is none of train, val"),
    (['--show=here', '--documents=0'], '--documents'),
    (['--shw=here'], 'did you mean --show?'),
    (['here'], "'here' is not a flag"),
  ],
)
def test_mistakes_are_named_in_one_line(capsys, sources, flags, message):
  assert tool.main(['corpora', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not sources


def test_help(capsys):
  assert tool.main(['corpora', '--help']) == 0
  assert '--fetch' in capsys.readouterr().out
