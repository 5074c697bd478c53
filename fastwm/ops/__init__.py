"""The public kernel API, which needs PyTorch and nothing else.

Every op takes CPU or CUDA tensors and equals its plain PyTorch `*_ref` beside it.
"""

from fastwm.ops._backend import available, backend_info, use_backend
from fastwm.ops._rssm_layernorm import gru_step_layernorm, gru_step_layernorm_ref
from fastwm.ops.gather import gather_windows, gather_windows_ref
from fastwm.ops.gmm import gmm_nll, gmm_nll_ref
from fastwm.ops.image import image_loss, image_loss_ref
from fastwm.ops.lambda_return import lambda_return, lambda_return_ref
from fastwm.ops.latent import (
    kl_balance,
    kl_balance_ref,
    latent_sample,
    latent_sample_ref,
    straight_through,
    straight_through_ref,
)
from fastwm.ops.mlp import (
    PackedMLP,
    SparseLinear,
    mlp,
    mlp_ref,
    packed_mlp,
    sparse_linear,
    sparse_linear_ref,
    sparse_weight_grad,
)
from fastwm.ops.norm import rms_silu, rms_silu_ref
from fastwm.ops.optim import (
    Copies,
    adam_,
    adam_ref_,
    ema_,
    ema_ref_,
    laprop_agc_,
    laprop_agc_ref_,
)
from fastwm.ops.pool import conv_pool_silu, conv_pool_silu_ref, pool_silu, pool_silu_ref
from fastwm.ops.rssm import (
    RSSMWeights,
    gru_step,
    gru_step_ref,
    rssm_imagine,
    rssm_imagine_ref,
    rssm_observe,
    rssm_observe_ref,
    rssm_prior,
    rssm_prior_ref,
)
from fastwm.ops.twohot import (
    LinearLogits,
    symexp,
    symexp_bins,
    symlog,
    symlog_bins,
    twohot_loss,
    twohot_loss_linear,
    twohot_loss_linear_ref,
    twohot_loss_ref,
    twohot_mean,
    twohot_mean_linear,
    twohot_mean_linear_ref,
    twohot_mean_ref,
)
from fastwm.ops.upconv import (
    upsample_conv2d,
    upsample_conv2d_ref,
    upsample_conv2d_silu,
    upsample_conv2d_silu_ref,
)

__all__ = [
    "Copies",
    "LinearLogits",
    "PackedMLP",
    "RSSMWeights",
    "SparseLinear",
    "adam_",
    "adam_ref_",
    "available",
    "backend_info",
    "conv_pool_silu",
    "conv_pool_silu_ref",
    "ema_",
    "ema_ref_",
    "gather_windows",
    "gather_windows_ref",
    "gmm_nll",
    "gmm_nll_ref",
    "gru_step",
    "gru_step_layernorm",
    "gru_step_layernorm_ref",
    "gru_step_ref",
    "image_loss",
    "image_loss_ref",
    "kl_balance",
    "kl_balance_ref",
    "lambda_return",
    "lambda_return_ref",
    "laprop_agc_",
    "laprop_agc_ref_",
    "latent_sample",
    "latent_sample_ref",
    "mlp",
    "mlp_ref",
    "packed_mlp",
    "pool_silu",
    "pool_silu_ref",
    "rms_silu",
    "rms_silu_ref",
    "rssm_imagine",
    "rssm_imagine_ref",
    "rssm_observe",
    "rssm_observe_ref",
    "rssm_prior",
    "rssm_prior_ref",
    "sparse_linear",
    "sparse_linear_ref",
    "sparse_weight_grad",
    "straight_through",
    "straight_through_ref",
    "symexp",
    "symexp_bins",
    "symlog",
    "symlog_bins",
    "twohot_loss",
    "twohot_loss_linear",
    "twohot_loss_linear_ref",
    "twohot_loss_ref",
    "twohot_mean",
    "twohot_mean_linear",
    "twohot_mean_linear_ref",
    "twohot_mean_ref",
    "upsample_conv2d",
    "upsample_conv2d_ref",
    "upsample_conv2d_silu",
    "upsample_conv2d_silu_ref",
    "use_backend",
]
