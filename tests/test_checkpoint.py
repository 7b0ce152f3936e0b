"""Checkpoints: exact round trips, every kind of damage, kill -9, full disks, other meshes."""

import errno
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mhc_jax.checkpoint import Checkpoints
from mhc_jax.checksum import leaf_checksums
from mhc_jax.errors import CheckpointError, ConfigError


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  opt_state: Any


def make_state(seed: int = 0, width: int = 16) -> State:
  """A state with the optimizer's real containers and an array of every width of dtype."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'block': {
      'w': jax.random.normal(keys[0], (4, width, 8)),
      'scale': jnp.ones((width,)),
      'half': jax.random.normal(keys[1], (width, 3), jnp.bfloat16),
      'mask': jax.random.bernoulli(keys[2], 0.5, (width,)),
      'bytes': jnp.arange(width, dtype=jnp.int8) - 7,
    },
    'alpha': jnp.float32(0.01),
  }
  decay = jax.tree.map(lambda x: x.ndim > 1, params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.masked(optax.add_decayed_weights(0.1), decay),
    optax.scale_by_schedule(lambda step: 0.1 * step),
  )
  opt_state = jax.tree.map(lambda x: x + jnp.ones_like(x), optimizer.init(params))
  return State(step=jnp.int32(seed), params=params, opt_state=opt_state)


def assert_same(actual, expected) -> None:
  """Same containers, dtypes and bits."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(directory: Path, *steps: int) -> None:
  with Checkpoints(directory) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {'index': step})


def test_round_trip_is_bitwise_quiet_and_small(tmp_path, capfd):
  state, extra = make_state(3), {'index': 7, 'seconds': 0.1 + 0.2, 'best': None, 'mix': [1, 2.5]}
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(20, state, extra)
    step, restored, restored_extra = checkpoints.restore_latest(make_state(0))
  assert (step, restored_extra) == (20, extra) and capfd.readouterr() == ('', '')
  assert_same(restored, state)
  assert sum(path.is_file() for path in tmp_path.rglob('*')) <= 20  # not one per leaf


def test_keeps_the_newest_and_finally_the_last(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.remove_all_but_last()
    assert checkpoints.steps() == [3]
    checkpoints.save(4, make_state(4), {})
    checkpoints.wait()
    checkpoints.save(4, make_state(4), {})  # the final save of a run that saved there already
    assert checkpoints.steps() == [3, 4]
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_latest(make_state())[0] == 4
    checkpoints.save(4, make_state(4), {})
    assert checkpoints.steps() == [3, 4]
  with pytest.raises(ConfigError, match='at least 1'):
    Checkpoints(tmp_path, keep=0)


def test_part_of_the_state_can_be_read_but_only_when_asked_for(tmp_path):
  save(tmp_path, 1)
  part = {'params': {'block': {'w': make_state(1).params['block']['w']}}}
  with pytest.raises(ConfigError, match='absent'):
    Checkpoints(tmp_path).restore_latest(part)
  _, restored, _ = Checkpoints(tmp_path).restore_latest(part, only_part=True)
  assert_same(restored, part)


CHANGES = {
  'dtype': lambda state: state.replace(step=jnp.float32(0)),
  'shape': lambda state: state.replace(params={**state.params, 'alpha': jnp.ones((2,))}),
  'more': lambda state: state.replace(params={**state.params, 'more': jnp.ones((2,))}),
  'fewer': lambda state: state.replace(params={'alpha': state.params['alpha']}),
}


@pytest.mark.parametrize('change', CHANGES)
def test_another_structure_is_an_error_of_the_user_not_damage(tmp_path, capfd, change):
  save(tmp_path, 1)
  with pytest.raises(ConfigError, match='another model or optimizer') as error:
    Checkpoints(tmp_path).restore_latest(CHANGES[change](make_state()))
  assert '\n' not in str(error.value) and capfd.readouterr().err == ''


def _sharding(*mesh: int) -> NamedSharding:
  names = ('a', 'b')[: len(mesh)]
  devices = jax.devices()[: int(np.prod(mesh))]
  grid = jax.make_mesh(mesh, names, devices=devices, axis_types=(AxisType.Auto,) * len(mesh))
  return NamedSharding(grid, PartitionSpec(*names))


@functools.partial(jax.jit, donate_argnums=0)
def _overwrite(tree):
  return jax.tree.map(lambda x: x * 0 - 1, tree)


@pytest.mark.parametrize('mesh', [(1,), (8,), (4, 2)])
def test_a_donated_update_right_after_save_does_not_reach_the_checkpoint(tmp_path, mesh):
  sharding = _sharding(*mesh)
  expected = {f'w{i}': np.full((256, 64), i + 1.0, np.float32) for i in range(30)}

  def fresh():
    return jax.block_until_ready(jax.device_put(expected, sharding, may_alias=False))

  state = _overwrite(fresh())  # compiles it
  overlaps = 0
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(4):
      state = fresh()
      checkpoints.save(step, state, {})
      for _ in range(3):
        state = _overwrite(state)
      jax.block_until_ready(state)
      overlaps += not (tmp_path / str(step)).exists()  # orbax was still writing
      _, restored, _ = checkpoints.restore_latest(state)
      assert_same(restored, expected)
    assert overlaps > 0
    # The same for what was restored: it must be the training's own memory.
    _, again, _ = checkpoints.restore_latest(state)
    jax.block_until_ready(_overwrite(restored))
    assert_same(again, expected)
  assert float(state['w0'][0, 0]) == -1.0


def test_restores_onto_any_mesh(tmp_path):
  x_RC = jax.random.normal(jax.random.key(0), (64, 16))
  meshes = [_sharding(1), _sharding(8), _sharding(4, 2), _sharding(2), _sharding(1)]
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {'x': x_RC, 'step': jnp.int32(5)}, {})
    for step, sharding in enumerate(meshes, start=1):
      everywhere = NamedSharding(sharding.mesh, PartitionSpec())
      abstract = {
        'x': jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding),
        'step': jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
      }
      _, state, _ = checkpoints.restore_latest(abstract)
      assert_same(state, {'x': x_RC, 'step': jnp.int32(5)})
      assert state['x'].sharding == sharding and state['step'].sharding == everywhere
      checkpoints.save(step, state, {})


def checksum(x) -> int:
  return int(leaf_checksums([x])[0])


def numpy_checksum(x: np.ndarray) -> int:
  bits = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
  words = np.frombuffer(x.tobytes(), bits).astype(np.uint32)
  h = words + np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B9)
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return int(np.sum(h ^ (h >> np.uint32(16)), dtype=np.uint32))


DTYPES = 'bool int8 uint8 bfloat16 float16 int32 float32 float64 int64'


@pytest.mark.parametrize('dtype', DTYPES.split())
def test_checksum_sees_every_bit(x64, rng, dtype):
  x = jnp.asarray(rng.normal(size=(3, 4)) * 50).astype(dtype)
  data, expected = np.asarray(x), checksum(x)
  assert expected == numpy_checksum(data)
  bits = 1 if dtype == 'bool' else 8 * data.dtype.itemsize
  for bit in range(bits):
    flipped = bytearray(data.tobytes())
    flipped[5 * data.dtype.itemsize + bit // 8] ^= 1 << bit % 8
    y = np.frombuffer(bytes(flipped), data.dtype).reshape(data.shape)
    assert checksum(y) != expected, bit


def test_checksum_is_the_same_on_every_mesh_and_sees_a_lost_page_of_ones(rng):
  x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
  values = {checksum(jax.device_put(x, _sharding(*mesh))) for mesh in [(1,), (8,), (4, 2), (2,)]}
  assert values == {numpy_checksum(np.asarray(x))}
  ones = jnp.ones((4096,))  # weights 2 i + 1 sum to 2^20 over 1024 of them: times 0x3f800000, zero
  assert checksum(ones) != checksum(ones.at[1024:2048].set(0))


@pytest.mark.slow
def test_no_flipped_byte_in_any_file_goes_unnoticed(tmp_path, capfd):
  good, bad, warnings = tmp_path / 'good', tmp_path / 'bad', ''
  save(good, 10, 20)
  files = sorted(p for p in (good / '20').rglob('*') if p.is_file() and p.stat().st_size)
  for number, path in enumerate(files):
    size = path.stat().st_size
    for offset in {size // 3, random.Random(number).randrange(size)}:
      shutil.copytree(good, bad)
      data = bytearray(path.read_bytes())
      data[offset] ^= 0x10
      (bad / path.relative_to(good)).write_bytes(data)
      step, state, extra = Checkpoints(bad).restore_latest(make_state())
      err = capfd.readouterr().err
      assert (step == 10) == ('checkpoint of step 20' in err), (path, offset, err)
      assert err.count('\n') == (step == 10)
      assert_same(state, make_state(step))  # a flip in bytes that nobody reads may be ignored
      assert extra == {'index': step}
      warnings += err
      shutil.rmtree(bad)
  # Orbax by itself would have taken some of these for good.
  assert 'checksum of' in warnings and 'manifest does not match' in warnings


def _truncate(step: Path) -> None:
  largest = max((p for p in (step / 'state').rglob('*') if p.is_file()), key=os.path.getsize)
  largest.write_bytes(largest.read_bytes()[:100])


DAMAGES = {
  'truncated': _truncate,
  'of step 10': lambda step: (shutil.rmtree(step), shutil.copytree(step.parent / '10', step)),
  'empty': lambda step: (shutil.rmtree(step), step.mkdir()),
  'no manifest': lambda step: shutil.rmtree(step / 'manifest'),
  'no state': lambda step: shutil.rmtree(step / 'state'),
  'no ocdbt': lambda step: (step / 'state' / 'manifest.ocdbt').unlink(),
  'renamed': lambda step: (path := step / 'state' / '_METADATA').write_text(
    path.read_text().replace('alpha', 'beta')
  ),
  'keys': lambda step: (step / 'manifest' / 'metadata').write_text('{"step": 20}'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_falls_back_with_one_warning_and_the_next_save_clears(tmp_path, capfd, damage):
  save(tmp_path, 10, 20)
  DAMAGES[damage](tmp_path / '20')
  with Checkpoints(tmp_path) as checkpoints:
    step, state, extra = checkpoints.restore_latest(make_state())
    err = capfd.readouterr().err
    assert (step, extra) == (10, {'index': 10})
    assert_same(state, make_state(10))
    assert err.startswith('warning: checkpoint of step 20 ') and err.count('\n') == 1
    assert checkpoints.steps() == [10, 20]  # reading removes nothing
    checkpoints.save(15, make_state(15), {'index': 15})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15]
    checkpoints.save(20, make_state(20), {'index': 20})
  assert Checkpoints(tmp_path).restore_latest(make_state())[0] == 20
  assert capfd.readouterr().err == ''


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path, capfd):
  save(tmp_path, 10, 20)
  for step in (10, 20):
    (tmp_path / str(step) / 'manifest' / 'metadata').unlink()
  with pytest.raises(CheckpointError, match=r'all 2 checkpoints in .* are damaged: ') as error:
    Checkpoints(tmp_path).restore_latest(make_state())
  assert '\n' not in str(error.value) and Checkpoints(tmp_path).steps() == [10, 20]
  assert capfd.readouterr().err.count('\n') == 2


def _child(script: str, *arguments: Any, before: tuple[str, ...] = ()) -> subprocess.Popen:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  command = [*before, sys.executable, '-W', 'error', '-c', script, *map(str, arguments)]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, env=environment, **pipes)


# Saves once, is then denied room, reports what it is told, and goes on when there is room again.
FULL = """
import json, os, resource, shutil, sys, types
import jax
from mhc_jax.checkpoint import Checkpoints
state = {f'w{i}': jax.numpy.full((64, 256), 1.0 + i) for i in range(16)}
big = {f'w{i}': jax.numpy.full((512, 256), 1.0 + i) for i in range(16)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state, {})
checkpoints.wait()
if sys.argv[2] == 'limit':
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
  big = state
if sys.argv[2] == 'late':  # as with a quota: the file system says there is room
  shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)
errors = []
for step in (2, 3):
  try:
    checkpoints.save(step, big, {})
    checkpoints.wait()
  except OSError as error:
    errors.append([error.errno, str(error)])
checkpoints.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Checkpoints(sys.argv[1]) as checkpoints:  # the same command again, later
  step, found, _ = checkpoints.restore_latest(state)
  assert step == 1 and all((found[name] == state[name]).all() for name in state)
  checkpoints.save(4, state, {})
print(json.dumps([errors, sorted(os.listdir(sys.argv[1]))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('cause', ['limit', 'early', 'late'])
def test_no_room_is_an_oserror_and_spares_the_step_before(tmp_path, cause):
  """A limit on file size, and a small file system where the machine lets a process mount one."""
  code = errno.EFBIG if cause == 'limit' else errno.ENOSPC
  text = ' MB free, ' if cause == 'early' else os.strerror(code)
  before = ()
  if cause != 'limit':
    mount = f'mount -t tmpfs -o size=5m tmpfs {tmp_path} && exec "$0" "$@"'
    before = ('unshare', '--mount', '--map-root-user', 'sh', '-c', mount)
    try:
      subprocess.run([*before, 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
      pytest.skip('needs unshare(1) with user namespaces')
  process = _child(FULL, tmp_path, cause, before=before)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and err == '', err
  errors, entries = json.loads(out)
  assert [number for number, _ in errors] == [code, code]
  for step, (_, message) in zip((2, 3), errors, strict=True):
    assert text in message and f'step {step} not written' in message and '\n' not in message
  assert entries == ['1', '4']  # nothing half-written is left to fill the disk


def test_nothing_saved_is_none_without_importing_orbax_or_creating_anything(tmp_path):
  script = (
    'import sys; from mhc_jax.checkpoint import Checkpoints\n'
    'assert all(Checkpoints(path).restore_latest({}) is None for path in sys.argv[1:])\n'
    'assert "orbax.checkpoint" not in sys.modules'
  )
  process = _child(script, tmp_path, tmp_path / 'none')
  assert process.communicate(timeout=60) == ('', '') and process.returncode == 0
  assert not any(tmp_path.iterdir())


def test_a_reader_beside_a_writer_is_not_alarmed(tmp_path, monkeypatch, capsys):
  """With one step kept, the one that was listed is gone when it is read; a damaged one stays, and is said."""
  save(tmp_path, 1)
  real, between = Checkpoints._read, [True]

  def read(checkpoints, step, *rest):
    if between.pop():
      with Checkpoints(tmp_path, keep=1) as writer:
        writer.save(2, make_state(2), {})
    between.append(False)
    return real(checkpoints, step, *rest)

  monkeypatch.setattr(Checkpoints, '_read', read)
  part = {'step': jnp.int32(0)}
  assert Checkpoints(tmp_path).restore_latest(part, only_part=True)[0] == 2
  assert not capsys.readouterr().err
  (tmp_path / '2' / 'manifest' / 'metadata').unlink()
  with pytest.raises(CheckpointError, match='all 1 checkpoints'):
    Checkpoints(tmp_path).restore_latest(part, only_part=True)
  assert 'step 2' in capsys.readouterr().err


def test_a_step_of_the_wall_clock_ends_no_save(tmp_path, monkeypatch):
  """Each look at it is an hour later: orbax waits by it for ten minutes at most."""
  clock = iter(range(0, 10**9, 3600))
  monkeypatch.setattr(time, 'time', lambda: float(next(clock)))
  save(tmp_path, 1)
  assert Checkpoints(tmp_path).steps() == [1]


@pytest.mark.parametrize(
  'content', ('7', 'folder', '', '{"init_timestamp_nsecs": "x"}', '{"item_handlers": 5}')
)
def test_what_orbax_notes_about_a_step_may_be_damaged(tmp_path, content):
  save(tmp_path, 1)
  note = tmp_path / '1' / '_CHECKPOINT_METADATA'
  note.unlink()
  note.mkdir() if content == 'folder' else note.write_text(content)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(make_state(1))[0] == 1
    checkpoints.save(2, make_state(2), {})
  assert Checkpoints(tmp_path).restore_latest(make_state(2))[0] == 2
