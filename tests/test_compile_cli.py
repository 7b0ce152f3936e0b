"""mhc compile and mhc overhead as commands, with CPU devices in place of a TPU's."""

import json
import pathlib

import jax
import pytest

from experiments.compile import __main__ as compile_command
from experiments.compile import gpu as compile_gpu
from experiments.compile import overhead, report, scale_page, tpu
from experiments.compile.hlo_cost import count
from experiments.compile.hlo_text import parse_module
from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
  f'--config={ROOT}/configs/laptop.py:smoke',
  '--config.mesh.fsdp=4',
  '--config.model.mla.kv_rank=8',
  '--config.model.moe.experts=4',
  '--config.model.moe.active=2',
  '--config.model.moe.ffn_width=16',
]


def run(capsys, *arguments):
  """(exit code, what was printed, what was printed as errors)."""
  code = end_with_message(lambda: compile_command.main(list(arguments)))
  return code, *capsys.readouterr()


@pytest.fixture
def on_cpu(monkeypatch):
  """Four CPU devices for a slice of v5p; they have no coordinates, and libtpu need not be installed."""
  monkeypatch.setattr(tpu, 'described_devices', lambda topology: jax.devices()[:4])
  monkeypatch.setattr(
    tpu, 'group_sides', lambda mesh, chip: lambda operation: [(len(operation.group), False)]
  )
  monkeypatch.setattr(tpu.metadata, 'version', lambda name: '1')


@pytest.mark.slow
def test_the_report_on_a_slice(on_cpu, capsys):
  """The whole path but for the TPU's compiler; text and JSON tell the same."""
  connection = '--config.model.connection.name=identity'  # compiles sooner than mhc
  code, out, _ = run(capsys, *SMALL, connection, '--topology=v5p:2x2x1', '--json')
  found = json.loads(out)
  assert code == 0 and found['fits'] and found['devices'] == 4 and found['mesh']['fsdp'] == 4
  memory, held, predicted = found['memory_bytes'], found['argument_bytes'], found['predicted']
  assert memory['arguments'] == pytest.approx(sum(held.values()), rel=0.01)  # and four scalars
  assert memory['total'] < memory['capacity'] == 95 * 2**30
  assert (
    held['optimizer'] == pytest.approx(2 * held['params'], rel=1e-3) and predicted['uncounted']['loops'] == []
  )
  seconds = predicted['seconds']
  assert seconds['serial'] >= seconds['step'] >= seconds['roofline'] > 0
  assert 0 < predicted['mfu'] < predicted['mfu_full']
  assert predicted['collectives']['all-gather']['bytes'] > held['params']
  scopes = [predicted['scopes'][name] for name in ('attention_scores', 'routed_experts')]
  assert all(scope['flops'] > 0 for scope in scopes)  # a scope that no layer opens would have none
  assert 0 < sum(scope['seconds'] for scope in scopes) < seconds['step']
  # CPUs multiply all rows by every expert, and for the weights' gradient too: 4 experts, 2 in use.
  assert predicted['routed_experts']['over_ideal'] == pytest.approx(4, rel=0.01)
  words = report.text(found)
  assert words.splitlines()[1].startswith('fits: 0.0') and 'Predictions, not measurements' in words
  assert 'all-gather' in words and 'what they need' in words


def test_kernels_count_what_they_say_they_cost():
  estimate = '"cost_estimate":{"flops":"640","transcendentals":"0","bytes_accessed":"96"}'
  text = f"""HloModule m, is_scheduled=true, entry_computation_layout={{(f32[8])->f32[8]}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %a = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={{{estimate}}}
  ROOT %b = f32[8]{{0}} custom-call(%a), custom_call_target="tpu_custom_call"
}}
"""
  found = count(parse_module(text))
  assert [(row.name, row.matmul_flops, row.bytes) for row in found.operations] == [
    ('a', 640, 96),
    ('b', 0, 64),
  ]
  assert found.custom_calls == {'b': 1}


@pytest.mark.slow
def test_without_memory_the_report_says_what_to_change(on_cpu, monkeypatch, capsys):
  """The compiler's own message of a step that needs more than there is."""

  class Traced:
    def lower(self):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
        'Used 120.50G of 95.00G hbm. Exceeded hbm capacity by 25.50G.'
      )

  traced = tpu.trace_step
  monkeypatch.setattr(tpu, 'trace_step', lambda config, mesh: (Traced(), *traced(config, mesh)[1:]))
  code, out, _ = run(capsys, *SMALL, '--topology=v5p:2x2x1')
  lines = out.splitlines()
  assert code == 1 and lines[1] == 'DOES NOT FIT: 120.50 GiB of 95.00 GiB a device'
  assert lines[2] == '- recompute activations: --config.model.remat=layer' and len(lines) > 3


@pytest.mark.parametrize(
  'arguments,words',
  (
    (['--topology=v5p:2x2'], 'a topology is a chip and its sides'),
    (['--topology=H100:8'], 'a topology is a chip and its sides'),
    (['--topology=v5p:2x2x2', '--config.mesh.fsdp=3'], 'mesh.fsdp'),
    ([], 'name a slice: --topology v5p:8x8x8, or --gpu H100:2x8'),
    (['--gpu=v5p:4'], '--gpu is a chip of A100'),
    (['--gpu=H100:4', '--topology=v5p:2x2x1'], 'exclude each other'),
    (['--gpu=H100:8'], '--gpu H100:8 has 8 devices'),
    (['--gpu=H100:2x2x2'], '--gpu is a chip of A100'),
    (['--gpu=H100:12'], 'name the hosts, like H100:3x4'),
    (['--gpu=H100:2x2', '--config.mesh.fsdp=4'], "pip install 'mhc_jax[gpu-compiler]'"),
  ),
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, arguments, words):
  if '--topology=v5p:2x2x2' in arguments:
    monkeypatch.setattr(tpu, 'described_devices', lambda topology: jax.devices())
  monkeypatch.setattr(compile_gpu, 'WHEELS', ('not_installed.a', 'not_installed.b'))
  code, out, error = run(capsys, *SMALL, *arguments)
  assert code == 2 and not out and len(error.splitlines()) == 1 and words in error


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(tpu.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='pip install'):
    tpu.described_devices('v5p:2x2x1')


@pytest.mark.slow
def test_the_report_on_a_cluster(monkeypatch, capsys):
  """The whole path but for XLA's GPU compiler, whose wheels need not be installed: two hosts of two."""

  def devices(name, hosts, each):
    assert (name, hosts, each) == ('H100', 2, 2)
    return jax.devices()[:4]

  monkeypatch.setattr(compile_gpu, 'described_devices', devices)
  monkeypatch.setattr(compile_gpu.metadata, 'version', lambda name: '1')
  code, out, _ = run(capsys, *SMALL, '--config.model.connection.name=identity', '--gpu=H100:2x2', '--json')
  found = json.loads(out)
  assert code == 0 and found['fits'] and found['memory_bytes']['capacity'] == 80e9
  assert found['program']['fusions'] > 10 and found['predicted']['collectives']['all-gather']['seconds'] > 0
  assert 'fusions in the text; custom calls: ' in report.text(found)


def test_a_gpu_is_told_to_xla():
  """Every GPU has a target; memory and bandwidth are those that times are computed with."""
  assert set(compile_gpu.TARGETS) == set(compile_gpu.GPUS)
  words = compile_gpu.target_text('H200')
  assert 'memory_bandwidth: 4800000000000\n' in words and 'device_memory_size: 141000000000\n' in words
  assert words.count('{') == words.count('}') == 4 and 'major: 9 minor: 0' in words
  assert compile_gpu.cluster('H100:64') == ('H100', 8, 8) and compile_gpu.cluster('B200:4') == ('B200', 1, 4)


def test_overhead_keeps_what_is_finished(monkeypatch, tmp_path, capsys):
  """The second call compiles nothing; the page has a line for the pair and the costliest operations.

  No report is made: what is kept in docs/compile/ stands in for the compiler's.
  """
  calls = []

  def kept(config, topology):
    calls.append((topology, config.model.connection.streams, config.mesh.fsdp))
    name = 'residual' if config.model.connection.name == 'residual' else 'mhc-n4'
    report = json.loads((ROOT / 'docs' / 'compile' / f'paper_27b-v5p-{name}.json').read_text())
    predicted = report['predicted']
    predicted['seconds'].setdefault('serial', predicted['seconds']['step'])
    predicted.setdefault('mfu_full', predicted['mfu'])
    return report

  monkeypatch.setattr(overhead, 'compile_step', kept)
  monkeypatch.chdir(tmp_path)  # from any folder: configs are found beside the code
  arguments = ['--only', 'paper_27b-v5p']
  assert overhead.main(arguments) == 0 and len(calls) == 2
  assert [call[::2] for call in calls] == [('v5p:8x8x8', 256)] * 2 and calls[1][1] == 4
  page = tmp_path / 'docs' / 'scale.md'
  first = page.read_text()
  assert overhead.main(arguments) == 0 and len(calls) == 2
  assert page.read_text() == first
  assert first.count('| 27B, n = 4, v5p:8x8x8 |') == 2  # and before and now
  assert first.count('the ten costliest operations') == 2
  assert sum(first.count(f'| {limit} |') for limit in ('memory', 'compute', 'links')) == 20
  assert capsys.readouterr().err.count('kept') == 2
  assert len(list((tmp_path / 'docs' / 'compile').iterdir())) == 2
  for fields, words in (
    (['--config.model.remat=none'], 'folder of their own'),
    (['--remat=none'], 'what is'),
  ):
    with pytest.raises(ConfigError, match=words):
      overhead.main([*arguments, *fields])
  with pytest.raises(ConfigError, match='no cell has'):
    overhead.main(['--only', 'nothing', '--out', str(tmp_path)])


def test_a_pair_that_does_not_fit_has_no_numbers():
  fits, not_fits = {'fits': True, 'connection': 'residual'}, {'fits': False, 'connection': 'mhc'}
  line = scale_page.row('3B, n = 4, v6e:8x8', fits, not_fits)
  assert line.startswith('| 3B, n = 4, v6e:8x8 | mhc does not fit |')
  assert {text.count('|') for text in (line, *scale_page.TABLE)} == {11}


def test_the_page_is_what_the_reports_say():
  """docs/scale.md is written from docs/compile/, and every paper config is there on both kinds of slice."""
  folder, cells = ROOT / 'docs' / 'compile', overhead.cells()
  paths = {cell.name: folder / f'{cell.name}.json' for cell in cells}
  reports = overhead.current(paths)
  assert all(path.exists() for path in paths.values())
  kept = {name: folder / f'{name}.json' for name in overhead.TABLES}
  tables = {name: json.loads(path.read_text()) for name, path in kept.items() if path.exists()}
  assert (ROOT / 'docs' / 'scale.md').read_text() == overhead.page_of(reports, tables)
  assert {path.stem for path in (ROOT / 'configs').glob('paper_*.py')} == {cell.config for cell in cells}


def test_kernels_take_no_config(monkeypatch, capsys):
  """And without a config one is asked for."""
  for arguments, words in (
    (['--kernels', '--config=laptop'], '--small take no config'),
    ([], 'name a config'),
    (['--connection=mhc', '--topology=v5p:2'], 'a topology is a chip and its sides'),
  ):
    code, out, error = run(capsys, *arguments)
    assert code == 2 and not out and words in error


def test_the_page_has_the_kernels():
  """Cycles beside the time of the bytes, their sum, and the ratio of the small steps."""
  options = {'topology': 'v5p:2x2x1', 'streams': 4, 'width': 1000, 'tokens': 500, 'connection': None}
  kernel = {'times': 1, 'bytes': 2765e3, 'cycles': 3500}  # 1 us and 2 us
  program = {
    'bytes': 2e6,
    'xla_bytes': 4e6,
    'seconds': 1e-5,
    'cycles': 7000.0,
    'kernels': {'a': kernel, 'b': kernel},
  }
  lines = scale_page.kernels('kernels-v5p', {'options': options, 'programs': {'pair': program}})
  assert lines[-2:] == [
    '| pair: b | 2.77 | 1.0 | 3,500 | 2.0 | 2.00 |',
    '| pair, all |  | 2.0 |  | 4.0 | 2.00 |',
  ]
  both = {'options': options | {'connection': 'mhc'}, 'programs': {'xla': program}}
  assert scale_page.kernels('connection-v5p', both)[-1] == '| xla | 2.00 | 4.0 | 10 | 7e+03 |'
  steps = {'programs': {'residual': {'cycles': 100.0}, 'mhc': {'cycles': 150.0}}}
  assert scale_page.small(steps)[-1] == '| mhc | 150 | 1.50 |'
  found = {'1 x mhc 64': {'cycles': 1.5e6}, '8 x mhc 64': {'cycles': 6e6}, '32 x mhc 64': {'error': 'x'}}
  lines = scale_page.populations({'options': {'topology': 'v5e:2x2'}, 'programs': found})
  assert '| mhc | 64 | 1000 | 500 | - | 2.00 x at P = 8 |' in lines
