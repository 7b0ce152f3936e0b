"""The process of Weights & Biases, started by dashboards.py: lines of JSON in, one line out if it fails.

It imports nothing of the package. Where its input ends without a word, the run was killed; the next process
goes on under the same id.
"""

import json
import os
import sys


def main() -> int:
  """Serves until the input ends; returns the exit code."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what W&B prints goes nowhere
  try:
    serve()
  except Exception as error:
    print(f'{type(error).__name__}: {error}', file=answers, flush=True)
    return 1
  return 0


def serve() -> None:
  """Begins, feeds and ends runs as the lines of the input say."""
  import wandb

  runs = {}
  for line in sys.stdin:
    said = json.loads(line)
    if 'begin' in said:
      folder = None if 'WANDB_DIR' in os.environ else said['folder']
      names = {name: said[name] for name in ('project', 'name', 'group', 'config')}
      runs[said['begin']] = wandb.init(
        id=said['begin'], resume='allow', reinit='create_new', dir=folder, **names
      )
    elif 'row' in said:
      runs[said['row']].log(said['values'], step=said['step'])
    else:
      run = runs.pop(said['end'])
      run.summary['state'] = said['state']
      run.finish(exit_code=0 if said['state'] in ('finished', 'diverged') else 1)
  for run in runs.values():
    run.finish(exit_code=1)


if __name__ == '__main__':
  sys.exit(main())
