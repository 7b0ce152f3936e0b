"""Every parameter once: its path, the letters of its dimensions, and how it learns.

sharding.py lays a parameter and its moments out by the letters, optimizer.py gives it its share of the rate
and the decay by its kind. A new parameter is a line here; one that no line matches is an error.
"""

import functools
import re
from typing import Any

import jax

# (regular expression on the end of the path, letters of the last dimensions, kind); the first match counts.
# Letters: see model.py; '' where fsdp alone splits it. Moments have the paths of their parameters.
# Kinds: hidden learns with lr / m_N and decays with decay * m_N, factor with lr / m_R and decay * m_R; plain
# with lr and decay; scalar with lr and without decay; mixing with lr / m_L, without decay; frozen not at all
# (train_step moves a router's bias).
PARAMETERS: tuple[tuple[str, str, str], ...] = (
  (r'embedding', 'VD', 'plain'),
  (r'unembedding', 'DV', 'plain'),
  (r'((final|latent|query|key|value|embedding|state)_)?norm', '', 'scalar'),
  (r'attention/query/w', 'DHK', 'hidden'),
  (r'attention/(key|value)/w', 'DGK', 'hidden'),
  (r'attention/output/w', 'HD', 'hidden'),
  (r'attention/kv_up/w', 'RHK', 'plain'),  # its fan-in is the latent's rank, whatever the width
  (r'attention/kv_up/u', '', 'plain'),
  (r'attention/q_up/w', 'RHK', 'plain'),  # likewise
  (r'attention/q_up/u', '', 'plain'),
  (r'attention/index/(query|key|weights)/w', '', 'hidden'),  # small: every device has all heads
  (r'attention/index/query_up/w', '', 'plain'),
  (r'attention/index/key_norm(_bias)?', '', 'scalar'),
  (r'feed_forward/(shared_)?(gate|up)/w', 'DF', 'hidden'),
  (r'feed_forward/(shared_)?down/w', 'FD', 'hidden'),
  (r'feed_forward/router', '', 'plain'),  # output-like: see layers/moe.py
  (r'feed_forward/router_bias', '', 'frozen'),
  (r'feed_forward/expert_(gate|up)', 'EDF', 'hidden'),  # fan-in of one expert
  (r'feed_forward/expert_down', 'EFD', 'hidden'),
  (r'mtp/(e|h)_proj', '', 'hidden'),
  # Factors U V of maps with a rank, which is V's fan-in.
  (r'attention/query/v', 'RHK', 'factor'),
  (r'attention/(key|value)/v', 'RGK', 'factor'),
  (r'attention/output/u', 'HR', 'hidden'),
  (r'feed_forward/(gate|up)/v', 'RF', 'factor'),
  (r'feed_forward/down/u', 'FR', 'hidden'),
  (r'(attention|feed_forward)/\w+/[wu]', '', 'hidden'),
  (r'(attention|feed_forward)/\w+/v', '', 'factor'),
  # Connections, and the two ends of the streams.
  (r'\w+_connection/(b|alpha)_res', '', 'mixing'),
  (r'\w+_connection/((b|alpha)_\w+|norm_weight)', '', 'scalar'),
  (r'\w+_connection/(phi(_in|_\w+_width)?|read_down|read_query)', '', 'hidden'),
  (r'\w+_connection/(phi_(out|\w+_(stream|out|row|column))|read_up)', '', 'plain'),
  (r'(\w+_connection|collapse)/post_norm', '', 'scalar'),
  (r'expansion/scale', '', 'scalar'),
  (r'collapse/(phi|read_query|read_down)', '', 'hidden'),
  (r'collapse/read_up', '', 'plain'),
  (r'collapse/(alpha|b|b_read|norm_weight)', '', 'scalar'),
)


@functools.cache
def line_of(name: str) -> tuple[str, str] | None:
  """(letters, kind) of the parameter, or of the moment, with that path; None where no line matches."""
  matching = (line for line in PARAMETERS if re.fullmatch(rf'(.*/)?{line[0]}', name))
  return next((line[1:] for line in matching), None)


def kinds(params: Any) -> Any:
  """How every parameter learns, as a tree; raises ValueError for one that no line matches."""

  def kind(path: tuple[Any, ...], _: Any) -> str:
    line = line_of(path_name(path))
    if line is None:
      raise ValueError(f'parameters.PARAMETERS has no line for parameter {path_name(path)!r}')
    return line[1]

  return jax.tree_util.tree_map_with_path(kind, params)


def path_name(path: tuple[Any, ...]) -> str:
  """'layers/attention/query/w' from a tree path."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def matches(pattern: str, params: Any) -> Any:
  """A tree of booleans: whose path matches the whole pattern. Raises ValueError where none does."""

  def match(path, _):
    return bool(re.fullmatch(pattern, path_name(path)))

  ours = jax.tree_util.tree_map_with_path(match, params)
  if not any(jax.tree.leaves(ours)):
    raise ValueError(f'no parameter matches {pattern!r}')
  return ours
