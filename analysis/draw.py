"""What every figure shares: the style, one look per arm, and saving PNG, SVG and CSV together.

Where: under figures.py and plots.py. Uses matplotlib's Figure directly: no global state.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


@contextlib.contextmanager
def figure(width: float = 4.4, height: float = 3.1, **grid) -> Iterator[tuple[Figure, Axes]]:
  """A figure in the project's style with its axes (an array of them if `grid` asks for several)."""
  with matplotlib.rc_context(fname=STYLE):
    fig = Figure(figsize=(width, height))
    yield fig, fig.subplots(**grid)


def save(fig: Figure, folder: Path, name: str, caption: str, table: pd.DataFrame) -> Panel:
  """Writes name.png, name.svg and name.csv."""
  folder.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(fname=STYLE):
    fig.savefig(folder / f'{name}.png')
    fig.savefig(folder / f'{name}.svg', metadata={'Date': None})
  table.to_csv(folder / f'{name}.csv', index=False)
  return Panel(name, caption, table)


def legend(fig: Figure, ax: Axes) -> None:
  """The legend above the axes, where it never covers data."""
  handles, labels = ax.get_legend_handles_labels()
  if labels:
    fig.legend(handles, labels, loc='outside upper left', ncols=min(len(labels), 4), fontsize=7.5)


def nothing(ax: Axes, words: str) -> None:
  """Says inside the axes why they are empty."""
  ax.text(0.5, 0.5, words, ha='center', va='center', transform=ax.transAxes, wrap=True)
  ax.set_axis_off()
