"""Sparse and structured fine-tuning of language models in JAX.

Every method is an optax gradient transformation: `tx = js.gasdu(optax.adam(1e-4), density=1e-4)`.
"""

from jaxsparse.common.errors import InputError as InputError
from jaxsparse.engine.reference import SubspaceState as SubspaceState
from jaxsparse.methods import fixed_mask as fixed_mask
from jaxsparse.methods import gasdu as gasdu
from jaxsparse.select.schedules import adaptive as adaptive
from jaxsparse.subspaces.targets import Target as Target
