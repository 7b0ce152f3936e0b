"""Checkpoints: the whole training state as one orbax item set that is never trusted unread.

Main path: train_step -> **checkpoint** -> metrics. A step on disk is one folder with two items:

  state/     the pytree (parameters, optimizer state, step), written by orbax in the background
  manifest/  JSON: the loop's small numbers (data index, seconds trained), and for every leaf its
             dtype, shape and checksum; the manifest itself is covered by a CRC-32

Orbax alone restores silently wrong numbers when a byte flips on disk, and a step may be listed that
lacks a part. So every restore recomputes the checksums on the devices, and a step that fails in any
way is passed over, with a warning, for the one before.

Orbax (0.4 s to import) is imported by the first save or restore, not by `import`.
"""

import contextlib
import errno
import functools
import gc
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from etils import epath

from mhc_jax import storage
from mhc_jax.checksum import leaf_checksums
from mhc_jax.distributed import any_process, require_same
from mhc_jax.errors import CheckpointError, ConfigError
from mhc_jax.lease import Lease
from mhc_jax.log import say
from mhc_jax.orbax_patches import bear_clock_steps, quieten_orbax, teach_orbax_s3
from mhc_jax.run_folder import crc32

PyTree = Any

# Room for orbax's own metadata beside the arrays; measured: 0.7 kB for each leaf.
_METADATA_BYTES = 1 << 20
_HALF_WRITTEN = '.orbax-checkpoint-tmp'  # in the name of a local step that is being written
_ABOUT_STEP = '_CHECKPOINT_METADATA'  # in a step: times, and orbax's own names
_COMMITTED = 'commit_success.txt'  # in a remote step that is whole: object stores cannot rename folders
# Tensorstore's names for a store that cannot be reached, as opposed to one that holds something else.
_TROUBLE = re.compile('UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED')


class Checkpoints:
  """The checkpoints of one run, oldest to newest, in one folder: local, mounted, gs:// or s3://.

  Reading changes nothing on disk, so `evaluate` may read beside a running training. Writing belongs
  to one run at a time: all of its processes together, into one folder that they share, each its part
  of the arrays. Close it, or use it in a `with` statement: saving goes on in the background.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int = 2, held: Lease | None = None):
    """Names `directory` (created by the first save) and keeps the newest `keep` >= 1 steps.

    held: the run's lease; where it is lost nothing is saved or deleted any more: LeaseLostError. With
    keep = 1 there is nothing to fall back to when the newest step turns out damaged.
    """
    if keep < 1:
      raise ConfigError(f'checkpoints to keep must be at least 1, got {keep}')
    self._directory = storage.to_path(directory)
    self._remote = storage.is_remote(directory)
    self._keep, self._held = keep, held
    self._manager = None
    self._saving: int | None = None  # the step being written in the background
    self._newest: int | None = None  # the step last restored or saved through this object
    self._refused: list[int] = []  # damaged steps that restore_latest passed over

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exc_type, exc, traceback) -> None:
    try:
      self.close()
    except OSError:
      if exc_type is None:  # never hide the error that ended the block
        raise

  def steps(self) -> list[int]:
    """Steps on disk, ascending: whatever is named like one, undamaged or not."""
    with storage.errors_of(self._directory):
      return sorted(int(folder.name) for folder in self._folders() if self._is_step(folder))

  def _folders(self) -> list[epath.Path]:
    if self._directory.is_dir():
      return list(self._directory.iterdir())
    if not self._remote and os.path.lexists(self._directory):
      raise ConfigError(f'{self._directory} is not a folder: move it away, checkpoints go there')
    return []

  def _is_step(self, folder: epath.Path) -> bool:
    return folder.name.isdecimal() and (not self._remote or (folder / _COMMITTED).exists())

  def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    """Starts writing `state` (jax arrays) and `extra` (JSON values) as `step`, in the background.

    Blocks until the save before has ended, `state` is computed and its bytes have left the device.
    After that the caller may donate `state`: on CPU orbax holds views instead of copies, and XLA
    then declines to write into a donated buffer. The checksums cost no wait of their own: they are
    dispatched first and fetched where orbax waits for the same arrays.

    Does nothing if `step` is the one last saved or restored here (a run resumed at its last step).

    Raises OSError when the disk is full or cannot be written, for this save or for the one before;
    earlier steps stay intact and the half-written one is removed.
    """
    import orbax.checkpoint as ocp

    if step == self._newest:
      return
    checksums = leaf_checksums(jax.tree.leaves(state))  # dispatched, not fetched
    self.wait()
    self._saving = self._newest = step
    try:
      manager = self._writer()
      self._require_space(state)
      items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        manifest=ocp.args.JsonSave(_manifest(step, state, extra, jax.device_get(checksums))),
      )
      try:
        manager.save(step, args=items, force=True)
      except ocp.checkpoint_manager.StepAlreadyExistsError:
        # Begun by a process that slept, and lost the run: it ended this step after this one had looked.
        self._remove([step])
        self._writer().save(step, args=items, force=True)
    except Exception as error:
      self._fail(error)

  def wait(self) -> None:
    """Blocks until nothing is being written. Raises OSError as `save` does."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        self._fail(error)
    self._saving = None

  def close(self) -> None:
    """Waits, then frees orbax's threads. Raises OSError as `save` does."""
    try:
      self.wait()
    finally:
      if self._manager is not None:
        self._manager.close()
        self._manager = None

  def remove_all_but_last(self) -> None:
    """Waits and deletes every step but the newest (for a run that is finished)."""
    self.wait()
    any_process(False)  # a barrier: the last step is on disk
    self._remove(self.steps()[:-1])

  def restore_latest(
    self, abstract_state: PyTree, only_part: bool = False, at_most: int | None = None
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """The newest undamaged checkpoint as (step, state, extra); None if nothing was ever saved.

    `abstract_state` gives structure, shapes, dtypes and shardings (ShapeDtypeStruct or arrays; no
    sharding: the first local device); any mesh will do, not only the one that saved. With
    `only_part` it may leave out subtrees, e.g. {'params': ...}, which are then not read.

    at_most: later steps are deleted first, for a run that is to go on from an earlier one.

    Warns on stderr, one line each, for damaged steps; the next `save` removes them. With `only_part` a
    training may write at the same time: a step that it deletes meanwhile is not damaged. Raises
    CheckpointError if all are damaged, and ConfigError if the state is of another structure.
    """
    self.wait()
    if at_most is not None:
      self._remove([step for step in self.steps() if step > at_most])
    for _ in range(100):  # more often than steps can vanish while they are read
      steps = self.steps()
      found, refused = self._newest_undamaged(steps, abstract_state, only_part)
      if not (refused and only_part and self._changed(steps)):
        break
    if jax.process_index() == 0:
      for step, reason in refused.items():
        name = f'warning: checkpoint of step {step} in {self._directory}'
        say(f'{name} is damaged, trying the one before ({reason})')
    if found:
      self._refused, self._newest = list(refused), found[0]
    elif steps:
      raise CheckpointError(
        f'all {len(steps)} checkpoints in {self._directory} are damaged: restore the folder from a '
        'backup, or delete it to train from the start'
      )
    return found

  def _newest_undamaged(
    self, steps: list[int], abstract_state: PyTree, only_part: bool
  ) -> tuple[tuple[int, PyTree, dict[str, Any]] | None, dict[int, str]]:
    """(what restore_latest returns, {damaged step: how})."""
    require_same(f'list of checkpoints in {self._directory}, which they must share,', repr(steps))
    refused = {}
    for step in reversed(steps):
      state, manifest, reason = self._try_to_read(step, abstract_state, only_part)
      # All processes have read before any of them enters a computation with the others.
      if any_process(bool(reason)):
        reason = reason or 'another process could not read it'
      else:
        reason = _wrong_checksum(state, manifest['leaves'])
      if not reason:
        return (step, state, manifest['extra']), refused
      refused[step] = reason
    return None, refused

  def _changed(self, steps: list[int]) -> bool:
    """Whether the list becomes another one within seconds: deleting a step takes a moment, damage stays."""
    for _ in range(20):
      if self.steps() != steps:
        return True
      time.sleep(0.1)
    return False

  def _try_to_read(self, step: int, abstract_state: PyTree, only_part: bool) -> tuple:
    """(state, manifest, ''), arrays not verified, or (None, {}, why the files cannot be read)."""
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)  # of coroutines that orbax gave up
      try:
        return *self._read(step, abstract_state, only_part), ''
      except (ConfigError, MemoryError, storage.StorageError, jax.errors.JaxRuntimeError):
        raise  # wrong code, or a device or a store in trouble: no fault of the file
      except Exception as error:  # whatever orbax trips over, the step cannot be used
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        if self._remote and _TROUBLE.search(reason):
          raise storage.StorageError(f'{self._directory}: {reason}') from error
      gc.collect()  # those coroutines complain when collected: let them do it here
      return None, {}, reason

  def _read(self, step: int, abstract_state: PyTree, only_part: bool) -> tuple[PyTree, dict]:
    """(state, manifest); raises anything at all when files are damaged."""
    import orbax.checkpoint as ocp

    self._prepare_orbax()
    folder = self._directory / str(step)
    manifest = storage.read_json(folder / 'manifest' / 'metadata')
    if manifest is None:
      raise ValueError('its manifest is missing')
    if manifest.pop('crc32') != crc32(manifest) or manifest['step'] != step:
      raise ValueError('its manifest does not match its own checksum')
    target = jax.tree.map(_with_sharding, abstract_state)
    _require_structure(manifest['leaves'], target, only_part, self._directory)
    # The handler by itself, not the manager: a restore then has no barrier that a process whose
    # file is damaged would leave the others waiting at.
    state = ocp.PyTreeCheckpointHandler().restore(
      folder / 'state',
      args=ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      ),
    )
    for name, leaf in _named_leaves(state):
      if not isinstance(leaf, jax.Array):  # orbax leaves the placeholder of what it does not find
        raise ValueError(f'{name} is missing')
    return state, manifest

  def _prepare_orbax(self) -> None:
    quieten_orbax()
    bear_clock_steps()
    if self._remote:
      teach_orbax_s3()

  def _writer(self):
    """The orbax manager, opened on first use; clears what killed or damaged saves left behind."""
    import orbax.checkpoint as ocp

    if self._held is not None:
      self._held.renew()
    if self._refused:
      self._remove(self._refused)
      self._refused = []
    if self._manager is None:
      self._prepare_orbax()
      self._remove_half_written()
      any_process(False)  # a barrier: nobody starts to write before
      atomicity = ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE)
      open_manager = functools.partial(
        ocp.CheckpointManager,
        self._directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=self._keep, atomicity_options=atomicity if self._remote else None
        ),
        # OCDBT: a handful of files whatever the number of leaves. Weights do not compress.
        item_handlers={
          'state': ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False),
          'manifest': ocp.JsonCheckpointHandler(),
        },
      )
      try:
        self._manager = open_manager()
      except Exception:  # of what orbax writes about a step, and nobody needs: whatever it trips over there
        for step in self.steps():
          note = self._directory / str(step) / _ABOUT_STEP
          note.rmtree() if note.is_dir() else note.unlink(missing_ok=True)
        self._manager = open_manager()
    return self._manager

  def _require_space(self, state: PyTree) -> None:
    """Raises OSError(ENOSPC) before anything is written if the disk visibly lacks the room."""
    if self._remote:
      return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _METADATA_BYTES
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      reason = f'{os.strerror(errno.ENOSPC)} ({free / 1e6:.1f} MB free, {needed / 1e6:.1f} needed)'
      raise OSError(errno.ENOSPC, reason)

  def _fail(self, error: Exception) -> NoReturn:
    """Removes the half-written step; raises `error`, as OSError if a system call was its cause."""
    step, self._saving, self._newest = self._saving, None, None
    if self._held is not None:  # what is half-written there may be its new owner's
      self._held.renew()
    with contextlib.suppress(storage.StorageError):
      self._remove_half_written()
    if self._remote:
      with storage.errors_of(self._directory):
        raise error
    if isinstance(error, OSError):
      code, reason = error.errno, error.strerror or str(error)
    elif match := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's form of errno
      code, reason = int(match[1]), os.strerror(int(match[1]))
    else:
      raise error
    message = f'{reason}: checkpoint of step {step} not written, earlier ones are intact'
    raise OSError(code, message, os.fspath(self._directory)) from error

  def _remove(self, steps: list[int]) -> None:
    if jax.process_index() == 0:
      with storage.errors_of(self._directory):
        for step in steps:
          (self._directory / str(step)).rmtree()
    any_process(False)  # a barrier: all list the same steps from here on
    if self._manager is not None:
      self._manager.reload()

  def _remove_half_written(self) -> None:
    """Deletes temporary step folders, which never count as steps but fill the disk.

    Tries for a second: after a failed write, others that orbax no longer waits for may still come.
    """
    if jax.process_index() > 0:
      return
    for _ in range(20):
      with storage.errors_of(self._directory):
        folders = [folder for folder in self._folders() if self._is_half_written(folder)]
      if not folders:
        return
      for folder in folders:
        with contextlib.suppress(OSError):
          folder.rmtree()
      time.sleep(0.05)

  def _is_half_written(self, folder: epath.Path) -> bool:
    if self._remote:
      return folder.name.isdecimal() and not self._is_step(folder)
    return _HALF_WRITTEN in folder.name


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  """[('params/block/w', leaf), ...]; dataclasses, tuples and dicts of equal fields agree."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in paths]


def _manifest(step: int, state: PyTree, extra: dict[str, Any], checksums: Sequence[Any]) -> dict:
  leaves = {
    name: [str(leaf.dtype), list(leaf.shape), int(checksum)]
    for (name, leaf), checksum in zip(_named_leaves(state), checksums, strict=True)
  }
  manifest = json.loads(json.dumps({'step': step, 'extra': extra, 'leaves': leaves}))
  return manifest | {'crc32': crc32(manifest)}


def _wrong_checksum(state: PyTree, saved: dict) -> str:
  """Names a leaf of `state` that is not what was `saved`; empty if all are."""
  checksums = jax.device_get(leaf_checksums(jax.tree.leaves(state)))
  for (name, leaf), checksum in zip(_named_leaves(state), checksums, strict=True):
    if saved[name] != [str(leaf.dtype), list(leaf.shape), int(checksum)]:
      return f'the checksum of {name} is wrong'
  return ''


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_structure(saved: dict, target: PyTree, only_part: bool, directory: str) -> None:
  """Raises ConfigError, naming the first difference, if `target` is not what was saved."""
  wanted = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in _named_leaves(target)}
  names = list(wanted) if only_part else sorted(wanted.keys() | saved.keys())
  for name in names:
    here, there = wanted.get(name), saved[name][:2] if name in saved else None
    if here != there:
      raise ConfigError(
        f'the checkpoints in {directory} are of another model or optimizer: {name} is '
        f'{there or "absent"} there and {here or "absent"} in this run; use another workdir'
      )
