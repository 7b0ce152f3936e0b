"""The training command stopped and out of disk: the same command goes on, bit for bit. Kills: campaign/."""

import signal
import sys

import jax
import numpy as np
import pytest

from tests.campaign.tiny import STEPS, Tiny, logged, status

# Sets the largest size of a file in bytes, then becomes the command.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.slow
def test_sigterm_saves_and_a_full_disk_ends_in_one_line(tmp_path):
  tiny, workdir = Tiny(tmp_path), tmp_path / 'run'
  session = tiny.start(workdir)
  assert session.wait_until(lambda: session.rows() > 10), session.end().err
  said = session.end(signal.SIGTERM)
  assert said.code == 130, said.err
  interrupted = status(workdir)
  assert interrupted['state'] == 'interrupted' and interrupted['final'] is None
  last = f'interrupted after step {interrupted["step"]}; the same command goes on'
  assert said.err.splitlines()[-1] == last
  step, before = tiny.newest(workdir)
  assert step == interrupted['step'] == logged(workdir)[-1]['step'] < STEPS

  # Rows, status and metadata still fit, the arrays do not.
  said = tiny.start(workdir, before=(sys.executable, '-c', LIMITED, '30000')).end()
  assert said.code == 1 and 'Traceback' not in said.err
  progress = 'mhc: step', 'mhc train: loading', 'residual: '
  errors = [line for line in said.err.splitlines() if not line.startswith(progress)]
  assert len(errors) == 1 and errors[0].startswith('error: ') and 'run the same command again' in errors[0]
  assert status(workdir)['state'] == 'interrupted', 'a sweep goes on with it too'
  after_step, after = tiny.newest(workdir)
  assert after_step == step
  jax.tree.map(np.testing.assert_array_equal, after, before)

  said = tiny.start(workdir).end()
  assert said.code == 0, said.err
  assert not tiny.difference(workdir)
