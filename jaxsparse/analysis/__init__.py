"""What the papers look at in a run or a model: retention, the PL condition, intruders, landscapes, gaps and bounds.

Pure functions over arrays and parameter trees that return numbers; pictures are the experiments' business.
"""

from jaxsparse.analysis.bounds import base_bound as base_bound
from jaxsparse.analysis.bounds import correction_terms as correction_terms
from jaxsparse.analysis.bounds import generalisation_bound as generalisation_bound
from jaxsparse.analysis.bounds import update_bound as update_bound
from jaxsparse.analysis.gap import generalisation_gap as generalisation_gap
from jaxsparse.analysis.intruders import intruder_dimensions as intruder_dimensions
from jaxsparse.analysis.landscape import filter_normalise as filter_normalise
from jaxsparse.analysis.landscape import loss_grid as loss_grid
from jaxsparse.analysis.landscape import path_plane as path_plane
from jaxsparse.analysis.landscape import project_path as project_path
from jaxsparse.analysis.landscape import random_plane as random_plane
from jaxsparse.analysis.landscape import sharpness as sharpness
from jaxsparse.analysis.pl_fit import fit_pl as fit_pl
from jaxsparse.analysis.retention import measure_retention as measure_retention
from jaxsparse.analysis.retention import moving_average as moving_average
from jaxsparse.analysis.retention import reuse_bound as reuse_bound
from jaxsparse.analysis.retention import summarise_retention as summarise_retention
from jaxsparse.analysis.statistics import bootstrap_interval as bootstrap_interval
from jaxsparse.analysis.statistics import compare_rows as compare_rows
from jaxsparse.analysis.statistics import compare_seeds as compare_seeds
from jaxsparse.analysis.statistics import spread as spread
