"""The public kernels of fastwm: they need PyTorch and nothing else."""

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

__all__ = [
    "RSSMWeights",
    "gru_step",
    "gru_step_ref",
    "rssm_imagine",
    "rssm_imagine_ref",
    "rssm_observe",
    "rssm_observe_ref",
    "rssm_prior",
    "rssm_prior_ref",
]
