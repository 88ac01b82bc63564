"""Which units are picked, when, and what becomes of the optimizer's state: scores, schedules, carry."""

from jaxsparse.select.schedules import Every as Every
from jaxsparse.select.schedules import Once as Once
from jaxsparse.select.scores import ACTIVATION as ACTIVATION
from jaxsparse.select.scores import CIRCULANT as CIRCULANT
from jaxsparse.select.scores import FIRST as FIRST
from jaxsparse.select.scores import GRADIENT as GRADIENT
from jaxsparse.select.scores import RANDOM as RANDOM
from jaxsparse.select.scores import RANDOM_WINDOW as RANDOM_WINDOW
from jaxsparse.select.scores import SIGNED_GRADIENT as SIGNED_GRADIENT
from jaxsparse.select.scores import WEIGHT as WEIGHT
from jaxsparse.select.scores import WEIGHT_ACTIVATION as WEIGHT_ACTIVATION
from jaxsparse.select.scores import Score as Score
from jaxsparse.select.scores import gradient_over_weight as gradient_over_weight
from jaxsparse.select.scores import product as product
from jaxsparse.select.scores import smallest as smallest
