"""The DreamerV3 world model of 2023: the same losses on other networks, see fastwm.rssm_2023."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastwm import ops
from fastwm.distributions import bernoulli_loss, image_mse
from fastwm.nets_2023 import Decoder, Encoder, Head
from fastwm.rssm import feat
from fastwm.rssm_2023 import RSSM
from fastwm.spaces import Space
from fastwm.worldmodels.dreamer import Posterior, WorldModel


class WorldModel2023(WorldModel):
    """Learns from replay windows, each from the learned initial state on.

    grad_heads: those of decoder, reward and cont whose losses reach the state; the others learn
    from a detached one.
    """

    image_loss = staticmethod(image_mse)  # this decoder gives images, not logits

    def __init__(
        self,
        obs_space: dict[str, Space],
        act_space: Space,
        *,
        encoder: dict,
        decoder: dict,
        rssm: dict,
        reward: dict,
        cont: dict,
        free_nats: float,
        bins: int,
        grad_heads: tuple[str, ...],
    ) -> None:
        nn.Module.__init__(self)
        self.obs_space, self.act_space = dict(obs_space), act_space
        self.free_nats, self.grad_heads = free_nats, grad_heads
        self.encoder = Encoder(obs_space, **encoder)
        self.rssm = RSSM(self.encoder.out_features, act_space.encoded_size, **rssm)
        self.decoder = Decoder(obs_space, self.rssm.feat_size, **decoder)
        self.reward = Head(self.rssm.feat_size, bins, **reward)
        self.cont = Head(self.rssm.feat_size, 1, **cont)
        self.register_buffer("reward_bins", ops.symlog_bins(bins), persistent=False)

    def start(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Every window begins at the initial state: no latents are stored."""
        is_first = batch["is_first"].clone()
        is_first[:, 0] = True
        return *self.rssm.initial(len(is_first)), is_first

    def losses(self, batch: dict[str, Tensor], post: Posterior) -> tuple[dict, dict]:
        """World-model losses by name, each (B, T), and metrics."""
        losses, metrics = self.kl_losses(post)

        def seen(head: str, x: Tensor) -> Tensor:
            return x if head in self.grad_heads else x.detach()

        features = feat(post.deter, post.stoch)
        logits = self.reward(seen("reward", features))
        losses["rew"] = ops.twohot_loss(logits, batch["reward"], self.reward_bins, squash=True)
        alive = 1.0 - batch["is_terminal"].float()
        losses["con"] = bernoulli_loss(self.cont(seen("cont", features)).squeeze(-1), alive)
        recon = self.decoder(*(seen("decoder", x) for x in (post.deter, post.stoch.flatten(-2))))
        losses.update(self.recon_losses(recon, batch))
        return losses, metrics

    def kl_losses(self, post: Posterior) -> tuple[dict, dict]:
        prior = self.rssm.prior_logits(post.deter)
        dyn, rep, post_entropy, prior_entropy = self.rssm.latent.kl(
            post.logits, prior, self.free_nats
        )
        metrics = {"dyn_ent": prior_entropy.mean(), "rep_ent": post_entropy.mean()}
        return {"dyn": dyn, "rep": rep}, metrics

    def reward_mean(self, features: Tensor) -> Tensor:  # (..., F) -> (...)
        return ops.twohot_mean(self.reward(features), self.reward_bins, squash=True)

    def cont_mean(self, features: Tensor) -> Tensor:  # (..., F) -> (...)
        return torch.sigmoid(self.cont(features).squeeze(-1))
