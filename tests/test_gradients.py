"""What experiments/gradients.py follows is a run's training, and its gradients and streams by sublayer."""

import jax
import numpy as np
import pytest

from experiments import gradients, rotations
from mhc_jax import train
from mhc_jax.data import corpus_of
from mhc_jax.plan import resolve
from mhc_jax.run_folder import load_rows
from mhc_jax.train_step import gradients as gradients_of
from mhc_jax.train_step import init_state, sums_and_records


@pytest.fixture(scope='module')
def config():
  """Rotations of two layers, a handful of updates."""
  c = next(c for c in rotations.runs() if c.arm == 'rotations')
  c.model.update({'depth': 2, 'width': 16, 'heads': 1})
  c.data.update({'name': 'python_stdlib', 'batch_size': 2, 'seq_len': 16})
  c.duration.steps = c.evaluation.every_steps = 4
  c.evaluation.sequences = c.evaluation.batch_size = 2
  c.log.diagnostics_every_steps = None
  return c


def test_updates_are_those_of_training(config, tmp_path):
  train.run(config, str(tmp_path), corpus_of(config.data), quiet=True)
  losses = [row['train/loss'] for row in load_rows(str(tmp_path))[0] if 'train/loss' in row]
  followed = gradients.follow(config, 3)
  assert followed.groupby('update')['loss'].first().tolist() == pytest.approx(losses, rel=1e-6)
  assert followed['sublayer'].tolist() == [*range(4)] * 4


def test_a_sublayers_row_has_its_own_gradient_and_streams(config):
  plan, tokens = resolve(config, 'd'), np.random.default_rng(0).integers(0, 256, (2, 17)).astype(np.int32)
  ones = np.ones((2, 16), np.float32)
  batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': ones, 'segments': 0 * tokens[:, 1:]}
  params = init_state(jax.random.key(0), plan.model, plan.optimizer).params
  found = gradients.by_sublayer(params, batch, plan.model)
  layers = gradients_of(params, batch, plan.model)[1]['layers']
  _, records = sums_and_records(params, batch, plan.model, record=2)
  for k, row in found.iterrows():
    maps = jax.tree.leaves(layers[gradients.SUBLAYERS[k % 2]])
    assert row['gradient'] == pytest.approx(
      float(np.sqrt(sum(np.sum(m[k // 2] ** 2) for m in maps))), rel=1e-5
    )
    gram = np.asarray(records[k % 2]['gram_NMBT'][k // 2], float)  # of four streams
    size = np.sqrt((gram[0, 0] + gram[1, 1] + gram[2, 2] + gram[3, 3]) / 4)
    shares = np.sqrt(gram.sum((0, 1))) / 4 / size
    assert row['rms'] == pytest.approx(np.sqrt((size**2).mean() / 16), rel=1e-5)
    assert (row['mean'], row['mean_least']) == pytest.approx((shares.mean(), shares.min()), rel=1e-5)
