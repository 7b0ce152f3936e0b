"""Properties of reading somebody's CSV: every number arrives, or one line says which does not."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.fitting.points import completed, parse_columns, read_points
from mhc_jax.errors import ConfigError

# The same examples in every run; tmp_path is one folder for all of them, whose file each example replaces.
fixed = settings(
  derandomize=True,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
  max_examples=60,
)
COLUMNS = parse_columns('N=n,D=d,loss=loss')
positive = st.floats(1e-30, 1e30)
rows = st.lists(st.tuples(positive, positive, positive), min_size=2, max_size=8).filter(
  lambda r: abs(np.log(r[0][0] / r[1][0])) > 0.1
)
cells = st.text(max_size=6).filter(lambda text: text.isprintable() or '\n' in text)


def write(path, lines):
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return path


@fixed
@given(rows)
def test_every_number_arrives(tmp_path, numbers):
  path = write(tmp_path / 'p.csv', ['n,d,loss', *(','.join(map(repr, row)) for row in numbers)])
  points = read_points(path, COLUMNS)
  n, d, loss = np.array(numbers).T
  np.testing.assert_array_equal(points.loss, loss)
  np.testing.assert_allclose(points.log_x['N'], np.log(n), rtol=1e-15)
  np.testing.assert_allclose(points.log_x['C'], np.log(6) + np.log(n) + np.log(d), atol=1e-12)
  assert points.run.tolist() == list(range(2, len(numbers) + 2))


@settings(fixed, max_examples=400)
@given(
  st.binary(max_size=200) | st.lists(cells, max_size=12).map(lambda c: ('n,d,loss\n' + '\n'.join(c)).encode())
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path, content):
  path = tmp_path / 'p.csv'
  path.write_bytes(content)
  try:
    points = read_points(path, COLUMNS)
  except ConfigError as error:
    assert '\n' not in str(error)
  else:
    assert len(points) >= 2 and np.isfinite(points.loss).all() and (points.loss > 0).all()


@settings(fixed, max_examples=300)
@given(rows, st.integers(0, 3), st.data())
def test_a_cell_that_is_no_positive_number_is_named_by_its_line(tmp_path, numbers, blank, data):
  """Whatever stands there: the line of the file, blank lines before it included, the role and the column."""
  row, column = data.draw(st.integers(0, len(numbers) - 1)), data.draw(st.sampled_from('n d loss'.split()))
  bad = data.draw(
    st.sampled_from(
      ['nan', 'NA', '-1', '0', 'inf', '-inf', 'true', '1e400', '1,5,0', '0x10', '1__0', '１', '1.5 PF']
    )
  )
  table = [list(map(repr, row)) for row in numbers]
  table[row][('n', 'd', 'loss').index(column)] = f'"{bad}"'
  path = write(tmp_path / 'p.csv', ['n,d,loss', *[''] * blank, *map(','.join, table), ''])
  with pytest.raises(ConfigError, match=rf'line {row + blank + 2}: .*column .{column}.') as error:
    read_points(path, COLUMNS)
  assert '\n' not in str(error.value)


@fixed
@given(rows, st.permutations(['n', 'd', 'loss', 'x']), st.sampled_from(['', '\ufeff']))
def test_neither_the_order_of_columns_nor_a_byte_order_mark_matters(tmp_path, numbers, order, mark):
  cell = [dict(zip(('n', 'd', 'loss'), map(repr, row), strict=True)) | {'x': 'text'} for row in numbers]
  write(
    tmp_path / 'a.csv', [f'{mark}{",".join(order)}', *(','.join(row[name] for name in order) for row in cell)]
  )
  write(tmp_path / 'b.csv', ['n,d,loss', *(f'{row["n"]},{row["d"]},{row["loss"]}' for row in cell)])
  one, two = (read_points(tmp_path / name, COLUMNS) for name in ('a.csv', 'b.csv'))
  for name in one.log_x:
    np.testing.assert_array_equal(one.log_x[name], two.log_x[name])


@fixed
@given(st.dictionaries(st.sampled_from('NDC'), st.floats(-50, 50).map(lambda v: np.array([v])), min_size=1))
def test_what_completes_the_covariates_contradicts_none(given):
  """C = 6 N D and M = D / N wherever both sides are known; what was given stays."""
  out = completed(given)
  assert all(out[name] is given[name] for name in given)
  if len(given) == 2 and 'N' in given:
    np.testing.assert_allclose(out['C'], np.log(6) + out['N'] + out['D'], atol=1e-12)
    np.testing.assert_allclose(out['M'], out['D'] - out['N'])


def test_a_role_has_one_column():
  with pytest.raises(ConfigError, match="N is given twice, as 'a' and 'b'"):
    parse_columns('N=a,loss=l,N=b')
