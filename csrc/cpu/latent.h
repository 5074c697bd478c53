// Categorical latents: plain pointers and sizes, see kernels.h. A "group" is one categorical
// distribution over K classes; p = (1 - unimix) softmax(logits) + unimix / K.
#pragma once

#include <stdint.h>

namespace fastwm {

constexpr int64_t kMaxClasses = 1024;  // the kernels keep a group on the stack
constexpr int64_t kTileClasses = 64;   // up to here kl_balance takes sixteen groups side by side

enum class Noise { kNone, kUniform, kGumbel };

struct LatentSample {
  const float* logits;  // (G, K)
  const float* noise;   // kUniform: (G), kGumbel: (G, K), kNone: null
  Noise kind;
  int64_t classes;  // K
  float unimix;
};
// index (G), log_probs (G, K); [begin, end) are groups
void latent_sample(const LatentSample& a, uint8_t* index, float* log_probs, int64_t begin,
                   int64_t end);
void latent_sample(const LatentSample& a, int64_t* index, float* log_probs, int64_t begin,
                   int64_t end);

// out (G, K) = 1 where the class is index (G), else 0
void one_hot(const uint8_t* index, float* out, int64_t classes, int64_t begin, int64_t end);
void one_hot(const int64_t* index, float* out, int64_t classes, int64_t begin, int64_t end);

// Gradient of p (of log p if `log`) with respect to the logits, times grad (G, K).
struct LatentBackward {
  const float* grad;    // (G, K)
  const float* logits;  // (G, K)
  int64_t classes;
  float unimix;
  bool log;
};
void latent_backward(const LatentBackward& a, float* grad_logits, int64_t begin, int64_t end);

// kl_balance: rows of S groups; [begin, end) are rows.
struct KlBalance {
  const float* post;   // (N, S, K)
  const float* prior;  // (N, S, K)
  int64_t groups;      // S
  int64_t classes;     // K
  float unimix;
  float free_nats;
};
struct KlOutputs {
  float *dyn, *rep, *post_entropy, *prior_entropy;  // (N) each
  float* slope_post;   // (N, S, K): d rep / d post, or null
  float* slope_prior;  // (N, S, K): d dyn / d prior, or null
};
void kl_balance(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end);
void kl_tiles(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end);

// out (N, M) = factor (N) * x (N, M)
void scale_rows(const float* factor, const float* x, float* out, int64_t columns, int64_t begin,
                int64_t end);

}  // namespace fastwm
