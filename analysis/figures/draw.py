"""What every figure shares: the style, one look per arm, and saving PNG, SVG, PDF and CSV together.

Where: under the other figures. Uses matplotlib's Figure directly: no global state.
"""

import contextlib
import dataclasses
import functools
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from ..output import csv_text

STYLE = Path(__file__).with_name('paper.mplstyle')
# Colour, marker and dash per arm: three cues, so that neither colour nor print is needed alone.
LOOKS = {
  'residual': ('#000000', 'o', '-'),
  'mhc': ('#0072B2', 's', '-'),
  'hc': ('#D55E00', '^', '--'),
  'identity': ('#009E73', 'D', '-.'),
}
SPARE_COLOURS = (
  *('#CC79A7', '#56B4E9', '#E69F00', '#7F7F7F', '#8C510A', '#5E3C99', '#B2182B', '#66A61E', '#00C2C7'),
  *('#8DA0CB', '#E7298A', '#1A3C6E'),
)
SPARE_MARKERS = ('v', 'P', 'X', '<', '>', 'h', '*', 'p', 'd', '8', '.')  # 11: no factor in common with 12
DASHES = ('--', '-', '-.', ':')
WIDEST, THINNEST = 2.0, 0.9  # points: the lines of the first arm and of the last
DIVERGED = {'marker': 'x', 'color': '#D00000', 'linestyle': 'none', 'zorder': 4}
WIDE, COLUMN = 7.0, 3.5  # inches: a text and a column width, at which no letter is smaller than 7 points
SUFFIXES = ('png', 'svg', 'pdf', 'csv')  # of every figure


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure with what it shows in words, and its numbers."""

  fig: Figure
  caption: str
  table: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Panel:
  """One saved figure: its file stem, what it shows, and whether it takes a text width."""

  name: str
  caption: str
  wide: bool


def looks(arms: Sequence[str]) -> dict[str, dict[str, object]]:
  """Arm -> colour, marker, line style and width; known arms keep theirs in every figure.

  Past twelve other arms colours come again, with another marker and another dash. Lines are drawn in the
  order of the arms, each thinner than those before it: where they coincide, all of them are seen.
  """
  out, spare = {}, 0
  for place, arm in enumerate(arms):
    look = LOOKS.get(arm)
    if look is None:
      turn, k = divmod(spare, len(SPARE_COLOURS))
      look = (SPARE_COLOURS[k], SPARE_MARKERS[spare % len(SPARE_MARKERS)], DASHES[(k + turn) % len(DASHES)])
      spare += 1
    width = WIDEST - (WIDEST - THINNEST) * place / max(1, len(arms) - 1)
    out[arm] = dict(zip(('color', 'marker', 'linestyle'), look, strict=True)) | {'linewidth': width}
  return out


def line(look: dict[str, object]) -> dict[str, object]:
  """The look of an arm's line without markers."""
  return {name: look[name] for name in ('color', 'linestyle', 'linewidth')}


def hollow(look: dict[str, object]) -> dict[str, object]:
  """The look of an arm's runs: hollow markers without a line, through which those of other arms are seen."""
  return {'marker': look['marker'], 'color': look['color'], 'linestyle': 'none', 'markerfacecolor': 'none'}


def by_arm(table: pd.DataFrame, arms: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
  """The rows of each arm, in the order given: that of the plan."""
  for arm in arms:
    own = table[table['arm'] == arm]
    if len(own):
      yield arm, own


def aside(ax: Axes, place: int, count: int, share: float) -> float:
  """Factor on x of a log axis that sets marks of `count` arms side by side, a share of its length apart."""
  low, high = ax.get_xlim()
  return (high / low) ** (share * (place - (count - 1) / 2))


def variant(look: dict[str, object], index: int) -> dict[str, object]:
  """The look of an arm's next line in the same axes: another dash, every other one with hollow markers."""
  if not index:
    return look
  dash = DASHES[(DASHES.index(look['linestyle']) + index) % len(DASHES)]
  return look | {'linestyle': dash} | ({'markerfacecolor': 'white'} if index % 2 else {})


@functools.cache
def style() -> dict:
  """The settings of the style file, read once."""
  return dict(matplotlib.rc_params_from_file(STYLE, use_default_template=False))


@contextlib.contextmanager
def figure(width: float = COLUMN, height: float = 2.7, **grid) -> Iterator[tuple[Figure, Axes]]:
  """A figure in the project's style with its axes (an array of them if `grid` asks for several)."""
  with matplotlib.rc_context(style()):
    fig = Figure(figsize=(width, height))
    yield fig, fig.subplots(**grid)


def save(drawing: Drawing, folder: Path, name: str) -> Panel:
  """Writes name.png, name.svg, name.pdf and name.csv."""
  folder.mkdir(parents=True, exist_ok=True)
  fig = drawing.fig
  with matplotlib.rc_context(style()):
    write_png(fig, folder / f'{name}.png')
    # The first save has laid the figure out; an engine, even that of no layout, would cost every save a
    # second draw.
    with matplotlib.rc_context({'figure.constrained_layout.use': False}):
      fig.set_layout_engine(None)
    fig.savefig(folder / f'{name}.svg', metadata={'Date': None})
    fig.savefig(folder / f'{name}.pdf', metadata={'CreationDate': None})
  (folder / f'{name}.csv').write_text(csv_text(drawing.table), 'utf-8')
  return Panel(name, drawing.caption, fig.get_figwidth() >= WIDE)


def write_png(fig: Figure, path: Path) -> None:
  """A PNG of 256 colours: a third of the bytes, and lines and letters look the same."""
  with io.BytesIO() as buffer:
    fig.savefig(buffer, format='png')
    Image.open(buffer).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def log_axis(ax: Axes, label: str, axis: str = 'x') -> None:
  """A log axis with ticks like 2·10¹² in plain text (mathtext takes most of the drawing time)."""
  getattr(ax, f'set_{axis}scale')('log')
  getattr(ax, f'set_{axis}label')(label)
  one = getattr(ax, f'{axis}axis')
  low, high = getattr(ax, f'get_{axis}lim')()
  if high / low < 5:
    one.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
    one.set_minor_locator(NullLocator())
  else:
    one.set_major_locator(LogLocator(subs=(1,) if high / low > 40 else (1, 2, 5)))
  one.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
  one.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
  """2·10¹²; plain digits between 0.01 and 1000."""
  if value <= 0:
    return ''
  exponent = math.floor(math.log10(value) + 1e-9)
  if -2 <= exponent < 3:
    return f'{value:g}'
  digits = f'{value / 10.0**exponent:g}'
  raised = str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))
  return ('' if digits == '1' else f'{digits}·') + f'10{raised}'


def legend(fig: Figure, *axes: Axes) -> None:
  """The legend of all axes, each label once, above them, where it never covers data."""
  entries = [(handle, _in_legend(handle.get_label())) for ax in axes for handle in _labelled(ax)]
  handles = {label: handle for handle, label in reversed(entries)}
  labels = list(dict.fromkeys(label for _, label in entries))
  if labels:
    # 17 characters to the inch at this size, and 6 for each line sample.
    fitting = int(17 * fig.get_figwidth() // (max(map(len, labels)) + 6))
    columns = max(1, min(len(labels), fitting))
    fig.legend([handles[label] for label in labels], labels, loc='outside upper left', ncols=columns)


def _labelled(ax: Axes) -> list[Artist]:
  """What was drawn with a label; matplotlib itself leaves out labels that begin with an underscore."""
  drawn = [
    a for a in (*ax.get_children(), *ax.containers) if isinstance(a, Line2D | Patch | Collection | Container)
  ]
  return [
    a for a in drawn if a.get_label() and not re.fullmatch(r'_(child|container)\d+|_nolegend_', a.get_label())
  ]


def _in_legend(label: str) -> str:
  return f'\u200a{label}' if label.startswith('_') else label  # behind a hair space it is not left out


def explain(ax: Axes, label: str, **look: object) -> Line2D:
  """An entry of the legend for a mark that is drawn otherwise, or that several arms share."""
  return ax.plot([], [], **{'color': '#555555', 'linestyle': 'none'} | look, label=label)[0]


@contextlib.contextmanager
def panels(count: int, height: float = 2.5, most: int = 4) -> Iterator[tuple[Figure, list[Axes]]]:
  """A figure of a text width with `count` axes in even rows of at most `most`."""
  rows = math.ceil(count / most)
  columns = math.ceil(count / rows)
  with figure(WIDE, height * rows + 0.3, nrows=rows, ncols=columns, squeeze=False) as (fig, axes):
    for ax in axes.flat[count:]:
      ax.set_axis_off()
    yield fig, list(axes.flat[:count])


def mark_ends(ax: Axes, ends: list[tuple[float, float]]) -> None:
  """A cross where each diverged run ends, at the edge of the axes where it left them."""
  low, high = ax.get_ylim()
  for x, y in ends:
    ax.plot(x, min(max(y, low), high), **DIVERGED, ms=7, clip_on=False)
  ax.set_ylim(low, high)
