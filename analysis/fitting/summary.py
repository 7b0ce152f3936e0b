"""The JSON of a fit as a screen of text: a sentence, a table, notes, predictions.

Where: after document.py and prediction.py, for the terminal; it has no numbers of its own.
"""

import math

LOSS_WORDS = {
  'huber': 'Huber loss of log loss, delta {:.3g}',
  'huber_raw': 'Huber loss of the loss in nats, delta {:.3g}',
  'mse_log': 'squares of log loss',
  'mse': 'squares of the loss',
}


def summary(doc: dict) -> str:
  """A fit: the law and what was fitted; parameter, value, interval or why there is none; what to know."""
  words = LOSS_WORDS[doc['loss']].format(doc['delta'])
  lines = [
    f'{doc["formula"]}: fitted to {doc["n_points"]} runs ({words}), objective {doc["objective"]:.6g}.',
    '',
  ]
  lines += table(
    ('parameter', 'value', f'{100 * doc["level"]:g} % interval ({doc["interval_method"].replace("_", " ")})'),
    [_row(doc, name) for name in (*doc['intervals'], *doc['pinned']) if name in doc],
  )
  notes = [*doc['notes'], *doc['doubts'], *(f for f in doc['flags'] if f not in doc['doubts'])]
  notes += [doc['caveat']] if doc['caveat'] else []
  notes += [f'excluded: {sentence}' for sentence in doc['excluded']]
  notes += _held_out(doc['rollout'])
  notes += map(_gain, doc.get('gains', ()))
  notes += [
    f'{c["name"]}, against {c["against"]}: F = {c["f_statistic"]:.3g}, p = {c["p_value"]:.2g}'
    for c in doc.get('nested', ())
    if c['p_value'] is not None
  ]
  return '\n'.join([*lines, *_notes(notes), *_predictions(doc['predictions'], _prediction)])


def isoflop_summary(doc: dict) -> str:
  """N*, D* and D*/N*: the laws and every budget, by arm and method."""
  lines = [doc['sentence'], '']
  head = ('arm', 'optimum', 'method', 'coefficient', 'exponent')
  interval = f'{100 * doc["level"]:g} %'
  rows = [
    (o['arm'], o['optimum'], o['method'], _ends(o, 'coefficient', 'coefficient_'), _ends(o, 'exponent', ''))
    for o in doc['optima']
  ]
  lines += table((*head[:3], f'coefficient ({interval})', f'exponent of C ({interval})'), rows)
  best = {}
  for o in doc['optima']:
    for b in o['budgets']:
      best.setdefault((o['arm'], o['method'], b['flops']), {'loss': b['loss'], 'problem': b['problem']})
      best[o['arm'], o['method'], b['flops']][o['optimum']] = b['value']
  rows = [
    (
      arm,
      method,
      f'{flops:.3g}',
      *(short(row.get(k)) for k in ('N*', 'D*', 'D*/N*', 'loss')),
      row['problem'] or '',
    )
    for (arm, method, flops), row in best.items()
  ]
  lines += ['', *table(('arm', 'method', 'FLOPs', 'N*', 'D*', 'D*/N*', 'loss', ''), rows)]
  return '\n'.join([*lines, *_notes(doc['notes']), *_predictions(doc['predictions'], _best)])


def short(value: float | None, digits: int = 4) -> str:
  """Four digits, or - for none."""
  return '-' if value is None or not math.isfinite(value) else f'{value:.{digits}g}'


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
  """Columns of text, each as wide as it must be."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
  ]
  return [lines[0], *(line for line in lines[1:])]


def _gain(g: dict) -> str:
  """How the multiplier of an arm changes with compute."""
  if g['trend'] is None:
    return f'whether the gain of {g["arm"]} changes with compute cannot be tested: {g["problem"]}'
  what = {'cannot tell': 'may change with compute, these runs cannot tell', 'holds': 'holds'}
  at = [
    f'{short(m["value"], 3)} ({short(m["interval"][0], 3)} to {short(m["interval"][1], 3)}) at C = '
    f'{short(m["flops"], 3)}'
    for m in (g['smallest'], g['largest'])
  ]
  trend = what.get(g['trend'], f'{g["trend"]} with compute')
  return f'the gain of {g["arm"]} {trend}: m = {at[0]}, {at[1]}'


def _row(doc: dict, name: str) -> tuple[str, str, str]:
  if name in doc['pinned']:
    return name, f'{doc["pinned"][name]:g}', 'pinned'
  if name in doc['verdicts']:
    return name, '-', 'not fitted soundly, see below' if doc['doubts'] else doc['verdicts'][name]
  low, high = doc['intervals'][name]
  return name, short(doc[name]), f'{short(low)} to {short(high)}'


def _held_out(rollout: list[dict]) -> list[str]:
  """How well all sizes but the largest predict it."""
  if not rollout or rollout[-1]['problem'] is not None:
    return []
  last = rollout[-1]
  return [
    f'without the largest size its runs are predicted to {100 * last["held_out_error"]:.2g} % '
    f'(in sample {100 * last["in_sample_error"]:.2g} %)'
  ]


def _ends(o: dict, name: str, prefix: str) -> str:
  low, high = o[f'{prefix}low'], o[f'{prefix}high']
  if o[name] is None:
    return '- (needs two budgets with a minimum)'
  ends = 'three budgets are needed' if low is None else f'{short(low)} to {short(high)}'
  return f'{short(o[name])} ({ends})'


def _notes(notes: list[str]) -> list[str]:
  return ['', *(f'- {note}' for note in notes)] if notes else []


def _predictions(predictions: list[dict], words: callable) -> list[str]:
  return ['', *map(words, predictions)] if predictions else []


def _at(p: dict) -> str:
  return ', '.join(
    f'{k} = {v if isinstance(v, str) else short(v)}' for k, v in p['at'].items() if k != 'loss'
  )


def _prediction(p: dict) -> str:
  warning = f' [{p["range"]}]' if p['range'] else ''
  if p['problem']:
    return f'at {_at(p)}: no prediction: {p["problem"]}{warning} (--anyway prints it)'
  out = (
    f'at {_at(p)}: loss {short(p["loss"], 5)} ({short(p["low"], 5)} to {short(p["high"], 5)}; '
    f'a new run {short(p["new_run_low"], 5)} to {short(p["new_run_high"], 5)})'
  )
  if 'measured' in p:
    out += f'; measured {p["measured"]:g}, relative error {100 * p["relative_error"]:+.4f} %'
  if p['extrapolated']:
    out += f'; extrapolated: {p["extrapolated"]}'
  return out + warning


def _best(p: dict) -> str:
  place = f'at C = {short(p["at"]["C"])}, {p["arm"]}, {p["method"]}'
  if p['problem']:
    return f'{place}: no prediction: {p["problem"]}'
  parts = []
  for name in ('N*', 'D*', 'D*/N*'):
    low, high = p[f'{name} low'], p[f'{name} high']
    parts.append(f'{name} {short(p[name])}' + ('' if low is None else f' ({short(low)} to {short(high)})'))
  warning = f' [{p["range"]}]' if p['range'] else ''
  return f'{place}: {", ".join(parts)}{warning}'
