"""Preparing a large text: bytes a second and peak memory of all processes, beside the libraries' own encoders.

  pip install -e '.[bench]'
  python benchmarks/prepare.py --size_mb=1000

The text is lines of Shakespeare and of Python's library, drawn anew for every line, so that it isn't one
text many times over. Each kind is prepared by a process of its own, whose and whose children's
memory (Pss) is read from /proc ten times a second. The libraries encode the first --peer_mb of the same file, in
this process: sentencepiece with our model line by line, on one thread and on all; Hugging Face tokenizers
with a BPE of the same size that it trains itself, in batches of lines on all threads.
"""

import argparse
import base64
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from textgen_jax.data import corpora, prepare
from textgen_jax.text import base

KINDS = {'byte': {}, 'char': {}, 'word': {'coverage': 0.97}, 'sentencepiece': {'vocab_size': 4096}}
PREPARE = """
import json, sys, time
from textgen_jax.data import corpora, prepare
from textgen_jax.text import base
began = time.monotonic()
made = prepare.prepare(corpora.DataConfig(path=sys.argv[1]), base.TokenizerConfig(**json.loads(sys.argv[2])))
seconds = time.monotonic() - began
began = time.monotonic()
prepare.prepare(corpora.DataConfig(path=sys.argv[1]), base.TokenizerConfig(**json.loads(sys.argv[2])))
print(json.dumps([seconds, time.monotonic() - began, sum(len(s.tokens) for s in made.splits.values())]))
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size_mb', type=int, default=1000)
  parser.add_argument('--peer_mb', type=int, default=64)
  parser.add_argument('--kinds', nargs='*', default=list(KINDS))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder, 'text.txt')
    write_text(text, args.size_mb * 1_000_000)
    size = text.stat().st_size
    os.environ['TEXTGEN_JAX_CACHE'] = str(pathlib.Path(folder, 'cache'))
    print(f'{size / 1e6:.0f} MB of text, {len(os.sched_getaffinity(0))} cores')
    print('| what | MB/s | seconds | peak memory, all processes (MB) | tokens | opened again (s) |\n|---|---|---|---|---|---|')
    for kind in args.kinds:
      seconds, again, tokens, peak = prepare_apart(text, {'kind': kind, **KINDS[kind]})
      print(f'| `{kind}` | {size / 1e6 / seconds:.1f} | {seconds:.0f} | {peak / 1e6:.0f} | {tokens:,} | {again:.1f} |', flush=True)
    with open(text, encoding='utf-8') as file:
      lines = file.readlines(args.peer_mb * 1_000_000)
    peers(lines, text)


def write_text(path: pathlib.Path, size: int) -> None:
  sources = ('shakespeare', 'python_stdlib')
  opened = [corpora.open_corpora(corpora.DataConfig(corpus=name))[0][0] for name in sources]
  texts = [part.text for one in opened for document in one.read('train') for part in document.parts]
  lines = np.array([line for text in texts for line in text.splitlines()], object)
  generator, written = np.random.default_rng(0), 0
  with open(path, 'w', encoding='utf-8') as file:
    while written < size:
      written += file.write('\n'.join(lines[generator.integers(0, len(lines), 100_000)]) + '\n')


def prepare_apart(text: pathlib.Path, config: dict) -> tuple[float, float, int, int]:
  """Seconds, seconds to open it again, tokens, and the peak resident bytes of all its processes."""
  process = subprocess.Popen([sys.executable, '-c', PREPARE, str(text), json.dumps(config)], stdout=subprocess.PIPE, text=True)
  peak, done = 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.1):
      peak = max(peak, sum(map(resident, family(process.pid))))

  watcher = threading.Thread(target=watch)
  watcher.start()
  out, _ = process.communicate()
  done.set()
  watcher.join()
  seconds, again, tokens = json.loads(out)
  return seconds, again, tokens, peak


def family(pid: int) -> list[int]:
  """A process and its descendants."""
  try:
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    threads = [c for t in pathlib.Path(f'/proc/{pid}/task').iterdir() if t.name != str(pid) for c in (t / 'children').read_text().split()]
  except OSError:
    return []
  return [pid, *(one for child in children + threads for one in family(int(child)))]


def resident(pid: int) -> int:
  """Bytes in memory, those shared with other processes in proportion (Pss)."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
  except OSError:  # it has just ended
    return 0
  return sum(int(line.split()[1]) for line in lines if line.startswith('Pss:')) * 1024


def peers(lines: list[str], text: pathlib.Path) -> None:
  import sentencepiece
  import tokenizers

  size = sum(len(line.encode()) for line in lines) / 1e6
  config = base.TokenizerConfig(kind='sentencepiece', **KINDS['sentencepiece'])
  saved = prepare.prepare(corpora.DataConfig(path=str(text)), config).directory / 'tokenizer' / base.FILE_NAME
  model = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(json.loads(saved.read_bytes())['model']))
  report('sentencepiece, our model, 1 thread', size, lambda: [model.encode(line) for line in lines])
  report('sentencepiece, our model, all threads', size, lambda: model.encode(lines, num_threads=len(os.sched_getaffinity(0))))
  peer = tokenizers.Tokenizer(tokenizers.models.BPE())
  peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=4096, show_progress=False)
  peer.train_from_iterator(lines[: len(lines) // 4], trainer)
  report('Hugging Face tokenizers, byte-level BPE, all threads', size, lambda: peer.encode_batch_fast(lines))


def report(name: str, size: float, call) -> None:
  began = time.monotonic()
  call()
  seconds = time.monotonic() - began
  print(f'| {name} | {size / seconds:.1f} | {seconds:.0f} (of {size:.0f} MB) | | | |', flush=True)


if __name__ == '__main__':
  main()
