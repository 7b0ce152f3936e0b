"""A law from its terms: `mhc fit --law 'E + A*N^-alpha + B*(C/N)^-beta'`.

Where: beside laws.py, for laws without a name. Nothing is evaluated; the grammar is

  law   = ["L" "="] term {"+" term}
  term  = constant | coefficient ["*"] power | coefficient "/" base "^" exponent
  power = base "^" "-" exponent
  base  = covariate | "(" covariate ["^" number] {["*" | "/"] covariate ["^" number]} ")"

with covariates N D C W H M (M = D / N), and any other names for constant, coefficients and exponents.
"""

import re

from mhc_jax.errors import ConfigError

from .laws import Law, Term
from .table import COVARIATES

NAMES = (*COVARIATES, 'M')
TOKEN = re.compile(
  r'\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<number>[0-9]*\.?[0-9]+)|(?P<sign>\*\*|[-+*/^()=]))', re.ASCII
)
# The part of log m, a multiplier of compute, that enters a covariate: N and D halve it; with width and depth
# compute is W^2 H D, a quarter to each factor, and N is W^2 H. M = D / N has none.
SHARES = {'N': 0.5, 'D': 0.5, 'C': 1.0, 'M': 0.0, 'W': 0.25, 'H': 0.25}
SHARES_OF_SHAPE = SHARES | {'N': 0.75, 'D': 0.25}


class _Reader:
  """The tokens of a formula, taken one by one."""

  def __init__(self, text: str) -> None:
    self.text, self.tokens, end = text, [], 0
    while text[end:].strip():
      match = TOKEN.match(text, end)
      if not match:
        self.fail(text[end:].strip()[0])
      self.tokens.append((match.lastgroup, match[match.lastgroup].replace('**', '^')))
      end = match.end()
    self.at = 0

  def fail(self, instead: str | None = None, wanted: str = 'a sum like E + A*N^-alpha + B*D^-beta') -> None:
    place = instead or (self.tokens[self.at][1] if self.at < len(self.tokens) else 'its end')
    raise ConfigError(f'--law {self.text!r}: not {wanted} at {place!r}')

  def take(self, *signs: str) -> str | None:
    """The next token if it is one of these signs, else None."""
    if self.at < len(self.tokens) and self.tokens[self.at][1] in signs:
      self.at += 1
      return self.tokens[self.at - 1][1]
    return None

  def need(self, kind: str, wanted: str) -> str:
    """The next token, which must be a name or a number."""
    if self.at == len(self.tokens) or self.tokens[self.at][0] != kind:
      self.fail(wanted=wanted)
    self.at += 1
    return self.tokens[self.at - 1][1]

  def name(self, wanted: str) -> str:
    """A name that is no covariate's."""
    name = self.need('name', wanted)
    if name in NAMES:
      self.at -= 1
      self.fail(wanted=wanted)
    return name

  def covariate(self) -> str:
    name = self.need('name', f'a covariate ({" ".join(NAMES)})')
    if name not in NAMES:
      self.at -= 1
      self.fail(wanted=f'a covariate ({" ".join(NAMES)})')
    return name


def parse_law(text: str) -> Law:
  """The law of a formula; without a constant E is pinned at 0. Raises ConfigError."""
  reader, constants, terms = _Reader(text), [], []
  if [t[1] for t in reader.tokens[:2]] == ['L', '=']:
    reader.at = 2
  while True:
    coefficient = reader.name('a constant or a coefficient (its own name, no number: hold it by --pin)')
    if reader.at == len(reader.tokens) or reader.tokens[reader.at][1] == '+':
      constants.append(coefficient)
    else:
      terms.append((coefficient, *_power(reader)))
    if not reader.take('+'):
      break
  if reader.at < len(reader.tokens):
    reader.fail()
  _check_names(text, constants, terms)
  shares = SHARES_OF_SHAPE if any({'W', 'H'} & set(base) for _, base, _ in terms) else SHARES
  law = Law(
    'formula',
    text if text.startswith('L') else f'L = {text}',
    tuple(
      Term(coefficient, exponent, tuple(base.items()), _share(base, shares, len(terms)))
      for coefficient, base, exponent in terms
    ),
  )
  return law if constants else law.pin('E', 0.0)


def _share(base: dict[str, float], shares: dict[str, float], terms: int) -> float:
  if terms == 1 and len(base) == 1:
    return 1.0  # m is a multiplier of the one factor
  return sum(power * shares[name] for name, power in base.items())


def _power(reader: _Reader) -> tuple[dict[str, float], str]:
  """({covariate: power}, exponent) of (prod X^power)^-exponent, after its coefficient."""
  divided = reader.take('*', '/') == '/'
  base = {}
  if reader.take('('):
    sign = 1.0
    while True:
      name = reader.covariate()
      power = float(reader.need('number', 'a number')) if reader.take('^') else 1.0
      base[name] = base.get(name, 0.0) + sign * power
      if reader.take(')'):
        break
      sign = -1.0 if reader.take('*', '/') == '/' else 1.0
  else:
    base[reader.covariate()] = 1.0
  if not reader.take('^'):
    reader.fail(wanted='^-exponent')
  if not divided and not reader.take('-'):
    reader.fail(wanted='- before the exponent')
  exponent = reader.name('the name of an exponent (no number: hold it by --pin)')
  if reader.at < len(reader.tokens) and reader.tokens[reader.at][1] != '+':
    reader.fail(wanted='one exponent to a term, as in A*(N*D^0.5)^-alpha,')
  return base, exponent


def _check_names(text: str, constants: list[str], terms: list[tuple]) -> None:
  coefficients, exponents = [t[0] for t in terms], {t[2] for t in terms}
  if not terms:
    raise ConfigError(f'--law {text!r}: without a power term')
  if len(constants) > 1 or (constants and constants != ['E']):
    raise ConfigError(f'--law {text!r}: the constant is one and called E')
  twice = [c for c in coefficients if coefficients.count(c) > 1 or c in exponents or c == 'E' or c == 'L']
  if twice or 'E' in exponents:
    raise ConfigError(f'--law {text!r}: {(twice or ["E"])[0]} has two meanings')
