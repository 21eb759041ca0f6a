import contextlib
import hashlib
import http.server
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from textgen_jax import errors
from textgen_jax.data import downloads

ROOT = pathlib.Path(__file__).parent.parent.parent
CONTENT = b'To be, or not to be' * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'downloads'


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers by the path's first part, and notes who asked for what."""

  asked: list
  elsewhere: dict

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.asked.append(self.path)
    getattr(self, self.path.split('/')[1])()

  def answer(self, body, length=None, code=200, **headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body) if length is None else length))
    self.end_headers()
    with contextlib.suppress(OSError):
      self.wfile.write(body)

  def good(self):
    self.answer(CONTENT)

  def other(self):
    self.answer(b'other')

  def missing(self):
    self.answer(b'', code=404)

  def short(self):
    self.answer(CONTENT[:-1], len(CONTENT))

  def dies(self):
    self.answer(CONTENT[:9000], len(CONTENT))
    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')  # a reset, not an end
    self.connection.close()

  def garbled(self):
    self.wfile.write(b'no HTTP at all\r\n\r\n')

  def nonsense(self):
    self.answer(CONTENT, 'many')

  def redirect(self):
    self.answer(b'', code=302, Location=self.elsewhere[self.path.split('/')[2]])

  def slow(self):
    self.answer(b'', 1000)
    with contextlib.suppress(OSError):
      while True:
        self.wfile.write(b'.')
        time.sleep(0.05)


@contextlib.contextmanager
def serving(certificate=None):
  handler = type('Own', (Handler,), {'asked': [], 'elsewhere': {}})
  with http.server.ThreadingHTTPServer(('localhost', 0), handler) as server:
    server.daemon_threads = True
    server.block_on_close = False
    if certificate:
      context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
      context.load_cert_chain(*certificate)
      server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield handler, f'http{"s" if certificate else ""}://localhost:{server.server_port}'
    finally:
      server.shutdown()
      thread.join()


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
  """A certificate for localhost, and its key."""
  if not shutil.which('openssl'):
    pytest.skip('needs the command openssl')
  folder = tmp_path_factory.mktemp('certificate')
  names = folder / 'certificate.pem', folder / 'key.pem'
  command = 'openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost'.split()
  command += ['-addext', 'subjectAltName=DNS:localhost', '-out', str(names[0]), '-keyout', str(names[1])]
  subprocess.run(command, check=True, capture_output=True)
  return names


@pytest.fixture
def served(certificate, monkeypatch):
  """A local https server that this process trusts; where it is."""
  monkeypatch.setenv('SSL_CERT_FILE', str(certificate[0]))
  monkeypatch.setenv('no_proxy', '*')
  with serving(certificate) as (handler, address):
    yield handler, address


def names(cache):
  return sorted(path.name for path in cache.iterdir() if path.suffix != '.lock')


def test_fetches_once(cache, served):
  handler, address = served
  path = downloads.url(f'{address}/good/text.txt', SHA256)
  assert path.read_bytes() == CONTENT
  assert downloads.url(f'{address}/good/text.txt', SHA256) == path
  assert handler.asked == ['/good/text.txt']
  assert names(cache) == [f'{SHA256[:12]}-text.txt']


@pytest.mark.parametrize('damage', [CONTENT[:-1], b'', CONTENT[:-1] + b'?'])
def test_damaged_file_is_fetched_anew(served, damage):
  handler, address = served
  path = downloads.url(f'{address}/good/text.txt', SHA256)
  path.write_bytes(damage)
  assert downloads.url(f'{address}/good/text.txt', SHA256).read_bytes() == CONTENT
  assert len(handler.asked) == 2


@pytest.mark.parametrize(
  ('what', 'message'),
  [
    ('other', 'not the pinned'),
    ('missing', 'HTTP Error 404'),
    ('short', 'ended after 189999 of 190000 bytes'),
    ('dies', 'reset|closed|ended after|EOF'),
    ('garbled', "couldn't fetch"),
    ('nonsense', 'many'),
    ('nowhere', "couldn't fetch"),  # the server hangs up
  ],
)
def test_failure_leaves_nothing_and_says_what_to_do(cache, served, what, message):
  handler, address = served
  handler.nowhere = lambda self: self.connection.close()
  with pytest.raises(errors.MachineFailed, match=message) as caught:
    downloads.url(f'{address}/{what}/text.txt', SHA256)
  assert '--config.data.path=FILE' in str(caught.value)
  assert '\n' not in str(caught.value)
  assert handler.asked
  assert names(cache) == []


def test_a_redirect_is_followed_within_https_alone(cache, served, certificate):
  handler, address = served
  with serving() as (plain, plain_address), serving(certificate) as (other, other_address):
    handler.elsewhere = {
      'plain': f'{plain_address}/good/x', 'file': 'file:///etc/passwd', 'ftp': 'ftp://localhost/x',
      'there': f'{other_address}/good/x', 'back': f'{plain_address}/redirect/home',
    }  # fmt: skip
    plain.elsewhere = {'home': f'{address}/good/x'}
    for to in ('plain', 'file', 'ftp', 'back'):
      with pytest.raises(errors.MachineFailed, match=r"leads to .*, which isn't https|not allowed"):
        downloads.url(f'{address}/redirect/{to}/text.txt', SHA256)
      assert names(cache) == []
    assert plain.asked == []  # not so much as a request
    assert downloads.url(f'{address}/redirect/there/text.txt', SHA256).read_bytes() == CONTENT
    assert other.asked == ['/good/x']


def test_no_certificate_is_taken_on_trust(cache, served, monkeypatch):
  monkeypatch.delenv('SSL_CERT_FILE')
  with pytest.raises(errors.MachineFailed, match='CERTIFICATE_VERIFY_FAILED'):
    downloads.url(f'{served[1]}/good/text.txt', SHA256)
  assert names(cache) == []


def test_length_is_bounded(cache, served):
  with pytest.raises(errors.MachineFailed, match='longer than 1000 bytes'):
    downloads.url(f'{served[1]}/good/text.txt', SHA256, max_bytes=1000)
  assert names(cache) == []


def test_time_is_bounded_though_bytes_keep_coming(cache, served, monkeypatch):
  monkeypatch.setattr(downloads, 'MAX_SECONDS', 0.3)
  with pytest.raises(errors.MachineFailed, match=r'longer than 0\.3 s'):
    downloads.url(f'{served[1]}/slow/text.txt', SHA256)
  assert names(cache) == []


def test_a_server_that_says_nothing_is_given_up(cache, served, monkeypatch):
  monkeypatch.setattr(downloads, 'TIMEOUT_S', 0.2)
  served[0].silent = lambda self: time.sleep(1)
  with pytest.raises(errors.MachineFailed, match='timed out'):
    downloads.url(f'{served[1]}/silent/text.txt', SHA256)
  assert names(cache) == []


def test_only_https(served):
  with pytest.raises(ValueError, match='https'):
    downloads.url(served[1].replace('https', 'http') + '/good/text.txt', SHA256)
  assert not served[0].asked


def test_passwords_and_signatures_are_not_told(served):
  address = f'{served[1]}/missing/text.txt?X-Signature=s3cret'.replace('//', '//me:pa55@')
  with pytest.raises(errors.MachineFailed) as caught:
    downloads.url(address, SHA256)
  assert 's3cret' not in str(caught.value)
  assert 'pa55' not in str(caught.value)


def test_what_a_killed_process_left_is_never_taken_for_whole(cache, served, tmp_path):
  handler, address = served
  code = f'from textgen_jax.data import downloads; downloads.url({address + "/slow/text.txt"!r}, {SHA256!r})'
  process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  partial = cache / f'{SHA256[:12]}-text.txt.partial'
  for _ in range(600):
    if partial.exists():
      break
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert partial.exists()
  partial.write_bytes(CONTENT)  # nor by its content
  handler.slow = Handler.good
  assert downloads.url(f'{address}/slow/text.txt', SHA256).read_bytes() == CONTENT
  assert len(handler.asked) == 2
  assert names(cache) == [f'{SHA256[:12]}-text.txt']


def test_cache_that_cannot_be_made_is_a_machine_fault(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('TEXTGEN_JAX_CACHE', str(tmp_path / 'file' / 'below'))
  with pytest.raises(errors.MachineFailed, match='TEXTGEN_JAX_CACHE'):
    downloads.url('https://localhost/text.txt', SHA256)


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


def test_what_pip_was_killed_over_is_cleared_away(cache, shelf):
  sha256 = hashlib.sha256((shelf / 'ham-1.0-py3-none-any.whl').read_bytes()).hexdigest()
  left = cache / f'ham-1.0-{sha256[:12]}.whl.pip'
  left.mkdir(parents=True)
  (left / 'spam-1.0-py3-none-any.whl').write_bytes(b'half')
  downloads.wheel('ham==1.0', sha256)
  assert names(cache) == [f'ham-1.0-{sha256[:12]}.whl']


def test_a_password_in_the_address_of_an_index_is_not_told(cache, monkeypatch):
  monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
  monkeypatch.setenv('no_proxy', '*')
  monkeypatch.setenv('PIP_RETRIES', '0')
  monkeypatch.delenv('PIP_NO_INDEX', raising=False)
  monkeypatch.setenv('PIP_FIND_LINKS', 'file:///nowhere')
  with serving() as (_, address):
    monkeypatch.setenv('PIP_INDEX_URL', address.replace('//', '//me:pa55@') + '/missing/?token=s3cret')
    with pytest.raises(errors.MachineFailed, match=r"pip couldn't fetch ham==1\.0") as caught:
      downloads.wheel('ham==1.0', 64 * '0')
  assert 'pa55' not in str(caught.value)
  assert 's3cret' not in str(caught.value)


def test_the_line_of_pip_that_is_told_has_no_password():
  line = downloads._last_line('WARNING: x\nERROR: HTTP error 403 while getting https://me:p@55@host/simple/?sig=1 (from y)\n')
  assert line == 'ERROR: HTTP error 403 while getting https://***@host/simple/?*** (from y)'
