"""Two processes of four CPU devices each, killed, stopped and resumed; finding processes; launch files."""

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import jax
import pytest
import yaml

from experiments import sweep
from experiments.planning import configs_of
from mhc_jax import distributed, train
from mhc_jax.distributed import Cluster
from mhc_jax.errors import ConfigError
from tests.campaign.peers import Pair
from tests.campaign.tiny import ROOT, STEPS, Tiny, logged, status

LAUNCH = ROOT / 'experiments' / 'launch'


@pytest.mark.slow
def test_two_processes_are_killed_and_stopped_and_one_takes_over(tmp_path):
  """The same processes go on bit for bit; then one device ends where it would have ended alone."""
  tiny, workdir = Tiny(tmp_path), tmp_path / 'run'
  moment, victim = random.Random(), random.choice((0, 1))

  # A machine is lost at a random moment: the other process ends within a minute and says so in one line.
  pair = Pair(tiny, workdir)
  assert pair.wait_for_rows(moment.randrange(7, 11)), pair.end()
  pair.sessions[victim].process.kill()
  began = time.monotonic()
  code, _, said = pair.end()[1 - victim]
  assert time.monotonic() - began < 60 and code == 1, said
  *before, last = said.splitlines()
  assert (
    last.startswith(f'error: process {1 - victim} of 2 lost the other processes') and 'same command' in last
  )
  assert all(re.match(r'mhc: step|residual: |mhc train: loading|W\d{4} ', line) for line in before), said
  killed = logged(workdir)

  # SIGTERM to either process: both save the same step and end.
  pair = Pair(tiny, workdir)
  assert pair.wait_for_rows(len(killed) + 2), pair.end()
  pair.sessions[victim].process.send_signal(signal.SIGTERM)
  ends = pair.end()
  assert [said.code for said in ends] == [130, 130], ends
  stopped = status(workdir)
  assert (stopped['state'], stopped['device_count']) == ('interrupted', 8)
  assert f'interrupted after step {stopped["step"]}; the same command goes on' in ends[0].err
  assert 'interrupted' not in ends[1].err, 'process 0 speaks for both'
  assert (workdir / 'checkpoints' / str(stopped['step'])).is_dir()
  rows = logged(workdir)
  assert [row['step'] for row in rows] == list(range(stopped['step'] + 1)) and stopped['step'] < STEPS
  assert rows[: len(killed)] == killed, 'the killed updates, done again'

  said = tiny.train(workdir)
  assert said.code == 0, said.err
  assert (status(workdir)['state'], status(workdir)['device_count']) == ('finished', 1)
  assert [row['step'] for row in logged(workdir)] == list(range(STEPS + 1))
  # Sums in another order differ by 1e-7; Adam enlarges that where a gradient is small.
  for row, other in zip(logged(workdir), logged(tiny.undisturbed), strict=True):
    for name in row.keys() & {'train/loss', 'train/grad_norm', 'validation/loss'}:
      assert row[name] == pytest.approx(other[name], rel=1e-4), (row['step'], name)


SUPERVISED = """
import os, sys, jax
from mhc_jax import distributed
def fail():
  raise jax.errors.JaxRuntimeError(sys.argv[1])
if distributed.is_supervised():
  sys.exit(distributed.ended(fail))
sys.exit(distributed.supervise(distributed.Cluster('host:1', 2, 0), [sys.executable, *sys.orig_argv[1:]]))
"""


@pytest.mark.slow
def test_a_failed_exchange_is_told_in_one_line_and_other_errors_in_full():
  """A dead process can show as an error of a collective, before the runtime notices the death."""
  said = {}
  for error in ('UNKNOWN: Gloo AllGather failed: Connection reset by peer', 'RESOURCE_EXHAUSTED: no memory'):
    command = [sys.executable, '-c', SUPERVISED, error]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said[error[:3]] = done.stderr.splitlines()
  assert len(said['UNK']) == 1 and 'process 0 of 2 lost the other processes' in said['UNK'][0]
  assert said['RES'][0].startswith('Traceback') and said['RES'][-1].endswith('RESOURCE_EXHAUSTED: no memory')


def flags(*given):
  parser = argparse.ArgumentParser()
  distributed.add_flags(parser)
  return parser.parse_args(given)


SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[03-04]',
  'SLURM_NTASKS': '16',
  'SLURM_PROCID': '9',
  'SLURM_LOCALID': '1',
}


def test_processes_are_found_in_flags_or_environment(monkeypatch):
  assert distributed.find(flags()) is None
  explicit = flags('--coordinator', 'host:12', '--processes', '4', '--process', '3')
  assert distributed.find(explicit) == Cluster('host:12', 4, 3)
  assert distributed.find(flags('--coordinator', 'host:12', '--processes', '1', '--process', '0')) is None
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
  assert distributed.find(flags()) is None, 'a pod by itself'
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  port = 7 + 65535 - 2**12 + 1  # JAX's rule
  assert distributed.find(flags()) == Cluster(f'node03:{port}', 16, 9, (1,))
  assert distributed.find(explicit) == Cluster('host:12', 4, 3)
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  assert distributed.find(flags()) is None, 'an interactive step of a job of 16 tasks'
  monkeypatch.delenv('SLURM_STEP_NUM_TASKS')
  monkeypatch.setenv('SLURM_PROCID', 'nine')
  with pytest.raises(ConfigError, match=r"wrongly: .*'nine'"):
    distributed.find(flags())
  monkeypatch.setenv('SLURM_NTASKS', '1')
  monkeypatch.setenv('SLURM_PROCID', '0')
  assert distributed.find(flags()) is None


@pytest.mark.parametrize(
  'odd,message',
  (
    ({'OMPI_COMM_WORLD_SIZE': None}, 'OMPI_COMM_WORLD_SIZE.* is missing'),
    ({'OMPI_COMM_WORLD_RANK': '2'}, 'process 2 of 2'),
    ({'OMPI_COMM_WORLD_SIZE': '99999999999'}, 'process 0 of 99999999999'),
    ({'OMPI_COMM_WORLD_LOCAL_RANK': '-1'}, 'with devices'),
  ),
)
def test_a_job_that_is_half_described_is_refused(monkeypatch, odd, message):
  job = {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911'}
  job |= {
    f'OMPI_COMM_WORLD_{name}': value for name, value in (('SIZE', '2'), ('RANK', '0'), ('LOCAL_RANK', '0'))
  }
  for name, value in (job | odd).items():
    monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=f'wrongly: .*{message}'):
    distributed.find(flags())


def test_a_wait_for_others_is_said(monkeypatch, capsys):
  monkeypatch.setattr(distributed, '_WORD_SECONDS', 0.02)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **options: time.sleep(0.2))
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  distributed.initialize(Cluster('host:12', 4, 3), flags('--join-timeout', '9'))
  said = capsys.readouterr().err.splitlines()
  assert len(said) > 2 and 'the other 3 of 4 processes at host:12, for 9 s at most' in said[0]


@pytest.mark.parametrize(
  'given,message',
  (
    (('--process', '0'), 'need each other'),
    (('--coordinator', 'host:12', '--processes', '2', '--process', '2'), 'between 0 and 1, got 2'),
    (('--coordinator', 'host', '--processes', '2', '--process', '0'), "HOST:PORT, got 'host'"),
    (('--coordinator', 'host:1', '--processes', '9999999', '--process', '0'), 'between 1 and 1,048,576'),
    (('--coordinator', 'host:70000', '--processes', '2', '--process', '0'), "HOST:PORT, got 'host:70000'"),
  ),
)
def test_flags_that_do_not_fit_are_refused(given, message):
  with pytest.raises(ConfigError, match=message):
    distributed.find(flags(*given))


@pytest.fixture
def launch(tmp_path):
  """Runs a launch script where srun, scontrol and gcloud only note their arguments: (code, [arguments])."""
  notes = tmp_path / 'notes'
  for name in ('srun', 'scontrol', 'gcloud'):
    fake = tmp_path / name
    end = 'exit "$CODE"' if name == 'srun' else ''
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" "" >> {notes}\n{end}\n')
    fake.chmod(0o755)

  def run(script, *arguments, **environment):
    subprocess.run(['bash', '-n', LAUNCH / script], check=True)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    command = [LAUNCH / script, *arguments]
    done = subprocess.run(command, env=os.environ | {'PATH': path} | environment, check=False)
    return done.returncode, [line.split('\0') for line in notes.read_text().split('\0\0')[:-1]]

  return run


def known_flags(main, capsys):
  with pytest.raises(SystemExit):
    main(['--help'])
  return set(re.findall(r'--[a-z][a-z-]*', capsys.readouterr().out))


RUN = ('--config', 'configs/laptop.py:smoke', '--workdir', 'gs://bucket/a run', '--config.mesh.fsdp=8')


def test_slurm_runs_every_process_and_queues_a_stopped_run_again(launch, capsys):
  job = {'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_ID': '7'}
  train_command = ['.venv/bin/python', '-m', 'mhc_jax.train', *RUN]
  code, said = launch('slurm.sh', *RUN, **job, CODE='130')
  assert code == 130 and said == [
    ['srun', *train_command],
    ['scontrol', 'requeue', '7'],
  ]
  code, said = launch('slurm.sh', *RUN, **job, CODE='1')
  assert code == 1 and len(said) == 3, 'a failure is not queued again'
  array = {'SLURM_ARRAY_JOB_ID': '9', 'SLURM_ARRAY_TASK_ID': '5', 'CODE': '130'}
  code, said = launch('slurm_sweep.sh', 'quick', '--retry-failed', **job, **array)
  sweep_command = ['-m', 'experiments.sweep', 'quick', '--retry-failed', '--no-wait']
  assert said[-2:] == [['srun', '.venv/bin/python', *sweep_command], ['scontrol', 'requeue', '9_5']]
  assert {'--retry-failed', '--no-wait'} <= known_flags(sweep.main, capsys)


def test_a_tpu_slice_gets_the_command_on_every_host(launch):
  code, said = launch('tpu_slice.sh', *RUN, TPU='slice', ZONE='zone')
  *head, command = said[-1]
  assert code == 0 and head[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh'] and '--worker=all' in head
  words = shlex.split(command)
  # The preset is what compiled steps are compiled with.
  assert words[words.index('mhc_jax.train') + 1 :] == ['--xla-flags', 'preset', *RUN]
  for verb in ('setup', 'stop'):
    code, said = launch('tpu_slice.sh', verb, TPU='slice', ZONE='zone')
    assert code == 0 and all('--worker=all' in line for line in said)


def checked_sweep(command):
  """The options of a sweep's command, read as it reads them, and its configurations."""
  assert command[:4] in (['python', '-m', 'mhc_jax', 'sweep'], ['.venv/bin/python', '-m', 'mhc_jax', 'sweep'])
  args, overrides = sweep._parser().parse_known_args(command[4:])
  assert args.no_wait and args.out == 'gs://BUCKET/runs' and configs_of(args.name, overrides)
  return args


def test_the_jobset_and_the_skypilot_sweep_are_commands_that_exist():
  """Every pod and machine the same command; and what a pod's exit codes lead to."""
  jobset = yaml.safe_load((LAUNCH / 'jobset_sweep.yaml').read_text())
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  [workers] = jobset['spec']['replicatedJobs']
  job = workers['template']['spec']
  assert workers['replicas'] == 1 and job['parallelism'] == job['completions']
  pod = job['template']['spec']
  [container] = pod['containers']
  assert (
    checked_sweep(container['command']).workers == container['resources']['limits']['nvidia.com/gpu'] == 1
  )
  [rule] = job['podFailurePolicy']['rules']
  codes = rule['onExitCodes']
  assert codes['containerName'] == container['name'] and 130 not in codes['values'], 'interrupted: again'
  assert rule['action'] == 'FailIndex' and job['completionMode'] == 'Indexed'  # the one needs the other
  assert pod['restartPolicy'] == 'Never', 'a failure policy needs it'

  sky = yaml.safe_load((LAUNCH / 'skypilot_sweep.yaml').read_text())
  assert set(sky) == {'name', 'resources', 'workdir', 'setup', 'run'}
  [line] = sky['run'].splitlines()
  assert checked_sweep(shlex.split(line)).workers is None, 'one per accelerator'
  extras = set(re.search('EXTRA=(.*)', sky['setup'])[1].split(','))
  assert extras <= set(
    tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  )


def test_the_kubernetes_job_uses_flags_that_exist(capsys):
  service, job = yaml.safe_load_all((LAUNCH / 'kubernetes.yaml').read_text())
  pod = job['spec']['template']['spec']
  *module, _ = command = pod['containers'][0]['command']
  given = dict(word.split('=', 1) for word in command[3:])
  assert module[:3] == ['python', '-m', 'mhc_jax.train']
  flags = {flag for flag in given if not flag.startswith('--config.')}
  assert flags <= known_flags(train.main, capsys)
  assert int(given['--processes']) == job['spec']['completions'] == job['spec']['parallelism']
  name, subdomain = job['metadata']['name'], pod['subdomain']
  assert (
    given['--coordinator'].startswith(f'{name}-0.{subdomain}:') and service['metadata']['name'] == subdomain
  )
