"""Where a weight may move: targets, budgets, and the units that matrices are cut into."""

from jaxsparse.subspaces.blocks import Blocks as Blocks
from jaxsparse.subspaces.budgets import Budget as Budget
from jaxsparse.subspaces.coupled import CoupledSlices as CoupledSlices
from jaxsparse.subspaces.units import Coordinates as Coordinates
from jaxsparse.subspaces.units import Everything as Everything
from jaxsparse.subspaces.units import Neurons as Neurons
from jaxsparse.subspaces.units import Slices as Slices
