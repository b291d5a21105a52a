// The bf16 kernels of csrc/cpu that multiply pairs, built with emulated dot products so that any machine runs them.
// Tensors are dense; numbers: B, Hq, Hkv, Tq, Tk, D, Dv, window_left, window_right.
#include "seqfuse/attention.h"
#include "seqfuse/linear.h"

namespace seqfuse {

namespace emulated {
void attention_forward(const AttentionForward&, const Parallel&);
void attention_backward(const AttentionBackward&, const Parallel&);
void linear_forward(const LinearForward&, const Parallel&);
}  // namespace emulated

// Two workers, one after the other.
static const Parallel workers{[](int64_t n, Parallel::Body body, void* ctx) {
                                for (int64_t i = 0; i < n; i++) body(ctx, i, i + 1);
                              },
                              2, false};

static HeadsView heads(void* data, int64_t H, int64_t T, int64_t D) {
  return {data, H * T * D, T * D, D};
}

template <class Args>
static Args problem(const int64_t* n, float scale, float softcap, const int64_t* seed, double dropout_p,
                    void* const* t) {
  Args a{};
  a.dtype = a.bias_dtype = DType::bf16;
  a.B = a.sequences = n[0], a.Hq = n[1], a.Hkv = n[2], a.Tq = n[3], a.Tk = n[4], a.D = n[5], a.Dv = n[6];
  a.window_left = n[7], a.window_right = n[8];
  a.scale = scale, a.softcap = softcap, a.seed = seed, a.dropout_p = dropout_p;
  a.q = heads(t[0], a.Hq, a.Tq, a.D), a.k = heads(t[1], a.Hkv, a.Tk, a.D), a.v = heads(t[2], a.Hkv, a.Tk, a.Dv);
  a.out = heads(t[3], a.Hq, a.Tq, a.Dv);
  return a;
}

}  // namespace seqfuse

using namespace seqfuse;

// tensors: q, k, v, out, lse
extern "C" void attention_forward(const int64_t* n, float scale, float softcap, const int64_t* seed, double dropout_p,
                                  void* const* tensors) {
  AttentionForward a = problem<AttentionForward>(n, scale, softcap, seed, dropout_p, tensors);
  a.lse = static_cast<float*>(tensors[4]);
  emulated::attention_forward(a, workers);
}

// tensors: q, k, v, out, lse, dout, dq, dk, dv
extern "C" void attention_backward(const int64_t* n, float scale, float softcap, const int64_t* seed, double dropout_p,
                                   void* const* tensors) {
  AttentionBackward a = problem<AttentionBackward>(n, scale, softcap, seed, dropout_p, tensors);
  a.lse = static_cast<float*>(tensors[4]);
  a.dout = heads(tensors[5], a.Hq, a.Tq, a.Dv), a.dq = heads(tensors[6], a.Hq, a.Tq, a.D);
  a.dk = heads(tensors[7], a.Hkv, a.Tk, a.D), a.dv = heads(tensors[8], a.Hkv, a.Tk, a.Dv);
  emulated::attention_backward(a, workers);
}

// numbers: rows, cols, outputs; tensors: x, weight, bias, y
extern "C" void linear_forward(const int64_t* n, void* const* tensors) {
  emulated::linear_forward({DType::bf16, n[0], n[1], n[2], n[1], tensors[0], tensors[1], tensors[2], tensors[3]},
                           workers);
}
