"""Anybody's CSV is read as it was meant, or refused in one line that names line, column, cell and cause."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.fitting.points import parse_columns, read_points
from analysis.fitting.table import number
from mhc_jax.errors import ConfigError

ROWS = [(8e6, 4e8, 3.52), (8e6, 16e8, 3.21), (3.2e7, 4e8, 3.117), (3.2e7, 16e8, 2.875)]
PLAIN = 'n,d,loss\n' + ''.join(f'{n:.0f},{d:.0f},{loss}\n' for n, d, loss in ROWS)
COLUMNS = parse_columns('N=n,D=d,loss=loss')


def read(path, text, columns=COLUMNS, encoding='utf-8'):
  path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
  return read_points(path, columns)


def refused(path, text, columns=COLUMNS):
  with pytest.raises(ConfigError) as error:
    read(path, text, columns)
  assert '\n' not in str(error.value)
  return str(error.value).removeprefix(f'{path}: ')


def cells(n, d, loss, separator=','):
  """The rows with every number written by its function."""
  head = separator.join(('n', 'd', 'loss'))
  return '\n'.join([head, *(separator.join((n(a), d(b), loss(c))) for a, b, c in ROWS)]) + '\n'


def comma(value):
  return repr(value).replace('.', ',')


SAME = {
  'semicolons': PLAIN.replace(',', ';'),
  'tabs': PLAIN.replace(',', '\t'),
  'bars': PLAIN.replace(',', '|'),
  'decimal commas': cells('{:.0f}'.format, '{:.0f}'.format, comma, ';'),
  'decimal commas, quoted': cells('{:.0f}'.format, '{:.0f}'.format, lambda v: f'"{comma(v)}"'),
  'thousands': cells(lambda v: f'"{v:,.0f}"', lambda v: f'"{v:,.0f}"', repr),
  'underscores': cells('{:_.0f}'.format, '{:_.0f}'.format, repr),
  'Fortran': cells(lambda v: f'{v:E}'.replace('E', 'D'), lambda v: f'{v:e}'.replace('e', 'd'), repr),
  'suffixes': cells(lambda v: f'{v / 1e6:g}M', lambda v: f'{v / 1e9:g}b', repr),
  'units': cells(lambda v: f'{v / 1e3:g}k params', '{:.0f} tokens'.format, '{} nats'.format),
  'spaces': cells(' {:.0f} '.format, ' {:.0f}'.format, '{} '.format),
  'old Mac': PLAIN.replace('\n', '\r'),
  'Windows': PLAIN.replace('\n', '\r\n'),
  'comments': '# run of May\n\n#\n' + PLAIN,
  'surplus separators': PLAIN.replace('\n', ',,\n').replace('loss,,', 'loss'),
}


@pytest.mark.parametrize('kind', SAME)
def test_the_same_numbers_in_other_writing(tmp_path, kind):
  points = read(tmp_path / 'p.csv', SAME[kind])
  n, d, loss = np.array(ROWS).T
  np.testing.assert_array_equal(points.loss, loss)
  # log of the same float64: exact
  np.testing.assert_array_equal(points.log_x['N'], np.log(n))
  np.testing.assert_array_equal(points.log_x['D'], np.log(d))


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_byte_order_marks_name_the_encoding(tmp_path, encoding):
  np.testing.assert_array_equal(
    read(tmp_path / 'p.csv', PLAIN, encoding=encoding).loss, [row[2] for row in ROWS]
  )


@settings(derandomize=True, deadline=None)
@given(st.floats(1e-300, 1e300), st.sampled_from(['', '+']), st.sampled_from('eEdD'))
def test_every_float_is_read_to_the_last_bit(value, sign, letter):
  assert number(f' {sign}{value!r} '.replace('e', letter)) == value


@pytest.mark.parametrize(
  ('cell', 'value'),
  [
    ('1,500,000', 1.5e6),
    ('1_000', 1e3),
    ('5D+07', 5e7),
    ('1.5B', 1.5e9),
    ('70 b params', 7e10),
    ('2 TFLOPs', 2e12),
    ('.5k', 500),
    ('3.', 3),
    ('2.1 nats per token', 2.1),
    ('15 t', 1.5e13),
  ],
)
def test_a_number(cell, value):
  assert number(cell) == value


@pytest.mark.parametrize(
  'cell', ['1,50', '1,500B', '0x10', '1__0', '1.5 PF', '4.6 bits', '12 %', 'e5', '.', '1 2', 'T', '5-7', '１']
)
def test_no_number(cell):
  with pytest.raises(ValueError, match=r'.'):
    number(cell)


def test_a_format_is_no_failed_run(tmp_path):
  """Only what is missing, infinite or not positive is a failed run."""
  for cell, failed in (('nan', True), ('', True), ('-inf', True), ('0', True), ('-3', True), ('3;2', False)):
    words = refused(tmp_path / 'p.csv', PLAIN.replace('3.21', cell))
    assert words.startswith(f"line 3: loss (column 'loss') is {cell or 'empty'}")
    assert ('drop failed runs' in words) == failed and ('format' in words) != failed
  # In a file with points a comma groups thousands, which no loss has; without one it has two readings.
  assert 'two readings' in refused(tmp_path / 'p.csv', PLAIN.replace('3.21', '"3,210"'))


def test_lines_are_those_of_the_file(tmp_path):
  text = '# a\n\nn,d,loss,note\n\n8e6,4e8,3.5,"two\nlines"\n \n3e7,4e8,3.1,x\n9e7,4e8,2.9,y\n'
  assert read(tmp_path / 'p.csv', text).run.tolist() == [5, 8, 9]
  assert refused(tmp_path / 'p.csv', text.replace('2.9', 'nan')).startswith('line 9: loss')
  assert refused(tmp_path / 'p.csv', text + '1,2,3,4,5\n').startswith('line 10 has 5 cells and the header 4')


def test_labels_are_text_as_it_is_written(tmp_path):
  arms = ['None', 'NA', 'nan', '1', '1.0', 'null', '1e0', 'True']
  rows = [f'{8e6 * 2**k},4e8,{3.5 - 0.1 * k},{arm}' for k, arm in enumerate(arms)]
  points = read(
    tmp_path / 'p.csv',
    '\n'.join(['n,d,loss,arm', *rows]),
    COLUMNS | {'arm': 'arm'},
  )
  assert points.arms == tuple(arms)


def test_column_names(tmp_path):
  path = tmp_path / 'p.csv'
  quoted = parse_columns('N=n,loss="loss, val",D=d')
  assert quoted == {'N': 'n', 'loss': 'loss, val', 'D': 'd'}
  assert len(read(path, PLAIN.replace('loss', '"loss, val"'), quoted)) == 4
  words = refused(path, PLAIN.replace('n,d', 'n, d'))
  assert words.startswith("no column 'd' for D; the nearest is ' d' (case and spaces count)")
  assert "the nearest is 'Loss'" in refused(path, PLAIN.replace('loss', 'Loss'))
  twice = PLAIN.replace('\n', ',7\n').replace('loss,7', 'loss,d')
  assert refused(path, twice) == "columns 2 and 4 are both called 'd': rename one"
  assert len(read(path, twice, parse_columns('N=n,loss=loss'))) == 4  # unused
  with pytest.raises(ConfigError, match="column 'x' is given for N and for D"):
    parse_columns('N=x,D=x,loss=loss')


def test_what_a_file_is_not(tmp_path):
  path = tmp_path / 'p.csv'
  assert 'save it as UTF-8' in refused(path, PLAIN.encode('utf-16-le'))
  latin = PLAIN.replace('3.21', '3.21 µ').encode('latin-1')
  assert refused(path, latin) == 'line 3 is not UTF-8: save the file as UTF-8'
  assert 'must name the columns' in refused(path, PLAIN.removeprefix('n,d,loss\n'))
  assert 'not a CSV table' in refused(path, PLAIN + '"8e6,4e8,3')
  assert 'no rows' in refused(path, '# n,d,loss\n')
  assert 'may be a comma or a semicolon' in refused(path, 'n;d,loss\n1;2,3\n')
  # Where one of two separators cuts every row like the header, it is the one.
  assert len(read(path, PLAIN.replace('loss', 'loss;nats'), parse_columns('N=n,D=d,loss=loss;nats'))) == 4


@pytest.mark.parametrize('known', ['ND', 'NC', 'DC'])
def test_one_of_n_d_and_c_follows_from_the_others(tmp_path, known):
  lines = [','.join((*known, 'loss'))]
  for n, d, loss in ROWS:
    value = {'N': n, 'D': d, 'C': 6 * n * d}
    lines.append(','.join(repr(v) for v in (*(value[k] for k in known), loss)))
  columns = parse_columns(','.join(f'{k}={k}' for k in (*known, 'loss')))
  log_x = read(tmp_path / 'p.csv', '\n'.join(lines), columns).log_x
  for k, name in enumerate('ND'):
    # Sums of logs of size 40: some 2^-48.
    np.testing.assert_allclose(log_x[name], np.log([row[k] for row in ROWS]), rtol=1e-14)
  np.testing.assert_allclose(log_x['C'], np.log([6 * n * d for n, d, _ in ROWS]), rtol=1e-14)
