"""The sections of a report with their figures, each figure's name written once; drawing all of them.

Where: Study -> here -> page/write.py and `mhc plots paper`. A new figure is a function and a
line here: what is drawn is in a section, and the page shows all figures of all sections.
"""

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..conventions import AXIS_LABEL
from ..study import Study
from .checks import residual_panels, rollout_plot
from .compute import compute_arrows, equal_flops, loss_vs_flops, multiplier_plot
from .diagnostics import FIGURES as MIXING
from .draw import Drawing, Panel, save
from .gaps import gap_and_ratio
from .isoflop import isoflop_panels, optimal_sizes
from .layers import gains, heat_maps
from .learning_rate import learning_rates, rate_sensitivity
from .published import published_figure
from .router import expert_loads
from .shape import loss_vs_depth, loss_vs_width, rank_plot
from .sparse import sparse_attention
from .stability import stability_panels
from .training import over_training, token_scaling, training_loss

# The sentence says which data of the sweep are missing; None: the figure is one of other experiments.
Figure = Callable[[Study], Drawing | str | None]


@dataclasses.dataclass(frozen=True)
class Section:
  """key: its anchor, and the template page/<key>.html with its words and tables, where there is one.

  intro: what its figures show. secondary: a phone shows it closed.
  """

  key: str
  title: str
  figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
  intro: str = ''
  secondary: bool = True


# In the order in which a sceptic asks.
SECTIONS = (
  Section('summary', 'Arms', secondary=False),
  Section(
    'compute',
    'Compute for equal loss',
    {
      'loss_vs_flops': loss_vs_flops,
      'compute_multiplier': multiplier_plot,
      'loss_at_equal_flops': equal_flops,
      'paper_compute': compute_arrows,
    },
    secondary=False,
  ),
  Section(
    'checks',
    'Does the law hold?',
    {'rollout': rollout_plot, 'paper_residuals': residual_panels},
    secondary=False,
  ),
  Section(
    'gap',
    'Gap to {reference}, without a law',
    {'paper_gap_flops': gap_and_ratio, 'paper_gap_tokens': token_scaling},
    secondary=False,
  ),
  Section('efficiency', 'What a token and equal loss cost'),
  Section('published', 'Published gaps beside ours', {'published_gaps': published_figure}),
  Section('tables', 'Final losses'),
  Section('excluded', 'Runs left out'),
  Section(
    'rates',
    'Learning rates',
    {'learning_rate': learning_rates, 'learning_rate_sensitivity': rate_sensitivity},
  ),
  Section(
    'isoflop',
    'Best size at a budget',
    {'paper_isoflop': isoflop_panels, 'paper_optimal_sizes': optimal_sizes},
  ),
  Section('shape', 'Width and depth', {'loss_vs_width': loss_vs_width, 'loss_vs_depth': loss_vs_depth}),
  Section('rank', 'Manifold rank', {f'loss_vs_{axis}': partial(rank_plot, axis=axis) for axis in AXIS_LABEL}),
  Section(
    'training', 'Training curves', {'training_loss': training_loss, 'paper_over_training': over_training}
  ),
  Section('stability', 'Stability', {'paper_stability': stability_panels}),
  Section('router', 'Loads of experts', {'router_loads': expert_loads}),
  Section('sparse', 'Sparse attention', {'sparse_attention': sparse_attention}),
  Section(
    'gains',
    'Gains by layer',
    {'paper_gains': gains, 'paper_heat_maps': heat_maps},
    'Amax gain of the residual maps H_res, last logged value on one fixed validation sequence: 1 '
    'keeps the size of the streams; the product over sublayers shows whether they blow up.',
  ),
  Section('mixing', 'Mixing or identity?', MIXING),
  Section('missing', 'Figures left out'),
  Section('runs', 'All runs'),
  Section('setting', 'Configuration and versions'),
  Section('method', 'Method'),
)


def draw_all(s: Study, folder: Path) -> tuple[dict[str, list[Panel]], list[str]]:
  """Saves every figure that the data carry; returns those of each section, and why others of the sweep's own
  experiment are left out.
  """
  panels, absent = {}, []
  gc.disable()  # a tenth of the time goes into looking for what few figures leave
  try:
    for section in SECTIONS:
      panels[section.key] = []
      for name, draw in section.figures.items():
        drawn = draw(s)
        if isinstance(drawn, str):
          absent.append(drawn)
        elif drawn is not None:
          panels[section.key].append(save(drawn, folder, name))
  finally:
    gc.enable()
  return panels, list(dict.fromkeys(absent))  # the figures of one question lack the same
