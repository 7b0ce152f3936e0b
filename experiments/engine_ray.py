"""A sweep on a Ray cluster: one task per group of runs of equal shapes, the longest first.

sweep.py -> **engine_ray** -> workers.work on the cluster's machines. Ray places tasks and tries them again
where a machine is lost; whether a run has ended is read from its folder, which all machines must reach. What
a run is, computes and writes does not depend on it: others may take runs of the same sweep at the same time.

  mhc sweep NAME --engine ray --out gs://BUCKET/runs   # on the head of a cluster, or alone on one machine
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

from mhc_jax.errors import ConfigError
from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.workdir import ENDED, read_statuses

from . import progress
from .claims import Job, groups_of
from .workers import ONE_THREAD, Ended, signals_stop, work

_OVER = (*ENDED, 'failed', 'busy')  # what a task has no more to do with


def execute(
  configs: list[Any],
  planned: list[Run],
  folder: str,
  continue_diverged: bool = False,
  population: str = 'off',
  per_device: int = 1,
) -> Ended:
  """Trains the runs in tasks of a Ray cluster: that of RAY_ADDRESS, or one on this machine alone.

  per_device: tasks that share an accelerator. Raises ConfigError where Ray is missing.
  """
  try:
    import ray
  except ImportError:
    raise ConfigError('--engine ray needs the package ray: pip install "mhc_jax[ray]"') from None
  started = not ray.is_initialized()
  if started:
    ray.init(address=os.environ.get('RAY_ADDRESS'), log_to_driver=False, logging_level='error')
  try:
    options = {'quiet': True, 'continue_diverged': continue_diverged, 'population': population}
    tasks = Tasks(functools.partial(work, folder=folder, **options), folder, per_device)
    mesh = {run.run_id: math.prod(run.resolved['mesh'].values()) for run in planned}
    with signals_stop():
      try:
        for group in groups_of(configs, planned, folder):
          tasks.submit(group, mesh[group[0].run_id])
        progress.watch(tasks.at_work, planned, folder, len(tasks))
      except KeyboardInterrupt:
        say('stopping: running runs save and end; once more ends them at once')
        tasks.stop()
        tasks.ended.append((planned[0].run_id, 'interrupted'))
    return tasks.ended
  finally:
    if started:
      ray.shutdown()


class Tasks:
  """The tasks of a sweep: sent, watched, sent again while their runs have not ended."""

  def __init__(self, work: Any, folder: str, per_device: int):
    import ray

    self._ray, self._work, self._folder, self._per_device = ray, work, folder, per_device
    here = ray.cluster_resources()
    self._kind = next((kind for kind in ('GPU', 'TPU') if here.get(kind)), None)
    self._running: dict[Any, tuple[list[Job], int]] = {}
    self.ended: Ended = []

  def __len__(self) -> int:
    return len(self._running)

  def submit(self, group: list[Job], devices: int) -> None:
    """Sends a group, for as many devices as its runs' mesh has."""
    task = self._ray.remote(**self._resources(devices))(_task)
    self._running[task.remote(self._work, [group])] = group, devices

  def _resources(self, devices: int) -> dict[str, Any]:
    """max_calls: a process of its own, which gives all memory of its device back. Ray tries a task again, for
    as long as it takes, when its process or its machine dies; claims.py gives up a run that kills them."""
    share = devices if devices > 1 else 1 / self._per_device
    found = (os.getcwd(), os.environ.get('PYTHONPATH'))  # where it is not installed, but lies in one place
    environment = {'PYTHONPATH': os.pathsep.join(filter(None, found))}
    if self._kind is None:
      flags = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
      environment |= {'XLA_FLAGS': flags}
    elif self._per_device > 1:
      environment |= {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / self._per_device:.3f}'}
    resources: dict[str, Any] = {'num_cpus': 1, 'max_calls': 1, 'max_retries': -1}
    if self._kind == 'GPU':
      resources['num_gpus'] = share
    elif self._kind == 'TPU':
      resources['resources'] = {'TPU': share}
    return resources | {'runtime_env': {'env_vars': environment}}

  def at_work(self, seconds: float) -> bool:
    """Waits so long at most for a task to end; whether any is left. Raises what one of them raised."""
    done, _ = self._ray.wait(list(self._running), timeout=seconds) if self._running else ([], [])
    for task in done:
      group, devices = self._running.pop(task)
      try:
        ended = self._ray.get(task)
      except self._ray.exceptions.RayTaskError as error:
        self.stop()
        raise error.cause if isinstance(error.cause, OSError) else error from None
      except self._ray.exceptions.RayError as error:  # the machine, or the process, is gone
        say(f'sweep: a task was lost ({type(error).__name__}), and is sent again')
        ended = []
      self.ended += [(run_id, state) for run_id, state in ended if state in _OVER]
      # A run that was interrupted, on a machine that is taken away, say, is no success.
      left = self._left(group, {run_id for run_id, state in ended if state in _OVER})
      if left:
        self.submit(left, devices)
    return bool(self._running)

  def _left(self, group: list[Job], over: set[str]) -> list[Job]:
    left = [job for job in group if job.run_id not in over]
    statuses = read_statuses([os.path.join(self._folder, job.run_id) for job in left])
    return [job for job, status in zip(left, statuses, strict=True) if not job.is_over(status)]

  def stop(self) -> None:
    """Interrupts the tasks, as Ctrl-C would: their runs are saved."""
    for task in self._running:
      self._ray.cancel(task)
    self._ray.wait(list(self._running), num_returns=len(self._running), timeout=120)
    self._running.clear()


def _task(work: Callable[[list[list[Job]]], Ended], groups: list[list[Job]]) -> Ended:
  return work(groups)
