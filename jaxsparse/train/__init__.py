"""The training loop: configuration, steps, metrics, checkpoints, report."""

from jaxsparse.train.config import FinetuneConfig as FinetuneConfig
from jaxsparse.train.finetune import finetune as finetune
from jaxsparse.train.report import Report as Report
