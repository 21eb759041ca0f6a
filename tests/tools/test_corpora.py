import pytest

from textgen_jax import errors
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

    corpus = documents.Corpus(name, '', ('train', 'val'), documents_of)
    return corpora.Source(f'about {name}', f'licence of {name}', 'none', sha256, lambda: corpus)

  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(corpora, 'CORPORA', {'here': source('here', ''), 'there': source('there', 'ab12' * 16)})
  return read


def test_table_counts_what_is_here(capsys, sources):
  assert tool.main(['corpora']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == ['here', 'local', '3', '3,051', '3', '3,051', '-']
  assert lines[2:5] == ['    about here', '    held out: none', '    licence: licence of here']
  assert lines[5].split() == ['there', 'ab12ab12ab12', 'not', 'fetched']
  assert set(sources) == {'here'}


@pytest.mark.parametrize(
  ('file', 'counted'), [('x-ab12ab12ab12.whl', True), ('ab12ab12ab12-input.txt', True), ('x-ab12ab12ab12.whl.lock', False)]
)
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


def test_what_cannot_be_fetched_does_not_hide_the_rest(capsys, monkeypatch):
  def fail(split):
    raise errors.MachineFailed('no network')

  broken = corpora.Source('about broken', 'none', 'none', 'cd34' * 16, lambda: documents.Corpus('broken', '', ('train',), fail))
  monkeypatch.setattr(corpora, 'CORPORA', {'broken': broken, **corpora.CORPORA})
  assert tool.main(['corpora', '--fetch']) == errors.MachineFailed.exit_code
  out, err = capsys.readouterr()
  assert out.count('not fetched') == 1
  assert out.count('3,051') == 4
  assert err == 'error: no network\n'


def test_show_prints_the_beginning_of_documents(capsys):
  assert tool.main(['corpora', '--show=there', '--split=val', '--documents=1']) == 0
  assert capsys.readouterr().out == (
    '== there-val-0\nUSER:\nHi\n\n[reply] BOT:\n' + 'x' * (tool.SHOWN_CHARACTERS - 15) + '... and 417 characters more\n\n'
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
