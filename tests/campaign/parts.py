"""The parts of the campaign and how many trials each has."""

from tests.campaign import damaged, inputs, kills, reports
from tests.campaign.trials import Part

PARTS: dict[str, Part] = {
  'kills': Part('signals to a training process, from its start to its last cleanup', 14, 2000, kills.trial),
  'training': Part('damages of a run folder, then training again', 12, 600, damaged.trials_of(damaged.train_again)),
  'checkpoints': Part('damages of a checkpoint, then restoring', 10, 600, damaged.trials_of(damaged.checkpoints)),
  'corpus': Part('damages of a prepared corpus, then loading it', 10, 600, damaged.trials_of(damaged.corpus)),
  'evaluation': Part('damages of a finished run, then evaluating', 6, 600, damaged.trials_of(damaged.evaluated)),
  'sweep': Part('damages of a sweep, then planning and doing it again', 6, 600, damaged.trials_of(damaged.swept)),
  'reports': Part('damages of a sweep and hostile values in it, then reporting', 10, 900, damaged.trials_of(reports.reported)),
  'overrides': Part('overrides, odd and plausible, resolved', 22, 900, inputs.overrides),
  'combinations': Part('combinations of fields, trained', 24, 300, inputs.runs),
  'command lines': Part('command lines with odd arguments', 12, 900, inputs.lines),
}
