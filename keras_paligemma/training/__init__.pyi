from .checkpoint import RunCheckpoint as RunCheckpoint
from .checkpoint import fit as fit
from .objects import EvaluateObjects as EvaluateObjects
from .run import finetune as finetune
from .samples import SamplePredictions as SamplePredictions
from .settings import Settings as Settings
