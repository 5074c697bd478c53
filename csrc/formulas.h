// Nonlinearities and gates of a FWM_NUMBER: a float (scalars.h), or several (cpu/wide.h). No
// include guard: included once per type. On a host the type brings choose, magnitude, signed_as and
// power_of_two.

// 1 / (1 + exp(-x)) and tanh(x). A GPU has them. On a CPU calls into the library take longer than
// what follows, which is nearly as exact (see exp_floored); sigmoid ends at 2e-38.
#ifdef __CUDACC__
FWM_HD FWM_NUMBER sigmoid(FWM_NUMBER x) { return 1.0f / (1.0f + expf(-x)); }

FWM_HD FWM_NUMBER tanh_gate(FWM_NUMBER x) { return tanhf(x); }
#else
// exp(x) for x up to 88; exp(-87) = 2e-38 below, NaN for NaN. Inlined, it costs a third of a call
// into libmvec. x / ln 2 = n + f: adding 1.5 * 2^23 rounds to the integer n and leaves n in the low
// bits, the polynomial is 2^f on |f| <= 1/2, fitted to the least largest relative error. Relative
// error below 2e-7 + 2e-8 |x|, without fused multiply-add 2e-7 + 6e-8 |x|: what x / ln 2 loses.
FWM_HD FWM_NUMBER exp_floored(FWM_NUMBER x) {
  const FWM_NUMBER clamped = choose(x < -87.0f, -87.0f, x);
  const FWM_NUMBER shifted = clamped * 1.44269504f + 12582912.0f;
  const FWM_NUMBER f = clamped * 1.44269504f - (shifted - 12582912.0f);
  FWM_NUMBER p = f * 1.32647261e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return p * power_of_two(shifted);
}

FWM_HD FWM_NUMBER sigmoid(FWM_NUMBER x) {
  const FWM_NUMBER e = exp_floored(-magnitude(x)), s = 1.0f / (1.0f + e);
  return choose(x < 0.0f, e * s, s);
}

// Near zero an odd polynomial, fitted to the least largest relative error: 1 - e would lose digits.
FWM_HD FWM_NUMBER tanh_gate(FWM_NUMBER x) {
  const FWM_NUMBER size = magnitude(x), e = exp_floored(size * -2.0f), z = x * x;
  const FWM_NUMBER large = signed_as((1.0f - e) / (1.0f + e), x);
  FWM_NUMBER p = z * -5.704959081e-3f + 2.063905974e-2f;
  p = p * z - 5.373970562e-2f;
  p = p * z + 1.333144207e-1f;
  p = p * z - 3.333328194e-1f;
  return choose(size < 0.625f, x + x * (z * p), large);
}
#endif

FWM_HD FWM_NUMBER silu(FWM_NUMBER x) { return x * sigmoid(x); }

// d silu(x) / dx
FWM_HD FWM_NUMBER silu_grad(FWM_NUMBER x) {
  const FWM_NUMBER s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// deter' of the block GRU from its three gates before their nonlinearities.
FWM_HD FWM_NUMBER gru_gate(FWM_NUMBER reset, FWM_NUMBER cand, FWM_NUMBER update, FWM_NUMBER deter) {
  const FWM_NUMBER u = sigmoid(update - 1.0f);
  return u * tanh_gate(sigmoid(reset) * cand) + (1.0f - u) * deter;
}

// Its backward: gradients of the three gates and of deter, from grad of deter'.
struct FWM_GRAD {
  FWM_NUMBER reset, cand, update, deter;
};

FWM_HD FWM_GRAD gru_gate_backward(FWM_NUMBER grad, FWM_NUMBER reset, FWM_NUMBER cand,
                                  FWM_NUMBER update, FWM_NUMBER deter) {
  const FWM_NUMBER r = sigmoid(reset), u = sigmoid(update - 1.0f), c = tanh_gate(r * cand);
  const FWM_NUMBER dc = grad * u * (1.0f - c * c);
  return {dc * cand * r * (1.0f - r), dc * r, grad * (c - deter) * u * (1.0f - u),
          grad * (1.0f - u)};
}
