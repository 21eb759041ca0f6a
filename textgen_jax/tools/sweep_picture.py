"""The picture of tools.sweep_sampling: statistics over temperature, other settings beside it, people's text as lines."""

from collections.abc import Sequence
from typing import Any

from textgen_jax.statistics import samples

# The statistics of each panel under its title.
PANELS = {
  'entropy of the next token': ('entropy', 'drawn_entropy'),
  'mean log-probability of what was drawn': ('log_prob',),
  'words that the training text lacks': ('new_words',),
  'distinct n-grams within a sample': ('distinct_1', 'distinct_2', 'distinct_3'),
  '4-grams that repeat an earlier one': ('repeated_4_grams',),
  'samples that end in a loop': ('loops',),
}
# Each setting's name on its axis, and the value at which it changes nothing: there it meets temperature 1. None: no such value.
AXES: dict[str, tuple[str, float | None]] = {
  'temperature': ('temperature', None),
  'top_p': ('top-p', 1.0),
  'top_k': ('top-k', None),  # 0 would stand at the wrong end
  'min_p': ('min-p', 0.0),
}
STYLES = {
  'temperature': {'color': '#1f5fa8', 'marker': 'o'},
  'top_p': {'color': '#c4501b', 'marker': 's'},
  'top_k': {'color': '#2b7d3a', 'marker': '^'},
  'min_p': {'color': '#7b3fa0', 'marker': 'D'},
}
SHADES = (1.0, 0.6, 0.35)  # of the lines of one panel
REFERENCES = {'train': {'color': 'black', 'linestyle': '--'}, 'val': {'color': 'grey', 'linestyle': ':'}}


def plot(picture: Any, rows: Sequence[samples.Row]) -> None:
  """Six panels on a matplotlib Figure, each of them an axis for every setting that was varied."""
  knobs = [knob for knob in AXES if any(row.knob == knob for row in rows)]
  panels = picture.subfigures(2, 3).flat
  for panel, (title, keys) in zip(panels, PANELS.items(), strict=True):
    panel.suptitle(title, fontsize=11)
    widths = [2.4 if knob == 'temperature' else 1 for knob in knobs]
    parts = panel.subplots(1, len(knobs), sharey=True, squeeze=False, gridspec_kw={'width_ratios': widths})[0]
    for knob, axes in zip(knobs, parts, strict=True):
      lines = [_draw(axes, rows, knob, key, shade) for key, shade in zip(keys, SHADES, strict=False)]
      if len(keys) > 1 and knob == knobs[0]:
        axes.legend(lines, [samples.STATISTICS[key].heading for key in keys], fontsize=8)
      axes.set_xlabel(AXES[knob][0])
      axes.grid(alpha=0.3)
    _set_scale(parts[0], keys[0])
  handles: dict[str, Any] = {}
  for line in (line for axes in picture.subfigs[0].axes for line in axes.get_lines()):
    if not line.get_label().startswith('_'):  # matplotlib's own
      handles.setdefault(line.get_label(), line)
  title = 'bars: ± 1 standard error over samples'
  picture.legend(handles=list(handles.values()), loc='outside lower center', ncols=len(handles), title=title)


def _points(rows: Sequence[samples.Row], knob: str, key: str) -> list[tuple[float, float, float]]:
  """Value, mean and standard error, by value; with temperature 1 where it ends another setting's axis."""
  neutral = AXES[knob][1]
  points = []
  for row in rows:
    one = row.statistics[key]
    value = neutral if (row.knob, row.value) == ('temperature', 1) and knob != 'temperature' else row.value if row.knob == knob else None
    if one is not None and value is not None:
      points.append((value, one.mean, one.stderr or 0.0))
  return sorted(points)


def _draw(axes: Any, rows: Sequence[samples.Row], knob: str, key: str, shade: float) -> Any:
  """A statistic's points over one setting's values, and people's as lines across; gives what a legend shows."""
  for row in rows:
    one = row.statistics[key]
    if row.name in REFERENCES and one is not None:
      axes.axhline(one.mean, label=f'{row.name} text', linewidth=1.2, alpha=shade, **REFERENCES[row.name])
  x, y, error = zip(*_points(rows, knob, key), strict=True) if _points(rows, knob, key) else ((), (), ())
  line = axes.errorbar(x, y, error, capsize=2, markersize=4, alpha=shade, **STYLES[knob])
  line.lines[0].set_label(AXES[knob][0] + ('' if knob == 'temperature' else ', at T = 1'))
  return line


def _set_scale(axes: Any, key: str) -> None:
  statistic = samples.STATISTICS[key]
  axes.set_ylabel(statistic.unit)
  if key == 'repeated_4_grams':  # people repeat 1%, and loops all: both are to be seen
    axes.set_yscale('symlog', linthresh=1e-3)
    axes.set_yticks([0, 1e-3, 1e-2, 1e-1, 1])
    axes.set_ylim(-2e-4, 1.5)
  if key == 'loops':
    axes.set_ylim(-0.03, 1.03)
  if statistic.form.endswith('%'):
    axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:.3g}%')
