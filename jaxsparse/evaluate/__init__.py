"""How good a model is: held-out loss, perplexity, exact match."""

from jaxsparse.evaluate.answers import extract_number as extract_number
from jaxsparse.evaluate.answers import is_correct as is_correct
from jaxsparse.evaluate.held_out import HeldOut as HeldOut
from jaxsparse.evaluate.held_out import Measurement as Measurement
from jaxsparse.evaluate.held_out import encode_held_out as encode_held_out
from jaxsparse.evaluate.held_out import measure as measure
