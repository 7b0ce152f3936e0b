"""What every figure shares: the style, one look per arm, and saving PNG, SVG and CSV together.

Where: under figures.py and plots.py. Uses matplotlib's Figure directly: no global state.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

STYLE = Path(__file__).with_name('paper.mplstyle')
# Colour, marker and dash per arm: three cues, so that neither colour nor print is needed alone.
LOOKS = {
  'residual': ('#000000', 'o', '-'),
  'mhc': ('#0072B2', 's', '-'),
  'hc': ('#D55E00', '^', '--'),
  'identity': ('#009E73', 'D', '-.'),
}
SPARE = (
  ('#CC79A7', 'v', '--'),
  ('#56B4E9', 'P', '-'),
  ('#E69F00', 'X', '-.'),
  ('#7F7F7F', '<', ':'),
  ('#8C510A', '>', '--'),
  ('#5E3C99', 'h', '-'),
)


@dataclasses.dataclass(frozen=True)
class Panel:
  """One saved figure: its file stem, what it shows, and its numbers."""

  name: str
  caption: str
  table: pd.DataFrame


def looks(arms: list[str]) -> dict[str, dict[str, str]]:
  """Arm -> colour, marker and line style; known arms keep theirs in every figure."""
  out, spare = {}, 0
  for arm in arms:
    look = LOOKS.get(arm)
    if look is None:
      look, spare = SPARE[spare % len(SPARE)], spare + 1
    out[arm] = dict(zip(('color', 'marker', 'linestyle'), look, strict=True))
  return out


@functools.cache
def style() -> dict:
  """The settings of the style file, read once."""
  return dict(matplotlib.rc_params_from_file(STYLE, use_default_template=False))


@contextlib.contextmanager
def figure(width: float = 4.4, height: float = 3.1, **grid) -> Iterator[tuple[Figure, Axes]]:
  """A figure in the project's style with its axes (an array of them if `grid` asks for several)."""
  with matplotlib.rc_context(style()):
    fig = Figure(figsize=(width, height))
    yield fig, fig.subplots(**grid)


def save(fig: Figure, folder: Path, name: str, caption: str, table: pd.DataFrame) -> Panel:
  """Writes name.png, name.svg and name.csv."""
  folder.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(style()):
    fig.savefig(folder / f'{name}.png', pil_kwargs={'optimize': True})
    fig.set_layout_engine('none')  # the first save has laid the figure out
    fig.savefig(folder / f'{name}.svg', metadata={'Date': None})
  table.to_csv(folder / f'{name}.csv', index=False)
  return Panel(name, caption, table)


def log_axis(ax: Axes, label: str, axis: str = 'x') -> None:
  """A log axis with ticks like 2·10¹² in plain text (mathtext takes most of the drawing time)."""
  getattr(ax, f'set_{axis}scale')('log')
  getattr(ax, f'set_{axis}label')(label)
  one = getattr(ax, f'{axis}axis')
  low, high = getattr(ax, f'get_{axis}lim')()
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


def legend(fig: Figure, ax: Axes) -> None:
  """The legend above the axes, where it never covers data."""
  handles, labels = ax.get_legend_handles_labels()
  if labels:
    # 13 characters to the inch at this size, and 4 for each line sample.
    fitting = int(13 * fig.get_figwidth() // (max(map(len, labels)) + 4))
    columns = max(1, min(len(labels), fitting))
    fig.legend(handles, labels, loc='outside upper left', ncols=columns, fontsize=7.5)


def nothing(ax: Axes, words: str) -> None:
  """Says inside the axes why they are empty."""
  ax.text(0.5, 0.5, words, ha='center', va='center', transform=ax.transAxes, wrap=True)
  ax.set_axis_off()
