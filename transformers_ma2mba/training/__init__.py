"""Training with the stock Trainer: parameter groups, whole checkpoints, resumed runs, finite numbers, what to log."""

from .answered_training import StopWithoutAnswers
from .finite_training import StopAtNonFinite
from .parameter_groups import parameter_groups
from .resumed_runs import CheckResumedRun
from .training_meter import TrainingMeter
from .whole_checkpoints import last_whole_checkpoint
