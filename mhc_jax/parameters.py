"""Every parameter once: its path, the letters of its dimensions, and how it learns."""

import re
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
  """'layers/attention/query/w' from a tree path."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def matches(pattern: str, params: Any) -> Any:
  """A tree of booleans: whose path matches the whole pattern. Raises ValueError where none does."""

  def match(path, _):
    return bool(re.fullmatch(pattern, path_name(path)))

  found = jax.tree_util.tree_map_with_path(match, params)
  if not any(jax.tree.leaves(found)):
    raise ValueError(f'no parameter matches {pattern!r}')
  return found


# (regular expression on the parameter's path, kind); the first match counts and every parameter must match.
# hidden: lr / m_N, decay * m_N. plain: lr, decay. scalar: lr, no decay. mixing: lr / m_L, no decay.
# frozen: no update at all; train_step moves a router's bias by the loads.
GROUPS: tuple[tuple[str, str], ...] = (
  (r'embedding', 'plain'),
  (r'unembedding', 'plain'),
  (r'(.*/)?(final_|latent_)?norm', 'scalar'),
  (r'.*_connection/(b|alpha)_res', 'mixing'),
  (r'.*_connection/((b|alpha)_\w+|norm_weight)', 'scalar'),
  (r'.*_connection/(phi(_in|_\w+_width)?|read_down)', 'hidden'),
  (r'.*_connection/(phi_(out|\w+_(stream|out|row|column))|read_up)', 'plain'),
  (r'expansion/scale', 'scalar'),
  (r'collapse/phi', 'hidden'),
  (r'collapse/(alpha|b)', 'scalar'),
  (r'.*/attention/kv_up/[wuv]', 'plain'),  # its fan-in is the latent's rank, whatever the width
  (r'.*/feed_forward/router', 'plain'),  # output-like: see the module in sublayers.py
  (r'.*/feed_forward/router_bias', 'frozen'),
  (r'.*/feed_forward/expert_(gate|up|down)', 'hidden'),  # fan-in of one expert
  (r'.*/(attention|feed_forward)/\w+/[wu]', 'hidden'),
  (r'.*/(attention|feed_forward)/\w+/v', 'plain'),
)


def groups(params: Any) -> Any:
  """The kind of every parameter, as a tree; raises ValueError for one that no expression matches."""

  def kind(path: tuple[Any, ...], _: Any) -> str:
    for pattern, name in GROUPS:
      if re.fullmatch(pattern, path_name(path)):
        return name
    raise ValueError(f'optimizer.GROUPS has no line for parameter {path_name(path)!r}')

  return jax.tree_util.tree_map_with_path(kind, params)


# (regular expression on the end of a parameter's path, its last dimensions' letters); moments have the same
# paths. The dimensions of a parameter that is not listed are split by fsdp alone.
PARAMETERS: tuple[tuple[str, str], ...] = (
  (r'embedding', 'VD'),
  (r'unembedding', 'DV'),
  (r'attention/query/w', 'DHK'),
  (r'attention/(key|value)/w', 'DGK'),
  (r'attention/output/w', 'HD'),
  (r'attention/kv_up/w', 'RHK'),
  (r'feed_forward/(shared_)?(gate|up)/w', 'DF'),
  (r'feed_forward/(shared_)?down/w', 'FD'),
  (r'feed_forward/expert_(gate|up)', 'EDF'),
  (r'feed_forward/expert_down', 'EFD'),
  # Factors U V of maps with a rank.
  (r'attention/query/v', 'RHK'),
  (r'attention/(key|value)/v', 'RGK'),
  (r'attention/output/u', 'HR'),
  (r'feed_forward/(gate|up)/v', 'RF'),
  (r'feed_forward/down/u', 'FR'),
)
