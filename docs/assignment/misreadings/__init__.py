"""Likely misreadings, each as a change of the reference: a mutant.

Where a student's value is off, every mutant of the step is run on the same input. One that gives exactly the student's value
tells what the student has understood.
"""

from docs.assignment.misreadings.batch_norm import BATCH_NORM, BATCH_NORM_GRADIENT
from docs.assignment.misreadings.cell import CELL, CELL_GRADIENT
from docs.assignment.misreadings.convolutions import CONV1X1, CONVOLUTION_GRADIENTS, DEPTHWISE, SEPARABLE
from docs.assignment.misreadings.loss import LOSS, LOSS_GRADIENT
from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.misreadings.pooling import POOLING, POOLING_GRADIENT
from docs.assignment.misreadings.project import PROJECT, PROJECT_GRADIENT
from docs.assignment.misreadings.resize import RESIZE, RESIZE_GRADIENT
from docs.assignment.misreadings.score import SCORE
from docs.assignment.misreadings.statistics import STATISTICS

MISREADINGS: tuple[Misreading, ...] = (
    *BATCH_NORM,
    *CONV1X1,
    *DEPTHWISE,
    *SEPARABLE,
    *RESIZE,
    *POOLING,
    *PROJECT,
    *CELL,
    *LOSS,
    *SCORE,
    *BATCH_NORM_GRADIENT,
    *CONVOLUTION_GRADIENTS,
    *RESIZE_GRADIENT,
    *POOLING_GRADIENT,
    *PROJECT_GRADIENT,
    *LOSS_GRADIENT,
    *CELL_GRADIENT,
    *STATISTICS,
)
