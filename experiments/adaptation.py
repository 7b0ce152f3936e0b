"""Adaptation while reading: does a document's own text improve the connection's maps for the rest of it?

  mhc sweep quick
  python -m experiments.adaptation runs/quick --size 48x3 --arms residual hc mhc
  mhc plots adaptation runs/adaptation

Dynamic evaluation (Krause et al., arXiv 1709.07432 and 1904.08378) of finished runs. A segment of a
document, one window of the run's seq_len, is scored; then the chosen parameters take a step down its gradient
and back towards their trained values: theta <- theta - lr cut(g / scale) - decay (theta - theta_0). The next
document begins with the trained ones. scale: 1 (sgd), or the gradient's root mean square over the fitted
documents plus its mean over the subset (rms): rows of the embedding that these did not need have none of
their own, and without the sum and the cut to -3 .. 3 they blow up in the first document that needs them. lr
and decay are fitted on other documents than those reported; none is among the choices.

What adapts: the parameters whose path matches a pattern, and as controls as many scalars drawn from the
norms' weights and from all parameters outside the connection; of an arm without a match, as many as of the
arm with the most. adaptation.csv has a row per run, subset and document.
"""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from mhc_jax import settings
from mhc_jax.command import end_with_message
from mhc_jax.data import Corpus, corpus_of
from mhc_jax.errors import ConfigError, require
from mhc_jax.evaluate import load
from mhc_jax.model_config import ModelConfig
from mhc_jax.parameters import path_name
from mhc_jax.paths import user_path
from mhc_jax.patterns import check_pattern
from mhc_jax.run_folder import load_plan
from mhc_jax.train_step import evaluate_sums
from mhc_jax.workdir import read_config, read_statuses

CONNECTION = r'(.*/)?(\w+_connection|collapse|expansion)/\w+'
PATTERNS = {'maps': r'(.*/)?\w+_connection/(b|alpha)_\w+', 'connection': CONNECTION}
NORMS = r'(.*/)?((final|latent|query|key|value)_)?norm'
RATES = {'rms': (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 'sgd': (1e-2, 3e-2, 1e-1, 3e-1, 1.0)}
DECAYS = (0.0, 0.05)
CUT = 3.0


@dataclasses.dataclass(frozen=True)
class Documents:
  """Documents cut into segments, padded: arrays (D, M, T) as in Windows; bytes of the scored tokens, (D,)."""

  batch: dict[str, np.ndarray]
  bytes_D: np.ndarray


def documents(corpus: Corpus, seq_len: int, count: int, segments: int) -> tuple[Documents, Documents]:
  """(to fit on, to report): `count` documents each, of two segments at least and cut after `segments`.

  Spread over the validation split in turns. A document's first token, bos, is read and not scored, every
  other token once. Raises ConfigError where there are too few.
  """
  stream = np.asarray(corpus.validation)
  starts = np.flatnonzero(stream == corpus.tokenizer.bos)
  ends = np.append(starts[1:], len(stream))
  long = np.flatnonzero(ends - starts > seq_len + 1)
  require(
    len(long) >= 2 * count,
    f'{len(long)} documents are longer than a segment of {seq_len} tokens, {2 * count} are needed: '
    'lower --documents',
  )
  chosen = long[np.arange(2 * count) * len(long) // (2 * count)]
  lengths = np.ones(len(stream)) if corpus.byte_lengths is None else np.asarray(corpus.byte_lengths)
  pieces = [slice(starts[k], min(ends[k], starts[k] + segments * seq_len + 1)) for k in chosen]
  whole = [(stream[piece], lengths[piece]) for piece in pieces]
  return tuple(_cut(whole[first::2], seq_len, segments) for first in (0, 1))


def _cut(whole: list[tuple[np.ndarray, np.ndarray]], seq_len: int, segments: int) -> Documents:
  shape = (len(whole), segments * seq_len)
  inputs, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for row, (tokens, _) in enumerate(whole):
    n = len(tokens) - 1
    inputs[row, :n], targets[row, :n], weights[row, :n] = tokens[:-1], tokens[1:], 1
  batch = {'inputs': inputs, 'targets': targets, 'weights': weights, 'segments': np.zeros(shape, np.int32)}
  batch = {name: value.reshape(len(whole), segments, seq_len) for name, value in batch.items()}
  return Documents(batch, np.array([lengths[1:].sum() for _, lengths in whole], float))


@functools.partial(jax.jit, static_argnames='model')
def read(
  params: Any, mask: Any, scale: Any, lr: jax.Array, decay: jax.Array, batch: Any, model: ModelConfig
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """((nats, tokens) of every segment before it is learned from, (D, M) each; mean squared gradient).

  batch: of Documents. Every document begins with params; mask: 1 for the scalars that adapt.
  """

  def loss(now, segment):
    total, count = evaluate_sums(now, segment, model)
    return total / jnp.maximum(count, 1), (total, count)

  def step(carry, segment):
    now, squares = carry
    segment = {name: value[None] for name, value in segment.items()}
    (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(now, segment)
    squares = jax.tree.map(lambda sum, g: sum + g * g, squares, grads)

    def moved(p, p0, g, m, s):
      return p - m * (lr * jnp.clip(g / s, -CUT, CUT) + decay * (p - p0))

    return (jax.tree.map(moved, now, params, grads, mask, scale), squares), sums

  def document(segments):
    (_, squares), sums = jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), segments)
    return sums, squares

  sums, squares = jax.vmap(document)(batch)
  read_segments = jnp.maximum(jnp.sum(sums[1] > 0), 1)
  return sums, jax.tree.map(lambda x: x.sum(0) / read_segments, squares)


def matching(pattern: str, params: Any) -> Any:
  """1 for the scalars of the parameters whose whole path matches, 0 for the others."""

  def ones(path, leaf):
    return np.full(leaf.shape, bool(re.fullmatch(pattern, path_name(path))), np.float32)

  return jax.tree_util.tree_map_with_path(ones, params)


def drawn(among: Any, count: int, seed: int) -> Any:
  """The mask of `count` scalars drawn from a mask's, all where it has no more."""
  leaves, structure = jax.tree.flatten(among)
  flat = np.concatenate([leaf.ravel() for leaf in leaves])
  chosen = np.zeros_like(flat)
  chosen[np.random.default_rng(seed).permutation(np.flatnonzero(flat))[:count]] = 1
  parts = np.split(chosen, np.cumsum([leaf.size for leaf in leaves])[:-1])
  return structure.unflatten(p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True))


def size(mask: Any) -> int:
  """Number of scalars of a mask."""
  return int(sum(leaf.sum(dtype=np.int64) for leaf in jax.tree.leaves(mask)))


def subsets(params: Any, patterns: dict[str, str], counts: dict[str, int], seed: int) -> dict[str, Any]:
  """Name -> mask: what matches each pattern, and its controls.

  counts: scalars of a control where this arm has no match.
  """
  out, connection = {}, matching(CONNECTION, params)
  # Not of the module that predicts further tokens: it has no part in the loss that is scored.
  rest = jax.tree_util.tree_map_with_path(
    lambda path, m: (1 - m) * (not path_name(path).startswith('mtp/')), connection
  )
  for name, pattern in patterns.items():
    mask = matching(pattern, params)
    count = size(mask) or counts[name]
    if size(mask):
      out[name] = mask
    if count:
      out[f'norms, as many as {name}'] = drawn(matching(NORMS, params), count, seed)
      out[f'random, as many as {name}'] = drawn(rest, count, seed)
  return out


def scale_of(squares: Any, mask: Any, rule: str) -> Any:
  """What the gradient is divided by: 1, or its root mean square plus the subset's mean of them."""
  if rule == 'sgd':
    return jax.tree.map(np.ones_like, mask)
  rms = jax.tree.map(lambda x: np.sqrt(np.asarray(x)), squares)
  total = sum(np.sum(r * m) for r, m in zip(jax.tree.leaves(rms), jax.tree.leaves(mask), strict=True))
  floor = np.float32(total / max(size(mask), 1) + 1e-30)
  return jax.tree.map(lambda r: r + floor, rms)


def adapted(
  params: Any, model: ModelConfig, masks: dict[str, Any], fit: Documents, report: Documents, rule: str
) -> list[dict[str, Any]]:
  """A row per subset and reported document: nats before and after, with the rates fitted on `fit`."""
  none = matching('', params)
  one = jax.tree.map(np.ones_like, none)
  (before, _), squares = read(params, none, one, 0.0, 0.0, fit.batch, model)
  (static_DM, count_DM), _ = read(params, none, one, 0.0, 0.0, report.batch, model)
  static_D, tokens_D = (np.asarray(x, np.float64).sum(1) for x in (static_DM, count_DM))
  rows = []
  for name, mask in masks.items():
    scale = scale_of(squares, mask, rule)
    losses = {(0.0, 0.0): float(np.asarray(before, np.float64).sum())}
    for lr, decay in itertools.product(RATES[rule], DECAYS):
      (sums, _), _ = read(params, mask, scale, lr, decay, fit.batch, model)
      total = float(np.asarray(sums, np.float64).sum())
      losses[lr, decay] = total if np.isfinite(total) else np.inf
    lr, decay = min(losses, key=losses.get)
    (sums, _), _ = read(params, mask, scale, lr, decay, report.batch, model)
    nats_D = np.asarray(sums, np.float64).sum(1)
    for k, columns in enumerate(zip(report.bytes_D, tokens_D, static_D, nats_D, strict=True)):
      row = {'subset': name, 'scalars': size(mask), 'lr': lr, 'decay': decay, 'document': k}
      rows.append(row | dict(zip(('bytes', 'tokens', 'nats_before', 'nats'), columns, strict=True)))
  return rows


def finished(folder: str, arms: list[str] | None, wanted: str | None) -> list[tuple[str, dict[str, Any]]]:
  """(workdir, config.json) of the sweep's finished runs of these arms and this size, one per arm and seed."""
  _, planned = load_plan(folder)
  paths = [str(Path(folder) / run_id) for run_id in planned]
  out = {}
  for path, status in zip(paths, read_statuses(paths), strict=True):
    config = read_config(path) if status['state'] == 'finished' else None
    if config is None:
      continue
    shape, key = f'{config["model"]["width"]}x{config["model"]["depth"]}', (config['arm'], config['seed'])
    if (arms is None or config['arm'] in arms) and wanted in (None, shape):
      require(
        out.get(key, (path, config))[0] == path,
        f'{folder} has several finished runs of {key[0]}, seed {key[1]}: name one size by --size',
      )
      out[key] = path, config
  require(bool(out), f'{folder} has no finished run of these arms and this size')
  return list(out.values())


def table(
  runs: list[tuple[str, dict[str, Any]]], patterns: dict[str, str], rule: str, count: int, segments: int
) -> pd.DataFrame:
  """All runs on the same documents; raises ConfigError where they have different ones."""
  loaded = [(config, *load(path)[1::2]) for path, config in runs]
  counts = {n: max(size(matching(p, params)) for _, _, params in loaded) for n, p in patterns.items()}
  for name, most in counts.items():
    require(most > 0, f'no parameter of any arm matches {name}: {patterns[name]!r}')
  first = runs[0][1]['data']
  corpus, rows = corpus_of(first), []
  fit, report = documents(corpus, first['seq_len'], count, segments)
  for config, model, params in tqdm(loaded, 'runs'):
    data = config['data']
    if data['digest'] != corpus.digest or data['seq_len'] != first['seq_len']:
      raise ConfigError(f'{config["arm"]} was trained on other text, or other windows, than is read here')
    masks = subsets(params, patterns, counts, config['seed'])
    where = {'arm': config['arm'], 'seed': config['seed'], 'rule': rule}
    rows += [where | row for row in adapted(params, model, masks, fit, report, rule)]
  return pd.DataFrame(rows)


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """Command line: writes adaptation.csv and says where."""
  parser = argparse.ArgumentParser(
    'python -m experiments.adaptation',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', type=user_path, help='folder of a sweep with finished runs')
  parser.add_argument('--arms', nargs='+', help='default: all')
  parser.add_argument('--size', help='WIDTHxDEPTH of the runs, where the sweep has several')
  parser.add_argument(
    '--pattern', metavar='REGEX', help='adapts what matches, instead of maps and connection'
  )
  parser.add_argument('--rule', choices=tuple(RATES), default='rms')
  parser.add_argument('--documents', type=int, default=16, help='to fit on, and as many to report (16)')
  parser.add_argument('--segments', type=int, default=12, help='of a document at most (12)')
  parser.add_argument('--out', type=user_path, default=Path('runs/adaptation'))
  a = parser.parse_args(argv)
  for name in ('documents', 'segments'):
    require(getattr(a, name) >= 2, f'--{name} {getattr(a, name)}: at least 2')
  if a.pattern is not None:
    check_pattern('--pattern', a.pattern)
  patterns = PATTERNS if a.pattern is None else {'pattern': a.pattern}
  rows = table(finished(str(a.runs), a.arms, a.size), patterns, a.rule, a.documents, a.segments)
  a.out.mkdir(parents=True, exist_ok=True)
  rows.to_csv(a.out / 'adaptation.csv', index=False)
  print(f'wrote {a.out / "adaptation.csv"}: {len(rows)} rows; mhc plots adaptation {a.out} shows them')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
