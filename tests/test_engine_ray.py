"""Sweeps on a Ray cluster of two nodes on this machine: the results of any sweep, whatever is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import engine_ray
from experiments.claims import Job
from mhc_jax.run_folder import write_status
from mhc_jax.workdir import read_status
from tests.campaign.tiny import ROOT, Tiny, logged

ray = pytest.importorskip('ray')

STEPS = 600  # some seconds
# Three runs of two shapes, and so two tasks.
SWEEP = f"""
import sys
from pathlib import Path
from experiments import planning, sweep
from mhc_jax.command import end_with_message
from tests.campaign.tiny import Tiny
tiny = Tiny(Path(sys.argv[1]))
long = 'duration.steps={STEPS}', 'evaluation.every_steps=200', 'data.repeat=True'
shapes = ('seed=0', 'data.batch_size=8'), ('seed=1', 'data.batch_size=8'), ('seed=2', 'data.batch_size=4')
planning.EXPERIMENTS['claims'] = lambda _: [
  tiny.config(*long, 'checkpoint.every_steps=50', *fields) for fields in shapes
]
if __name__ == '__main__':
  sys.exit(end_with_message(lambda: sweep.main(['claims', '--out', *sys.argv[2:]])))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """A head without room for tasks, and a function that adds a node with room for one."""
  from ray.cluster_utils import Cluster

  tiny = Tiny(tmp_path / 'tiny')
  for name, value in tiny.environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('MHC_JAX_STALE_SECONDS', '3')
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
  monkeypatch.setenv('RAY_health_check_period_ms', '500')
  monkeypatch.setenv('RAY_health_check_failure_threshold', '4')
  cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 0, 'include_dashboard': False})
  yield cluster, tiny
  cluster.shutdown()


def sweep(tiny: Tiny, out: Path, *more: str) -> subprocess.Popen:
  """The command as a process; what it says is in a file beside `out`."""
  script = tiny.folder / 'sweep.py'
  script.write_text(SWEEP)
  command = [sys.executable, str(script), str(tiny.folder), str(out), *more]
  with open(said(out), 'w') as file:
    return subprocess.Popen(command, cwd=ROOT, stderr=file)


def said(out: Path) -> Path:
  return out.with_name(f'{out.name}.txt')


@pytest.mark.slow
def test_a_sweep_survives_the_loss_of_a_node(tmp_path, cluster, monkeypatch):
  """Two nodes, one killed under a run: the run goes on elsewhere and ends as in an undisturbed sweep."""
  cluster, tiny = cluster
  alone, out = tmp_path / 'alone', tmp_path / 'out'
  assert sweep(tiny, alone).wait(200) == 0, said(alone).read_text()
  nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
  monkeypatch.setenv('RAY_ADDRESS', cluster.address)
  process, folder = sweep(tiny, out, '--engine', 'ray'), out / 'claims'
  deadline = time.monotonic() + 100
  while len(begun := {path.parts[-3] for path in folder.glob('*/checkpoints/50')}) < 2:
    assert process.poll() is None and time.monotonic() < deadline, said(out).read_text()
    time.sleep(0.005)
  cluster.remove_node(nodes[0], allow_graceful=False)
  assert [read_status(str(folder / run))['state'] for run in begun] == ['running'] * 2
  assert process.wait(200) == 0, said(out).read_text()
  for run in (alone / 'claims').glob('*/'):
    assert read_status(str(folder / run.name))['state'] == 'finished'
    assert logged(folder / run.name) == logged(run) and logged(run)[-1]['step'] == STEPS


@pytest.mark.slow
def test_a_run_that_was_interrupted_is_sent_again_and_a_failed_one_is_not(tmp_path, cluster):
  """Whatever its task returned: a run's own state says whether it has ended."""
  cluster, folder = cluster[0], str(tmp_path)

  def preempted(groups: list[list[Job]]) -> list[tuple[str, str]]:
    """A task that ends its first run, one way or the other, and is told to stop in its second."""
    first, *rest = groups[0]
    with open(os.path.join(folder, 'calls'), 'a') as file:
      file.write(','.join(job.run_id for job in groups[0]) + '\n')
    state = 'failed' if first.run_id == 'two' else 'finished'
    write_status(os.path.join(folder, first.run_id), {'state': state})
    return [(first.run_id, state), *((job.run_id, 'interrupted') for job in rest[:1])]

  cluster.add_node(num_cpus=1)
  ray.init(address=cluster.address, log_to_driver=False, logging_level='error')
  try:
    jobs = [Job(name, None, 1.0, None) for name in ('one', 'two', 'three')]
    for job in jobs:
      (tmp_path / job.run_id).mkdir()
    tasks = engine_ray.Tasks(preempted, folder, 1)
    tasks.submit(jobs, 1)
    while tasks.at_work(10.0):
      pass
  finally:
    ray.shutdown()
  assert dict(tasks.ended) == {'one': 'finished', 'two': 'failed', 'three': 'finished'}
  assert (tmp_path / 'calls').read_text().split() == ['one,two,three', 'two,three', 'three']


def test_resources_are_those_of_the_mesh(monkeypatch):
  """A GPU for each device of the mesh, or a share of one with its share of the memory."""
  for kind, devices, per_device, wanted in (
    (None, 1, 1, {}),
    ('GPU', 1, 1, {'num_gpus': 1}),
    ('GPU', 1, 4, {'num_gpus': 0.25}),
    ('GPU', 8, 1, {'num_gpus': 8}),
    ('TPU', 4, 1, {'resources': {'TPU': 4}}),
  ):
    monkeypatch.setattr(
      ray, 'cluster_resources', lambda kind=kind: {'CPU': 8.0} | ({kind: 8.0} if kind else {})
    )
    found = engine_ray.Tasks(lambda groups: [], '', per_device)._resources(devices)
    environment = found.pop('runtime_env')['env_vars']
    assert found == {'num_cpus': 1, 'max_calls': 1, 'max_retries': -1} | wanted
    assert environment.get('XLA_PYTHON_CLIENT_MEM_FRACTION') == ('0.225' if per_device == 4 else None)
    assert ('XLA_FLAGS' in environment) == (kind is None)
