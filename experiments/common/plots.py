"""How the plots of all experiments are drawn: without a display, in one style."""

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from tiltjax.align.evaluation import STYLE

__all__ = ["STYLE", "plt"]
