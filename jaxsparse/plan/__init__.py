"""What a step costs on a device that is not here, by real compilation for it."""

from jaxsparse.plan.absent import Plan as Plan
from jaxsparse.plan.absent import compile_for as compile_for
