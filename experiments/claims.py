"""Which process does which run of a sweep: any number of them, on any number of machines, on one folder.

workers.py asks for runs; a lease in a run's folder says who is at it. Groups of runs of equal shapes share a
compilation: a process goes through one that nobody else is at, the longest first, and helps with the others'
when there is none left. What a dead process held is taken when its lease is stale.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mhc_jax import lease
from mhc_jax.lease import Lease
from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.run_folder import crc32, write_status
from mhc_jax.workdir import ENDED, lease_of, read_statuses

MOST_DEATHS = 3  # of processes in one run with no checkpoint between, after which it is left alone


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to do."""

  run_id: str
  config: ConfigDict
  flops: float
  before: int | None  # what its status said, of a run that had ended and is to do again

  def is_over(self, status: dict[str, Any]) -> bool:
    """Whether there is no more to do, by what its status says now."""
    return _ended(status) not in (None, self.before)


def groups_of(configs: list[ConfigDict], planned: list[Run], folder: str) -> list[list[Job]]:
  """The runs in groups of equal shapes, the longest and the group of the most FLOPs first."""
  groups: dict[tuple[Any, ...], list[Job]] = {}
  statuses = read_statuses([os.path.join(folder, run.run_id) for run in planned])
  for config, run, status in zip(configs, planned, statuses, strict=True):
    job = Job(run.run_id, config, run.derived['flops'], _ended(status))
    groups.setdefault(run.shapes, []).append(job)
  longest = [sorted(group, key=lambda job: -job.flops) for group in groups.values()]
  return sorted(longest, key=lambda group: -sum(job.flops for job in group))


def _ended(status: dict[str, Any]) -> int | None:
  return crc32(status) if status['state'] in (*ENDED, 'failed') else None


class Claims:
  """What one process holds of a sweep's runs, and knows about the others."""

  def __init__(self, groups: list[list[Job]], folder: str):
    self._groups, self._folder = [list(group) for group in groups], folder
    self._mine: list[Job] | None = None  # the group that this process goes through
    self._seen: lease.Seen = {}
    self._others: dict[str, str] = {}  # runs that others hold -> who

  def left(self) -> list[Job]:
    """The runs that have not ended, as far as this process knows."""
    return [job for group in self._groups for job in group]

  def others(self) -> dict[str, str]:
    """Runs that other processes held at the last look, and who they are."""
    return self._others

  def take(self, most: Callable[[Job], int] = lambda job: 1) -> list[tuple[Job, Lease]]:
    """Runs of one group, up to `most` of its first, held by this process until it gives their leases back."""
    self._others, shared = {}, []
    groups = [self._mine] if self._mine else []
    for group in groups + [group for group in self._groups if group is not self._mine]:
      free = self._free(group)
      if len(free) < len(group) and group is not self._mine:
        shared.append(free)
        continue
      taken = self._take(free, most(free[0])) if free else []
      if taken:
        self._mine = group
        return taken
    for free in sorted(shared, key=lambda free: -sum(job.flops for job in free)):
      taken = self._take(free[::-1], 1)  # its owner comes from the other end
      if taken:
        return taken
    return []

  def done(self, job: Job) -> None:
    """This process has no more to do with a run."""
    for group in self._groups:
      if job in group:
        group.remove(job)

  def _free(self, group: list[Job]) -> list[Job]:
    """The runs of a group that nobody holds; forgets those that have ended."""
    statuses = read_statuses([self._workdir(job) for job in group])
    for job, status in zip(list(group), statuses, strict=True):
      if job.is_over(status):
        group.remove(job)
    free = []
    for job, holder in zip(
      group, lease.holders([self._lease(job) for job in group], self._seen), strict=True
    ):
      if holder is None:
        free.append(job)
      else:
        self._others[job.run_id] = holder.name
    return free

  def _take(self, jobs: list[Job], most: int) -> list[tuple[Job, Lease]]:
    taken: list[tuple[Job, Lease]] = []
    for job in jobs:
      held = lease.take(self._lease(job), self._seen) if len(taken) < most else None
      if held is None:
        continue
      [status] = read_statuses([self._workdir(job)])  # another may have done it since the last look
      if job.is_over(status):
        self.done(job)
        held.release()
      elif held.deaths >= MOST_DEATHS:
        why = f'{held.deaths} processes died in it before its next checkpoint (killed, or out of memory)'
        fail(self._workdir(job), f'{why}; --retry-failed tries it again')
        self.done(job)
        held.release()
      else:
        taken.append((job, held))
    return taken

  def _workdir(self, job: Job) -> str:
    return os.path.join(self._folder, job.run_id)

  def _lease(self, job: Job) -> str:
    return lease_of(self._workdir(job))


def fail(workdir: str, error: str) -> None:
  """Records a run as failed, for a process that cannot do so itself; its lease must be held."""
  [status] = read_statuses([workdir])
  write_status(workdir, status | {'state': 'failed', 'error': error})
  say(f'{os.path.basename(workdir)} failed: {error}')
