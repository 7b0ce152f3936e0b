"""Sentences of the page: a number in the arm's direction, a gain that fades, a gap instead of a number."""

import dataclasses
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.gaps import Gap
from analysis.multipliers import Multiplier
from analysis.page.words import headlines, question
from analysis.page.write import _asset


@dataclasses.dataclass(frozen=True)
class Fading(Multiplier):
  """A multiplier that is not one number: what it is at either end of the sizes."""

  trend: str | None = None
  smallest: object = None
  largest: object = None


def at(flops, value, low, high):
  return SimpleNamespace(flops=flops, value=value, interval=[low, high])


def sweep(*multipliers, gaps=(), fit=True, arms=('residual', 'hc', 'mhc')):
  table = pd.DataFrame({'arm': arms})
  choice = SimpleNamespace(reason='No law is fitted: 1 size.')
  return SimpleNamespace(
    **{'arms': list(table['arm']), 'reference': 'residual', 'fit': object() if fit else None},
    **{'multipliers': list(multipliers), 'gaps': list(gaps), 'choice': choice},
  )


def gap(difference, low=None, high=None, pairs=3, size='64x4', log_flops=30.0):
  return Gap('mhc', size, log_flops, pairs, difference, 1.0, low, high, None, None, 1.0, 1.0)


@pytest.mark.parametrize(
  ('m', 'interval', 'sentence'),
  [
    (
      0.72,
      [0.63, 0.82],
      "1.39 times residual's compute for the same loss (95 %: 1.22 to 1.59): it costs compute.",
    ),
    (
      1.25,
      [1.1, 1.4],
      "0.80 times residual's compute for the same loss (95 %: 0.71 to 0.91): it saves compute.",
    ),
    (1.05, [0.9, 1.2], "0.95 times residual's compute for the same loss (95 %: 0.83 to 1.11): undecided."),
  ],
)
def test_a_sentence_says_what_the_arm_needs(m, interval, sentence):
  assert headlines(sweep(Multiplier('mhc', None, m, interval)))[1] == f'mhc needs {sentence}'


def test_a_gain_that_fades_has_two_numbers():
  fades = Fading(
    'mhc', None, trend='fades', smallest=at(1e14, 1.39, 1.3, 1.5), largest=at(1e16, 1.05, 0.99, 1.1)
  )
  assert headlines(sweep(fades))[1] == (
    "mhc needs 0.72 (0.67 to 0.77) times residual's compute for the same loss at 1e14 FLOPs but "
    '0.95 (0.91 to 1.01) times at 1e16: its gain fades.'
  )
  costs = Fading(
    'mhc', None, trend='grows', smallest=at(1e14, 0.5, 0.4, 0.6), largest=at(1e16, 0.8, 0.7, 0.9)
  )
  assert headlines(sweep(costs))[1].endswith(': its cost fades.'), 'a multiplier that grows towards 1'
  constant = Fading('mhc', None, 1.25, [1.1, 1.4], trend='cannot tell')
  assert headlines(sweep(constant))[1].endswith('whether that holds at all sizes, these runs cannot tell.')


def test_without_a_multiplier_the_gap_at_the_largest_size_is_given():
  small = gap(0.5, size='32x2', log_flops=20.0)
  none = Multiplier('mhc', 'its interval is wider than a factor of 4')
  assert headlines(sweep(none, gaps=[gap(-0.021, -0.03, -0.01), small])) == [
    'hc has no compute multiplier: it is not in the law.',
    'mhc has no compute multiplier (its interval is wider than a factor of 4); its loss at the largest size, '
    "64x4, is 0.021 nats lower than residual's (95 %: 0.010 to 0.030, 3 paired seeds).",
  ]
  said = headlines(sweep(gaps=[gap(0.02, -0.01, 0.05)], fit=False, arms=('residual', 'mhc')))
  assert said == [
    'No law is fitted: 1 size.',
    "mhc's loss at 64x4 is 0.020 nats higher than residual's (95 %: 0.050 higher to 0.010 lower, 3 paired "
    'seeds): undecided.',
  ]
  (_, one) = headlines(sweep(gaps=[gap(0.02, pairs=1)], fit=False, arms=('residual', 'mhc')))
  assert one.endswith("0.020 nats higher than residual's (1 paired seed: no interval).")


def test_the_title_is_the_question():
  assert question(sweep()) == 'Do hc and mhc need less compute than residual?'
  assert question(sweep(arms=('residual', 'mhc'))) == 'Does mhc need less compute than residual?'
  assert question(sweep(fit=False)) == 'Do hc and mhc reach a lower loss than residual?'
  assert question(sweep(arms=('residual', *'abcde'))) == 'Which of 5 arms needs less compute than residual?'


def test_a_script_cannot_end_its_element(tmp_path, monkeypatch):
  monkeypatch.setattr('analysis.page.write.HERE', tmp_path)
  (tmp_path / 'x.js').write_text('const a = "</script><b>", c = "</Style>", d = 1 </2/.exec(b);')
  assert _asset('x.js') == r'const a = "<\/script><b>", c = "<\/Style>", d = 1 </2/.exec(b);'
