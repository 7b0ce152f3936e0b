"""Every figure of a sweep by name, and drawing them all.

Where: Study -> here -> report.py and `python -m analysis.plots paper`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..selection import AXIS_LABEL
from ..study import Study
from .checks import residual_panels, rollout_plot
from .compute import compute_arrows, equal_flops, loss_vs_flops, multiplier_plot
from .draw import Panel
from .gaps import gap_and_ratio
from .isoflop import isoflop_panels, optimal_sizes
from .layers import gains, heat_maps
from .learning_rate import learning_rates, rate_sensitivity
from .shape import loss_vs_depth, loss_vs_width, rank_plot
from .stability import stability
from .training import over_training, token_scaling, training_loss

FIGURES: dict[str, Callable[[Study, Path], Panel | str]] = {
  'loss_vs_flops': loss_vs_flops,
  'loss_at_equal_flops': equal_flops,
  'compute_multiplier': multiplier_plot,
  'paper_compute': compute_arrows,
  'paper_gap_flops': gap_and_ratio,
  'paper_gap_tokens': token_scaling,
  'loss_vs_width': loss_vs_width,
  'loss_vs_depth': loss_vs_depth,
  **{f'loss_vs_{axis}': partial(rank_plot, axis=axis) for axis in AXIS_LABEL},
  'paper_isoflop': isoflop_panels,
  'paper_optimal_sizes': optimal_sizes,
  'learning_rate': learning_rates,
  'learning_rate_sensitivity': rate_sensitivity,
  'paper_stability': stability,
  'paper_gains': gains,
  'paper_heat_maps': heat_maps,
  'training_loss': training_loss,
  'paper_over_training': over_training,
  'paper_residuals': residual_panels,
  'rollout': rollout_plot,
}


def draw_all(s: Study, folder: Path) -> tuple[list[Panel], list[str]]:
  """Saves every figure that the data carry; returns them and the reasons for those left out.

  Figures of an earlier call must not outlive the runs that they show: their files go first.
  """
  panels, absent = [], []
  for name, make in FIGURES.items():
    for suffix in ('png', 'svg', 'csv'):
      (folder / f'{name}.{suffix}').unlink(missing_ok=True)
    made = make(s, folder)
    (panels if isinstance(made, Panel) else absent).append(made)
  return panels, absent
