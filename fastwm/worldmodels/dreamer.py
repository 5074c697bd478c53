"""The DreamerV3 world model: encoder, RSSM, decoder, reward and continue heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastwm import ops
from fastwm.distributions import bernoulli_loss, multi_categorical_loss, symlog_mse
from fastwm.nets import Decoder, Encoder, Head, one_hot_encode
from fastwm.rssm import RSSM, feat
from fastwm.spaces import Space


class Posterior(NamedTuple):
    """What `observe` found: deter (B, T, D), logits (B, T, S, K), stoch (B, T, S, K)."""

    deter: Tensor
    logits: Tensor
    stoch: Tensor


class WorldModel(nn.Module):
    """Learns from replay windows; `losses` returns one (B, T) tensor per term.

    discount: factor folded into the target of the continue head (1 to leave it out).
    """

    image_loss = staticmethod(ops.image_loss)  # of what the decoder gives, against bytes

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
        discount: float,
    ) -> None:
        super().__init__()
        self.obs_space, self.act_space = dict(obs_space), act_space
        self.free_nats, self.discount = free_nats, discount
        self.encoder = Encoder(obs_space, **encoder)
        self.rssm = RSSM(self.encoder.out_features, act_space.encoded_size, **rssm)
        self.decoder = Decoder(obs_space, self.rssm.deter, self.rssm.latent_size, **decoder)
        self.reward = Head(self.rssm.feat_size, bins, **reward)
        self.cont = Head(self.rssm.feat_size, 1, **cont)
        self.register_buffer("reward_bins", ops.symexp_bins(bins), persistent=False)

    def encode_action(self, action: Tensor) -> Tensor:  # (B, T, *shape) -> (B, T, A)
        """What the environment took, as the networks read it."""
        if self.act_space.kind == "discrete":
            return one_hot_encode(action, self.act_space.classes, 2)
        return action.float()

    def observe(self, batch: dict[str, Tensor], noise: Tensor | None) -> tuple[Tensor, Posterior]:
        """Tokens (B, T, E) and the posterior of a replay batch (see fastwm.replay)."""
        tokens = self.encoder(batch)
        deter, stoch, is_first = self.start(batch)
        action = self.encode_action(batch["prev_action"])
        return tokens, Posterior(*self.rssm.observe(deter, stoch, tokens, action, is_first, noise))

    def start(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The state (B, D), (B, S, K) before the first row, and which rows reset it (B, T)."""
        return batch["deter"].float(), self.rssm.one_hot(batch["stoch"]), batch["is_first"]

    def losses(self, batch: dict[str, Tensor], post: Posterior) -> tuple[dict, dict]:
        """World-model losses by name, each (B, T), and metrics."""
        features = feat(post.deter, post.stoch)
        losses, metrics = self.kl_losses(post)
        losses["rew"] = ops.twohot_loss(
            self.reward.logits(features), batch["reward"], self.reward_bins
        )
        alive = 1.0 - batch["is_terminal"].float()
        losses["con"] = bernoulli_loss(self.cont(features).squeeze(-1), alive * self.discount)
        recon = self.decoder(post.deter, post.stoch.flatten(-2), squash=False)
        losses.update(self.recon_losses(recon, batch))
        return losses, metrics

    def kl_losses(self, post: Posterior) -> tuple[dict, dict]:
        prior = self.rssm.prior_logits(post.deter)
        dyn, rep, post_entropy, prior_entropy = ops.kl_balance(
            post.logits, prior, self.rssm.unimix, self.free_nats
        )
        metrics = {"dyn_ent": prior_entropy.mean(), "rep_ent": post_entropy.mean()}
        return {"dyn": dyn, "rep": rep}, metrics

    def recon_losses(self, recon: dict[str, Tensor], batch: dict[str, Tensor]) -> dict:
        losses = {}
        for key, space in self.obs_space.items():
            if key not in recon:  # decoder.cnn_keys and mlp_keys leave it out
                continue
            if space.kind == "image":
                loss = self.image_loss(recon[key], batch[key])
            elif space.kind == "discrete":
                loss = multi_categorical_loss(recon[key], batch[key], space.classes)
            else:
                loss = symlog_mse(recon[key], batch[key], len(space.shape))
            losses[f"recon/{key}"] = loss
        return losses

    @torch.no_grad()
    def open_loop(
        self, batch: dict[str, Tensor], context: int, noise: Tensor, imag_noise: Tensor
    ) -> dict[str, Tensor]:
        """Reconstruct `context` rows, then predict the rest from actions alone.

        Returns images (B, T, H, W, C) in [0, 1] by key. noise (B, context, S) and imag_noise
        (T - context, B, S) are uniform.
        """
        seen = {key: value[:, :context] for key, value in batch.items() if value.dim() > 1}
        seen |= {key: batch[key] for key in ("deter", "stoch") if key in batch}
        _, post = self.observe(seen, noise)
        actions = self.encode_action(batch["prev_action"])[:, context:]
        steps = iter([*actions.unbind(1), torch.zeros_like(actions[:, 0])])
        features, _ = self.rssm.imagine(
            post.deter[:, -1],
            post.stoch[:, -1],
            lambda features: next(steps),
            actions.shape[1],
            imag_noise,
        )
        deter, stoch = self.rssm.split(features[:, 1:])
        deter = torch.cat([post.deter, deter], 1)
        stoch = torch.cat([post.stoch, stoch], 1)
        recon = self.decoder(deter, stoch.flatten(-2))
        return {key: recon[key] for key in self.decoder.image_keys}
