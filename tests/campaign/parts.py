"""The parts of the campaign and how many trials each has."""

from tests.campaign import damaged, disks, inputs, kills, leaks, peers, races, readers, reports
from tests.campaign.damaged import trials_of
from tests.campaign.trials import Part

PARTS: dict[str, Part] = {
  'kills': Part('signals to a training, from its start to its last cleanup', 18, 2000, kills.trial),
  'peers': Part('one of two processes killed, stopped or signalled', 10, 2000, peers.trial),
  'missing peers': Part('one of two processes that never comes', 4, 300, peers.missing),
  'training': Part('damages of a run folder, then training again', 12, 600, trials_of(damaged.train_again)),
  'checkpoints': Part('damages of a checkpoint, then restoring', 10, 600, trials_of(damaged.checkpoints)),
  'corpus': Part('damages of a prepared corpus, then loading it', 12, 600, trials_of(damaged.corpus)),
  'evaluation': Part('damages of a finished run, then evaluating', 6, 600, trials_of(damaged.evaluated)),
  'sweep': Part('damages of a sweep, then planning and doing it', 6, 600, trials_of(damaged.swept)),
  'reports': Part(
    'damages and hostile values of a sweep, then reporting', 8, 900, trials_of(reports.reported)
  ),
  'disks': Part('full disks, under the run, the corpus or the log', 10, 900, disks.trial),
  'preparations': Part('two preparations of one corpus, one killed', 16, 300, races.preparations),
  'trainings': Part('two trainings of one run, one killed', 6, 900, races.trainings),
  'sweeps': Part('two sweeps into one folder, one killed', 4, 1500, races.sweeps),
  'readers': Part('reads beside a training that saves at every update', 3, 900, readers.trial),
  'overrides': Part('overrides, odd and plausible, resolved', 20, 900, inputs.overrides),
  'combinations': Part('combinations of fields, trained', 20, 300, inputs.runs),
  'command lines': Part('command lines with odd arguments', 12, 900, inputs.lines),
  'runs': Part('runs in one process: memory, files and threads', 1, 2000, leaks.runs),
  'updates': Part('updates of one run: memory, files and threads', 1, 2000, leaks.updates),
}
