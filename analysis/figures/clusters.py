"""Loss over bytes between clusters, a panel per connection.

Where: curves of ../clusters.py -> here.
"""

import pandas as pd

from .draw import WIDE, Drawing, figure, legend, log_axis, looks


def loss_over_bytes(table: pd.DataFrame) -> Drawing:
  """The mean over seeds; an arm that sends nothing is a horizontal line at its last loss."""
  means = table.groupby(['connection', 'arm', 'step'], sort=False, as_index=False)[['bytes', 'loss']].mean()
  connections = list(dict.fromkeys(means['connection']))
  named = {
    arm: arm.removeprefix(f'{c}, ') for c in connections for arm in means.loc[means['connection'] == c, 'arm']
  }
  look = looks(list(dict.fromkeys(named.values())))
  with figure(WIDE, 3.0, ncols=len(connections), squeeze=False, sharey=True) as (fig, axes):
    for ax, connection in zip(axes[0], connections, strict=True):
      of_connection = means[(means['connection'] == connection) & (means['step'] > 0)]
      for arm, own in of_connection.groupby('arm', sort=False):
        label, sent = named[arm], own[own['bytes'] > 0]
        if sent.empty:
          ax.axhline(own['loss'].iloc[-1], color=look[label]['color'], linestyle=':', label=label)
        else:
          ax.plot(sent['bytes'], sent['loss'], **look[label], markersize=3, label=label)
      ax.set_title(connection)
      log_axis(ax, 'bytes sent by all clusters')
    axes[0][0].set_ylabel('validation loss (nats per token)')
    legend(fig, *axes[0])
  seeds = table['seed'].nunique()
  caption = (
    f'Validation loss over the bytes that all clusters together have sent, mean over {seeds} seeds; dotted: '
    'an arm that sends nothing, its last loss.'
  )
  return Drawing(fig, caption, means)
