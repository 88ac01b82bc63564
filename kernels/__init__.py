"""Operations on sparse subspaces that depend on jax and jaxtyping alone; the fused engine calls them.

An op is a folder: `op.py` checks arguments and chooses an implementation, `reference.py` is plain XLA, `pallas_gpu.py`
and `pallas_tpu.py` are kernels.
"""

from jaxsparse.kernels.adapter_matmul.op import adapter_matmul as adapter_matmul
from jaxsparse.kernels.adapter_matmul.op import adapter_slices_matmul as adapter_slices_matmul
from jaxsparse.kernels.block_topk.op import TopK as TopK
from jaxsparse.kernels.block_topk.op import block_topk as block_topk
from jaxsparse.kernels.gather_matmul.op import gather_matmul as gather_matmul
from jaxsparse.kernels.gradient_topk.op import GradientTopK as GradientTopK
from jaxsparse.kernels.gradient_topk.op import gradient_topk as gradient_topk
from jaxsparse.kernels.sampled_matmul.op import sampled_matmul as sampled_matmul
from jaxsparse.kernels.scatter_add_unique.op import scatter_add_unique as scatter_add_unique
from jaxsparse.kernels.scatter_add_unique.op import scatter_unique as scatter_unique
from jaxsparse.kernels.sketched_energy.op import sketched_energy as sketched_energy
