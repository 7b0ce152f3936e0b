"""Lines per folder, lengths of functions, and what has grown long: a report, never a failure.

A long file or function is to be cut where a subject ends, or left whole where it is one subject.
"""

import ast
import statistics
from pathlib import Path

LONG_FILE, LONG_FUNCTION = 400, 60  # lines
FOLDERS = ('mhc_jax', 'experiments', 'analysis', 'configs', 'tests')


def functions(path: Path) -> list[tuple[int, str]]:
  """(lines without those of functions inside it, name) of every function of a file."""
  lengths = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      inner = (child for child in node.body if isinstance(child, ast.FunctionDef))
      inside = sum(child.end_lineno - child.lineno for child in inner)
      lengths.append((node.end_lineno - node.lineno + 1 - inside, node.name))
  return lengths


def main() -> None:
  """Prints a row per folder, then a line for everything long."""
  print(f'{"":12} {"files":>5} {"lines":>6} {"functions":>9} {"median":>6} {"p90":>4} {"max":>4}')
  long = []
  for folder in FOLDERS:
    paths = sorted(Path(folder).rglob('*.py'))
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    lengths = sorted(length for path in paths for length, _ in functions(path))
    row = len(lengths), statistics.median(lengths), lengths[int(0.9 * len(lengths))], lengths[-1]
    print(f'{folder:12} {len(paths):5} {sum(lines.values()):6} {row[0]:9} {row[1]:6g} {row[2]:4} {row[3]:4}')
    long += [f'{path}: {count} lines' for path, count in lines.items() if count > LONG_FILE]
    long += [f'{p}: {name} has {n} lines' for p in paths for n, name in functions(p) if n > LONG_FUNCTION]
  print(*(f'long: {line}' for line in long), sep='\n')


if __name__ == '__main__':
  main()
