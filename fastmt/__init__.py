"""fastmt: fast mean-teacher training of dense prediction."""

from fastmt import decays, perturb, posthoc, schedules, style
from fastmt.backends import backend, explain
from fastmt.captured import CapturedStep
from fastmt.confidence import softmax_confidence
from fastmt.consistency import ConsistencyLoss, consistency_loss
from fastmt.cross_entropy import CrossEntropy, cross_entropy
from fastmt.doctor import doctor
from fastmt.ema import ema_update_
from fastmt.reference import Confidence, ConsistencyStats
from fastmt.segment import segment
from fastmt.teacher import EMATeacher, update_together
from fastmt.trainer import MeanTeacher, StepReport

__version__ = "0.1.0"

__all__ = [
    "CapturedStep",
    "Confidence",
    "ConsistencyLoss",
    "ConsistencyStats",
    "CrossEntropy",
    "EMATeacher",
    "MeanTeacher",
    "StepReport",
    "backend",
    "consistency_loss",
    "cross_entropy",
    "decays",
    "doctor",
    "ema_update_",
    "explain",
    "perturb",
    "posthoc",
    "schedules",
    "segment",
    "softmax_confidence",
    "style",
    "update_together",
]
