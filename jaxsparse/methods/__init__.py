"""A file per paper; every method is four choices."""

from jaxsparse.methods.gasdu import fixed_mask as fixed_mask
from jaxsparse.methods.gasdu import gasdu as gasdu
