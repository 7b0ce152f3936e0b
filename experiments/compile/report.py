"""A compiled train_step -> its report: memory, what it does, how long that takes, and the same for people.

TPUs and GPUs alike: tpu.py and gpu.py compile, hlo_cost.py counts, step_time.py predicts.
"""

from typing import Any

from ml_collections import ConfigDict

from mhc_jax import cost
from mhc_jax.chips import CHIPS, Chip
from mhc_jax.memory import advice, rows_at_a_time
from mhc_jax.model_config import ModelConfig

from .hlo_cost import Count, count, in_scope
from .hlo_text import parse_module
from .step_time import GIB, Sides, check_products, predict, speed


def finished(
  compiled: Any, config: ConfigDict, model: ModelConfig, sides: Sides, devices: int, chip: Chip
) -> dict[str, Any]:
  """{'memory_bytes', 'predicted'} of a compiled step; ConfigError where the count contradicts the model."""
  counted = count(parse_module(compiled.as_text()))
  predicted = predict(counted, chip, sides)
  tokens = config.data.batch_size * config.data.seq_len
  optimal = (compiled.cost_analysis() or {}).get('optimal_seconds', -1.0)  # negative: no estimate
  predicted['seconds']['compiler_loops_once'] = optimal if optimal > 0 else None
  predicted['routed_experts'] = routed_experts(counted, config, model, devices)
  predicted |= against_model(counted, predicted['seconds']['step'], tokens, model, config, devices, chip)
  return {'memory_bytes': memory(compiled, chip), 'predicted': predicted}


def against_model(
  counted: Count,
  seconds: float,
  tokens: int,
  model: ModelConfig,
  config: ConfigDict,
  devices: int,
  chip: Chip,
) -> dict[str, Any]:
  """The model's own FLOPs of a device and step, and speed; ConfigError where they contradict the count."""
  length = config.data.seq_len
  check_products(counted, cost.train_product_flops_per_token(model, length) * tokens / devices)
  flops = {
    name: cost.train_flops_per_token(model, length, causal=name == 'causal') for name in ('causal', 'full')
  }
  share = {name: value * tokens / devices for name, value in flops.items()}
  known = not counted.custom_calls
  return {
    'model_flops': share['full'],
    'model_flops_causal': share['causal'],
    **speed(seconds, tokens, flops, devices // chip.devices, chip, known),
  }


def routed_experts(
  counted: Count, config: ConfigDict, model: ModelConfig, devices: int
) -> dict[str, float] | None:
  """FLOPs of the routed experts' products on a device, all rows of their buffers, and over the ideal's.

  Ideal: each token times its chosen experts, forward and backward; a recomputation adds a third.
  """
  if model.moe is None:
    return None
  ours = [row for row in counted.operations if in_scope(row.op_name, 'routed_experts')]
  flops = sum(row.times * row.matmul_flops for row in ours)
  tokens = config.data.batch_size * config.data.seq_len
  per_token = cost.forward_flops_per_token(model, config.data.seq_len)['routed_experts']
  return {'flops': flops, 'over_ideal': flops / (3 * per_token * tokens / devices)}


def memory(compiled: Any, chip: Chip) -> dict[str, float]:
  """Bytes of one device by kind, from the compiler, their total, and what a device has."""
  stats = compiled.memory_analysis()
  kinds = {
    'arguments': stats.argument_size_in_bytes,
    'outputs': stats.output_size_in_bytes,
    'aliased': stats.alias_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'generated_code': stats.generated_code_size_in_bytes,
  }
  total = sum(kinds.values()) - 2 * kinds['aliased']
  return {**kinds, 'total': total, 'capacity': chip.memory / chip.devices}


def changes(config: ConfigDict, arguments: dict[str, int], capacity: float) -> list[str]:
  """What to change where a step does not fit; arguments: bytes of params and optimizer of one device."""
  c, state = config.to_dict(), arguments['params'] + arguments['optimizer']
  lines = advice(c['model']['remat'], c['model']['dtype'], c['mesh'], rows_at_a_time(c), state, capacity)
  return [*lines, 'or take a larger slice, or chips with more memory']


def text(report: dict[str, Any]) -> str:
  """The report for people."""
  chips = report['devices'] // CHIPS[report['topology'].partition(':')[0]].devices
  mesh = ', '.join(f'{axis} {size}' for axis, size in report['mesh'].items())
  held = report['argument_bytes']
  gib = {name: f'{size / GIB:.2f} GiB' for name, size in {**report['memory_bytes'], **held}.items()}
  fits = 'fits' if report['fits'] else 'DOES NOT FIT'
  lines = [
    f'{report["connection"]} (n = {report["streams"]}), {report["params"]["total"] / 1e9:.3g} B parameters, '
    f'recompute {report["remat"]}, on {report["topology"]} ({chips} chips; mesh {mesh})',
    f'{fits}: {gib.get("total", "over")} of {gib["capacity"]} a device',
  ]
  if not report['fits']:
    return '\n'.join([*lines, *(f'- {line}' for line in report['change'])])
  kinds = ('arguments', 'outputs', 'aliased', 'temporaries', 'generated_code')
  lines.append('  ' + ', '.join(f'{kind.replace("_", " ")} {gib[kind]}' for kind in kinds))
  if 'program' in report:
    calls = ', '.join(report['program']['custom_calls']) or 'none'
    lines.append(f'  {report["program"]["fusions"]} fusions in the text; custom calls: {calls}')
  lines.append('  of the arguments: ' + ', '.join(f'{kind} {gib[kind]}' for kind in held))
  lines += [
    f'  {part}: ' + ('kernels' if reason is None else f"XLA's program, since {reason}")
    for part, reason in report['kernels'].items()
  ]
  return '\n'.join([*lines, '', *predicted_lines(report['predicted'], report['compile_seconds'])])


def predicted_lines(predicted: dict[str, Any], compile_seconds: float) -> list[str]:
  """The predictions for people."""
  device, seconds = predicted['per_device'], predicted['seconds']
  ratio, once = device['matmul_flops'] / predicted['model_flops'], seconds['compiler_loops_once']
  lines = [
    f'Predictions, not measurements (compiled in {compile_seconds:.0f} s):',
    f"  a device and step: {device['flops']:.3g} FLOPs (matrix products {ratio:.2f} x the model's own "
    f'{predicted["model_flops"]:.3g}), {device["hbm_bytes"]:.3g} bytes of memory traffic',
  ]
  if predicted['routed_experts']:
    flops, over = predicted['routed_experts'].values()
    lines.append(f'  of these the routed experts {flops:.3g}, {over:.2f} x what they need without recompute')
  lines += [
    f'  step {seconds["step"]:.4g} s, collectives overlapped as scheduled; nothing overlapped '
    f'{seconds["serial"]:.4g} s: operations {seconds["without_collectives"]:.4g} s, collectives '
    f'{seconds["collectives"]:.3g} s',
    f'  all FLOPs at their peak {seconds["all_flops"]:.4g} s, all bytes {seconds["all_bytes"]:.4g} s',
    *[
      f"  the compiler's own estimate: {device['compiler_cycles']:.4g} cycles without collectives"
      + (f', {once:.3g} s with every loop run once' if once else '')
    ]
    * bool(device['compiler_cycles']),
    f'  {predicted["tokens_per_second"]:.4g} tokens/s, '
    + (
      'no MFU: the FLOPs of some kernels are unknown'
      if predicted['mfu'] is None
      else f'MFU {100 * predicted["mfu"]:.1f} % of what a causal model needs '
      f'({100 * predicted["mfu_full"]:.1f} % with all of attention counted)'
    ),
    '',
    f'{"collective":20} {"times":>7} {"group":>6} {"GiB":>9} {"seconds":>9}',
  ]
  lines += [
    f'{kind:20} {row["times"]:7} {row["group"]:6} {row["bytes"] / GIB:9.3f} {row["seconds"]:9.4f}'
    for kind, row in predicted['collectives'].items()
  ]
  lines += ['', f'{"seconds":>8} {"share":>6} {"limit":8} {"times":>6} {"FLOPs":>9} {"bytes":>9}  operation']
  for row in predicted['costliest']:
    scope = '/'.join(row['op_name'].split('/')[-2:])
    lines.append(
      f'{row["seconds"]:8.4f} {100 * row["share"]:5.1f}% {row["limit"]:8} {row["times"]:6} '
      f'{row["flops"]:9.3g} {row["hbm_bytes"]:9.3g}  {row["source"]} {scope} {row["name"]}'
    )
  left = predicted['uncounted']
  if left['loops']:
    lines.append(f'counted once, trip count unknown: loops {", ".join(left["loops"])}')
  if left['custom_calls']:
    lines.append(
      f'ERROR: FLOPs not counted in: {", ".join(left["custom_calls"])} (kernels without a cost estimate)'
    )
  return lines
