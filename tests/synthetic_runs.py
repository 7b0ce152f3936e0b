"""Synthetic run folders for tests of the report: files as the trainer writes them, losses of a known law."""

import hashlib
import html
import json
import re

import numpy as np
import pandas as pd

from analysis.report import main
from mhc_jax.command import end_with_message

VERSIONS = {'jax': '0.10.2', 'flax': '0.12.8'}
MULTIPLIER = {'residual': 1.0, 'hc': 1.08, 'mhc': 1.2, 'identity': 1.15}
SIZES = ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4))
DATA = {'name': 'python_stdlib', 'seq_len': 128, 'batch_size': 16, 'digest': 'abc'}


def law_loss(flops):
  """Nats per token after `flops` of training: E 1.2, A 1.6 at 1e12 FLOPs, exponent 0.2."""
  return 1.2 + 1.6 * (flops / 1e12) ** -0.2


def config_of(arm, width, depth, seed, tokens_per_param=20.0, **change):
  """A resolved configuration; change: streams, the ranks, lr, digest, tokens, flops, gates."""
  streams = change.get('streams', 1 if arm == 'residual' else 4)
  gates = change.get('gates', ('sigmoid', 'sigmoid'))
  connection = {'name': arm, 'preset': None, 'constraint': 'identity', 'streams': streams}
  connection |= {'read_gate': {'kind': gates[0]}, 'write_gate': {'kind': gates[1]}}
  projected = change.get('projected')
  return {
    'arm': arm,
    'seed': seed,
    'data': DATA | {'digest': change.get('digest', 'abc')},
    'model': {
      **{'width': width, 'depth': depth, 'heads': 4, 'kv_heads': 4, 'ffn_width': 3 * width},
      'dtype': 'float32',
      'connection': connection | {'rank': change.get('rank')},
      'weights': {'rank': change.get('weights_rank')},
    },
    'optimizer': {
      **{'lr': change.get('lr', 0.004), 'schedule': 'wsd', 'manifold_value': projected},
      'manifold': None if projected is None else 'fixed_rank',
    },
    'duration': {
      **{'tokens': change.get('tokens'), 'flops': change.get('flops')},
      'tokens_per_param': None if {'tokens', 'flops'} & set(change) else tokens_per_param,
    },
  }


def derived_of(config):
  """Counts of one run, roughly as cost.py makes them."""
  m = config['model']
  width, depth, n = m['width'], m['depth'], m['connection']['streams']
  attention, ffn = 4 * depth * width**2, 9 * depth * width**2
  dynamic = 0 if n == 1 else 2 * depth * n * width * (n * n + 2 * n)
  params = {'embedding': 257 * width, 'unembedding': 257 * width, 'attention': attention}
  params |= {'feed_forward': ffn, 'hc_dynamic': dynamic}
  total = sum(params.values())
  matmul = attention + ffn + 257 * width
  params |= {'total': total, 'matmul': matmul, 'non_embedding': total - 514 * width}
  per_token = 6.0 * (matmul + dynamic) + 12.0 * depth * width * 128
  given = config['duration']
  tokens = given['tokens'] or (given['flops'] or 0) / per_token or given['tokens_per_param'] * matmul
  tokens = int(tokens)
  return {
    **{'params': params, 'flops_per_token': per_token, 'tokens': tokens},
    **{'flops': tokens * per_token, 'num_steps': tokens // 2048, 'tokens_per_step': 2048},
    'data_digest': config['data']['digest'],
  }


def metrics_of(config, derived, final, rng, upto=1.0):
  """Logged rows: loss falling from log 257 to its final value, gains over the sublayers."""
  rows, steps = [], derived['num_steps']
  sublayers = np.arange(1, 2 * config['model']['depth'] + 1)
  gain = {'hc': 1.3}.get(config['arm'], 1.0)
  for part in np.linspace(0, upto, 21):
    step = int(part * steps)
    loss = final + (5.5 - final) * np.exp(-6 * part) * (1 + 0.01 * rng.standard_normal())
    row = {'step': step, 'tokens': step * 2048, 'flops': step * 2048 * derived['flops_per_token']}
    if part:
      row |= {'train/loss': loss, 'train/grad_norm': float(np.exp(-part) + 0.1)}
      row |= {'train/lr': 0.004, 'time/seconds': 0.1, 'time/tokens_per_second': 20000.0}
    row |= {'validation/loss': loss, 'validation/bits_per_byte': loss / np.log(2)}
    for name in ('gain_forward', 'gain_backward'):
      row[f'diagnostics/{name}'] = (gain + 0.01 * rng.standard_normal(len(sublayers))).tolist()
      row[f'diagnostics/composite_{name}'] = (gain**sublayers).tolist()
    rows.append(row)
  return rows


def command(main, *arguments):
  """Runs a command as its entry does; returns the exit code."""
  return end_with_message(lambda: main([str(a) for a in arguments]))


def blank(monkeypatch):
  """Figures are built but not rendered: most of a report's time, and none of its logic."""
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, **_: path.write_text('<svg/>'))
  monkeypatch.setattr('analysis.figures.draw.write_png', lambda fig, path: path.write_text(''))


def write_plan(folder, planned):
  """The plan of runs written one by one; the sweep is called like its folder."""
  (folder / 'plan.json').write_text(json.dumps({'sweep': folder.name, 'runs': planned}))


def write_run(
  folder, config, state='finished', revision='r1', noise=0.003, bonus=1.0, shared=None, wanted=None
):
  """Writes one run folder; returns its plan entry. bonus multiplies the arm's compute; wanted: the loss."""
  text = json.dumps(config, sort_keys=True)
  run_id = hashlib.sha256(text.encode()).hexdigest()[:12]
  rng = np.random.default_rng(int(run_id, 16))
  derived = derived_of(config)
  loss = wanted or law_loss(MULTIPLIER.get(config['arm'], 1.0) * bonus * derived['flops'])
  loss *= np.exp(noise * (0.6 * rng.standard_normal() + 0.8 * (shared or 0.0)))
  finished = state == 'finished'
  final = {'validation/loss': loss, 'validation/bits_per_byte': loss / np.log(2)}
  status = {
    **{'state': state, 'step': derived['num_steps'] if finished else 40, 'error': None},
    **{'num_steps': derived['num_steps'], 'diverged_at': 40 if state == 'diverged' else None},
    **{'git_revision': revision, 'versions': VERSIONS, 'device_kind': 'cpu', 'device_count': 1},
    **{'seconds': derived['tokens'] / 2e4, 'derived': derived},
    'final': final | {'train/loss': loss} if finished else None,
  }
  if state == 'failed':
    status['error'] = 'RuntimeError: out of memory'
  path = folder / run_id
  path.mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'status.json').write_text(json.dumps(status))
  rows = metrics_of(config, derived, loss, rng, 1.0 if finished else 0.4)
  (path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return {'run_id': run_id, 'arm': config['arm']}


def write_sweep(folder, arms=tuple(MULTIPLIER), sizes=SIZES, ranks=True, states=(), **kwargs):
  """A sweep like experiments/quick.py: two seeds at the ends, ranks at one size.

  states: {(arm, size, seed): state}; state None leaves the run out of the folder (missing).
  """
  states, planned = dict(states), []
  for size in sizes:
    for seed in (0, 1) if size in (sizes[0], sizes[-1]) else (0,):
      shared = np.random.default_rng([*size, seed]).standard_normal()
      for arm in arms:
        config = config_of(arm, *size, seed)
        state = states.get((arm, size, seed), 'finished')
        if state is None:
          planned.append({'run_id': f'missing{len(planned):05d}', 'arm': arm})
        else:
          planned.append(write_run(folder, config, state, shared=shared, **kwargs))
  if ranks:
    size = sizes[-2]
    budget = {'tokens': derived_of(config_of('mhc', *size, 0))['tokens'] * 1.0}
    for rank in (1, 2, 4, 8):
      config = config_of('mhc', *size, 0, rank=rank)
      planned.append(write_run(folder, config, bonus=(rank / 16) ** 0.05))
      config = config_of('mhc', *size, 0, weights_rank=rank, **budget)
      planned.append(write_run(folder, config, bonus=(rank / 16) ** 0.5))
    for streams in (2, 8):
      planned.append(write_run(folder, config_of('mhc', *size, 0, streams=streams)))
  write_plan(folder, planned)
  return planned


def report(folder, resamples=4):
  """Runs the command; returns fits.json, results.csv and the page's text."""
  assert main([str(folder), '--resamples', str(resamples)]) == 0
  page = (folder / 'report' / 'index.html').read_text()
  fits = json.loads((folder / 'report' / 'fits.json').read_text())
  return fits, pd.read_csv(folder / 'results.csv'), page


def words(page):
  """The page's text without tags, scripts, styles and images."""
  page = re.sub(r'<(script|style)\b.*?</\1>', ' ', page, flags=re.S)
  return html.unescape(re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', page)))
