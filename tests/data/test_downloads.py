import email.message
import hashlib
import io
import urllib.request
import zipfile

import pytest

from textgen_jax import errors
from textgen_jax.data import downloads

ADDRESS = 'https://example.org/a/text.txt'
CONTENT = b'To be, or not to be' * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'downloads'


class Response(io.BytesIO):
  headers = email.message.Message()
  address = ADDRESS

  def geturl(self):
    return self.address


@pytest.fixture
def served(monkeypatch):
  """Bytes that every address answers with; how often it was asked."""
  state = {'content': CONTENT, 'address': ADDRESS, 'calls': 0}

  def urlopen(address, timeout):
    state['calls'] += 1
    if state['content'] is None:
      raise urllib.request.URLError('no route')
    response = Response(state['content'])
    response.address = state['address']
    return response

  monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
  return state


def names(cache):
  return sorted(path.name for path in cache.iterdir() if path.suffix != '.lock')


def test_fetches_once(cache, served):
  path = downloads.url(ADDRESS, SHA256)
  assert path.read_bytes() == CONTENT
  assert downloads.url(ADDRESS, SHA256) == path
  assert served['calls'] == 1
  assert names(cache) == [f'{SHA256[:12]}-text.txt']


def test_damaged_file_is_fetched_anew(served):
  path = downloads.url(ADDRESS, SHA256)
  path.write_bytes(CONTENT[:-1])
  assert downloads.url(ADDRESS, SHA256).read_bytes() == CONTENT
  assert served['calls'] == 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'content': b'other'}, 'not the pinned'),
        ({'content': None}, 'no route'),
        ({'address': 'http://example.org/text.txt'}, "isn't https"),
    ],
)
def test_failure_leaves_nothing_that_counts_and_says_what_to_do(cache, served, change, message):
  served.update(change)
  with pytest.raises(errors.MachineFailed, match=message) as caught:
    downloads.url(ADDRESS, SHA256)
  assert '--config.data.path=FILE' in str(caught.value)
  assert '\n' not in str(caught.value)
  assert f'{SHA256[:12]}-text.txt' not in names(cache)


def test_length_is_bounded(served):
  with pytest.raises(errors.MachineFailed, match='longer than 1000 bytes'):
    downloads.url(ADDRESS, SHA256, max_bytes=1000)


def test_only_https(served):
  with pytest.raises(ValueError, match='https'):
    downloads.url('http://example.org/text.txt', SHA256)
  assert not served['calls']


def test_cache_that_cannot_be_made_is_a_machine_fault(tmp_path, monkeypatch, served):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'file' / 'below'))
  with pytest.raises(errors.MachineFailed, match='TEXTGEN_JAX_CACHE'):
    downloads.url(ADDRESS, SHA256)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
  """A folder that pip looks for wheels in, and nowhere else; holds ham 1.0."""
  folder = tmp_path / 'shelf'
  folder.mkdir()
  with zipfile.ZipFile(folder / 'ham-1.0-py3-none-any.whl', 'w') as archive:
    archive.writestr('ham/__init__.py', 'raise SystemExit("imported")')
    archive.writestr('ham-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: ham\nVersion: 1.0\n')
    archive.writestr('ham-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    archive.writestr('ham-1.0.dist-info/RECORD', '')
  monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  return folder


def test_wheel_comes_by_pip_once(cache, shelf):
  wheel = shelf / 'ham-1.0-py3-none-any.whl'
  sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
  path = downloads.wheel('ham==1.0', sha256)
  assert path.read_bytes() == wheel.read_bytes()
  wheel.unlink()
  assert downloads.wheel('ham==1.0', sha256) == path
  assert names(cache) == [f'ham-1.0-{sha256[:12]}.whl']


@pytest.mark.parametrize('requirement', ['ham==1.0', 'spam==1.0'])  # the wrong hash; nowhere to be found
def test_pip_failure_is_one_line(cache, shelf, requirement):
  with pytest.raises(errors.MachineFailed, match=rf"pip couldn't fetch {requirement} \(ERROR: .*\): check the network") as caught:
    downloads.wheel(requirement, 64 * '0')
  assert '\n' not in str(caught.value)
  assert names(cache) == []
