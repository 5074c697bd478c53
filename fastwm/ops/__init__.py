"""The public kernels of fastwm: they need PyTorch and nothing else."""

from fastwm.ops.latent import (
    kl_balance,
    kl_balance_ref,
    latent_sample,
    latent_sample_ref,
    straight_through,
    straight_through_ref,
)
from fastwm.ops.norm import rms_silu, rms_silu_ref
from fastwm.ops.optim import ema_, ema_ref_, laprop_agc_, laprop_agc_ref_
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
    symexp,
    symexp_bins,
    symlog,
    twohot_loss,
    twohot_loss_ref,
    twohot_mean,
    twohot_mean_ref,
)
from fastwm.ops.upconv import upsample_conv2d, upsample_conv2d_ref

__all__ = [
    "RSSMWeights",
    "ema_",
    "ema_ref_",
    "gru_step",
    "gru_step_ref",
    "kl_balance",
    "kl_balance_ref",
    "laprop_agc_",
    "laprop_agc_ref_",
    "latent_sample",
    "latent_sample_ref",
    "rms_silu",
    "rms_silu_ref",
    "rssm_imagine",
    "rssm_imagine_ref",
    "rssm_observe",
    "rssm_observe_ref",
    "rssm_prior",
    "rssm_prior_ref",
    "straight_through",
    "straight_through_ref",
    "symexp",
    "symexp_bins",
    "symlog",
    "twohot_loss",
    "twohot_loss_ref",
    "twohot_mean",
    "twohot_mean_ref",
    "upsample_conv2d",
    "upsample_conv2d_ref",
]
