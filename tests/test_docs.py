"""README and docs/ tell the truth: commands and examples run, links and paths exist, the site is built."""

import importlib
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from documented import (
  CORPUS,
  INLINE,
  PAGES,
  ROOT,
  TINY,
  blocks,
  check_arguments,
  check_block,
  check_other,
  commands,
  run_mhc,
)
from test_constraints import check

from mhc_jax.config_file import override, parse
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.errors import ConfigError
from mhc_jax.evaluate import load

MARKDOWN = (*PAGES, 'CONTRIBUTING.md', 'CHANGELOG.md', 'experiments/LOG.md')
NOTEBOOKS = tuple(f'docs/notebooks/{path.name}' for path in (ROOT / 'docs' / 'notebooks').glob('*.ipynb'))
WITH_CODE = [page for page in (*PAGES, *NOTEBOOKS) if any(block.language != 'text' for block in blocks(page))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One for all pages: what one has trained, the next need not train again."""
  return tmp_path_factory.mktemp('documented')


@pytest.fixture
def run_page(monkeypatch, folder):
  """Runs a page in the folder and returns the names that its Python defined; `quick` has two small runs."""
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, **_: path.write_text('<svg/>'))
  draw = importlib.import_module('mhc_jax.analysis.figures.draw')
  monkeypatch.setattr(draw, 'write_png', lambda fig, path: path.write_text(''))
  monkeypatch.setattr('mhc_jax.config_file.parse', lambda path, given: parse(path, [*given, *TINY, CORPUS]))
  experiments = importlib.import_module('mhc_jax.experiments.planning').EXPERIMENTS
  arms = {config.arm: config for config in experiments['quick'](None)}
  monkeypatch.setitem(
    experiments, 'quick', lambda _: [smaller(arms[arm]) for arm in ('residual', 'identity')]
  )
  monkeypatch.chdir(folder)

  def smaller(config):
    config = config.copy_and_resolve_references()
    override(config, [*TINY, CORPUS])
    return config

  def run_line(words):
    if words[0] != 'mhc':
      return check_other(words)
    if words[1] in ('report', 'plots') and not (folder / 'runs' / 'quick').exists():
      run_mhc(['mhc', 'sweep', 'quick'])  # of another page
    return run_mhc(words)

  def run(page):
    names: dict = {}
    for block in blocks(page):
      if block.why:
        check_block(block.text)
      elif block.language == 'python':
        exec(block.text, names)
      elif block.language == 'sh':
        for words in commands(block.text):
          run_line(words)
    return names

  return run


@pytest.mark.slow
@pytest.mark.parametrize(
  'page', [page for page in WITH_CODE if page not in ('README.md', 'docs/own_constraint.md')]
)
def test_what_a_page_says_to_run_runs(page, run_page):
  run_page(page)


@pytest.mark.slow
def test_the_readme_runs_and_its_example_learns_to_mix(run_page):
  """The example in somebody's own model: at most 15 lines, right shapes, gradients for every parameter."""
  names = run_page('README.md')
  (code,) = [block.text for block in blocks('README.md') if block.language == 'python']
  assert len([line for line in code.splitlines() if line.strip()]) <= 15
  x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 64))
  assert names['forward'](names['params'], x_BTD).shape == (2, 5, 64)
  loss = lambda params: jnp.sum(names['forward'](params, x_BTD) ** 2)  # noqa: E731
  grads = jax.jit(jax.grad(loss))(names['params'])
  for name, grad in grads[1].items():
    assert jnp.isfinite(grad).all() and (grad != 0).any(), name


@pytest.mark.slow
def test_own_constraint_conforms_and_trains(run_page, folder, x64):
  """At most 25 lines; its claims hold; its run is named by its name and parameters."""
  with jax.enable_x64(False):
    names = run_page('docs/own_constraint.md')
  (code,) = [block.text for block in blocks('docs/own_constraint.md') if block.language == 'python']
  assert len(code.splitlines()) <= 25
  for n in (1, 2, 4):
    check(names['lazy_average'](), n)
  config = json.loads((folder / 'runs' / 'lazy' / 'config.json').read_text())
  assert config['model']['connection']['constraint'] == 'lazy_average'
  with jax.enable_x64(False):
    assert load('runs/lazy', names['lazy_average']())[2] == 2
    with pytest.raises(ConfigError, match='trained with the constraint lazy_average'):
      load('runs/lazy', CONSTRAINTS['circulant']())


@pytest.mark.parametrize('page', PAGES)
def test_blocks_have_languages_and_commands_in_lines_arguments(page):
  """So that no command is passed over: ```text is for what is none."""
  text = (ROOT / page).read_text()
  assert all(block.language in ('sh', 'python', 'text') for block in blocks(page))
  assert 2 * len(blocks(page)) == len(re.findall('^ *```', text, re.MULTILINE))
  for command in INLINE.findall(text.replace('\n', ' ')):
    check_arguments(command.split(), whole=False)


def slugs(text):
  """Anchors of the headings, as GitHub and the site make them."""
  prose = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
  heads = re.findall(r'^#+ (.+)$', prose, re.MULTILINE)
  return {re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', head.lower()).strip()) for head in heads}


@pytest.mark.parametrize('page', MARKDOWN)
def test_links_paths_and_modules_lead_somewhere(page):
  """Of README and CONTRIBUTING also the length."""
  text = (ROOT / page).read_text()
  for link in re.findall(r'\[[^\]]*\]\(([^)\s]+)\)', text):
    target, _, anchor = link.partition('#')
    if '://' in target:
      continue
    path = (ROOT / page).parent / target if target else ROOT / page
    assert path.exists(), link
    assert not anchor or anchor in slugs(path.read_text()), link
  if page in ('CHANGELOG.md', 'experiments/LOG.md'):
    return  # of what was
  for path in re.findall(r'\b(?:mhc_jax|configs|experiments|analysis|docs|tests|examples)/[\w./-]*\w', text):
    assert (ROOT / path.rstrip('.')).exists(), path
  for module in re.findall(r'python -m (?!pytest)(?=tests|mhc_jax|experiments|analysis)([\w.]+)', text):
    path = ROOT / module.replace('.', '/')
    assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), module
  assert len(text.splitlines()) <= {'README.md': 130, 'CONTRIBUTING.md': 120, 'docs/results.md': 360}.get(
    page, 200
  )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  """Every page is in the navigation, every link and docstring leads somewhere, no reader fetches anything."""
  pytest.importorskip('mkdocs')
  build = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
  answer = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert answer.returncode == 0, answer.stdout + answer.stderr
  for page in tmp_path.rglob('*.html'):
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?://[^" >]+)', page.read_text())
    assert not fetched, (page, fetched)
