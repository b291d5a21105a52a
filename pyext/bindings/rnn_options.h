// What the scan's binding checks before any kernel runs: sequence tensors in their three layouts, and the options.
#pragma once
#include "common.h"
#include "seqfuse/rnn.h"

namespace seqfuse {

using Maybe = std::optional<Tensor>;

// An op's options as they came in.
struct Options {
  Maybe lengths, resets, hidden_mask, peephole, zone_h, zone_c;
  double zoneout_h, zoneout_c;
};
struct Flags {
  bool reverse, save, want_cells;
  bool tf32 = false;
};
// How many directions of a layer a call runs: two lie together as seqfuse/rnn_both.h says.
enum class Ways : int64_t { one = 1, both = 2 };

// Sizes of a sequence [T, B, X], or packed [rows, X].
struct Extent {
  int64_t T, B, rows;
  bool packed;
};

inline void check(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* name,
                  std::optional<ScalarType> type = {}) {
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), name, " must be ", shape.size(), "-D, got ", t.dim(), "-D");
  int64_t i = 0;
  for (int64_t n : shape) {
    STD_TORCH_CHECK(t.size(i) == n, name, " must have ", n, " elements in dimension ", i, ", got ", t.size(i));
    i++;
  }
  if (type) {
    const char* wanted = *type == ScalarType::Bool ? "bool" : "float32";
    STD_TORCH_CHECK(t.scalar_type() == *type, name, " must have dtype ", wanted);
  } else {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the sequence");
  }
  check_same_device(t, like, name);
}

inline void check_sequence(const Tensor& t, const Tensor& like, const Extent& e, int64_t width, const char* name,
                           std::optional<ScalarType> type = {}) {
  e.packed ? check(t, like, {e.rows, width}, name, type) : check(t, like, {e.T, e.B, width}, name, type);
}

// Checks lengths too, if they are on the CPU: each in [0, T], and their sum where the sequence is packed.
inline Extent extent(const Tensor& seq, const Maybe& lengths, int64_t B, const char* name) {
  const bool packed = seq.dim() == 2 && lengths;
  STD_TORCH_CHECK(seq.dim() == 3 || packed, name, " must be 3-D [T, B, X], or 2-D [N, X] with lengths, got ", seq.dim(),
                  "-D");
  Extent e{packed ? 0 : seq.size(0), B, seq.size(0), packed};
  if (!lengths) return e;
  const Tensor& n = *lengths;
  STD_TORCH_CHECK(n.dim() == 1 && n.size(0) == B && n.scalar_type() == ScalarType::Long,
                  "lengths must be int64 [B], with B = ", B);
  check_same_device(n, seq, "lengths");
  if (!n.is_cpu()) {
    STD_TORCH_CHECK(!packed, name, ": packed sequences are taken on the CPU only");
    return e;  // a look at them would wait for the device; the kernels take any number
  }
  const int64_t stride = n.stride(0), limit = packed ? e.rows : e.T;
  const auto* data = static_cast<const int64_t*>(n.const_data_ptr());
  int64_t sum = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t length = data[b * stride];
    STD_TORCH_CHECK(length >= 0 && length <= limit, "lengths must lie in [0, ", limit, "], got ", length,
                    " for sequence ", b);
    sum += length;
    if (packed && length > e.T) e.T = length;
    if (packed && sum > limit) break;
  }
  STD_TORCH_CHECK(!packed || sum == e.rows, "lengths must add up to the ", e.rows, " rows of the packed ", name);
  return e;
}

// w_hh [rows, H / heads] -> heads
inline int64_t heads_of(const Tensor& w, const Tensor& like, int64_t rows, int64_t H) {
  STD_TORCH_CHECK(w.dim() == 2, "w_hh must be 2-D, got ", w.dim(), "-D");
  const int64_t width = w.size(1);
  STD_TORCH_CHECK(width > 0 && width <= H && H % width == 0, "w_hh must have H / heads columns for H = ", H, ", got ",
                  width);
  check(w, like, {rows, width}, "w_hh");
  return H / width;
}

// The last dimension lies together in memory, so that the strides of a Strides describe t.
inline bool rows_dense(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1;
}

inline bool batch_major(const Tensor& t) {
  if (t.dim() != 3) return false;
  const int64_t T = t.size(0), B = t.size(1), X = t.size(2);
  return !t.is_contiguous() && rows_dense(t) && (t.stride(0) == X || T == 1) && (t.stride(1) == T * X || B == 1);
}

inline Tensor sequence(const Tensor& t) {
  return rows_dense(t) ? t : torch::stable::contiguous(t);
}

inline Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(t.dim() == 2 ? 0 : 1)};
}

// A new [T, B, width] or [N, width], time-major.
inline Tensor empty_rows(const Tensor& t, int64_t width, std::optional<ScalarType> type = {}) {
  return t.dim() == 2 ? empty(t, {t.size(0), width}, type) : empty(t, {t.size(0), t.size(1), width}, type);
}

// The same in the memory order of t.
inline Tensor empty_sequence(const Tensor& t, int64_t width, std::optional<ScalarType> type = {}) {
  if (!batch_major(t)) return empty_rows(t, width, type);
  return torch::stable::transpose(empty(t, {t.size(1), t.size(0), width}, type), 0, 1);
}

// What each direction has one of: [shape], or [2, shape].
inline void check_each(const Tensor& t, const Tensor& like, Ways ways, std::initializer_list<int64_t> shape,
                       const char* name, std::optional<ScalarType> type = {}) {
  if (ways == Ways::one) return check(t, like, shape, name, type);
  const int64_t* n = shape.begin();
  shape.size() == 2 ? check(t, like, {2, n[0], n[1]}, name, type) : check(t, like, {2, n[0], n[1], n[2]}, name, type);
}
// A sequence of each, one behind the other.
inline void check_sequences(const Tensor& t, const Tensor& like, const Extent& e, Ways ways, int64_t width,
                            const char* name, std::optional<ScalarType> type = {}) {
  e.packed ? check_each(t, like, ways, {e.rows, width}, name, type)
           : check_each(t, like, ways, {e.T, e.B, width}, name, type);
}
inline Tensor empty_each(const Tensor& like, Ways ways, int64_t B, int64_t width) {
  return ways == Ways::one ? empty(like, {B, width}) : empty(like, {2, B, width});
}
inline Tensor empty_sequences(const Tensor& like, Ways ways, int64_t width, std::optional<ScalarType> type = {}) {
  if (ways == Ways::one) return empty_sequence(like, width, type);
  return like.dim() == 2 ? empty(like, {2, like.size(0), width}, type)
                         : empty(like, {2, like.size(0), like.size(1), width}, type);
}
// the strides of the first of them
inline Strides strides_of_first(const Tensor& t, Ways ways) {
  if (ways == Ways::one) return strides_of(t);
  return {t.stride(1), t.stride(t.dim() == 3 ? 1 : 2)};
}

// Checks the options, writes them to an RnnOptions, and keeps their memory for as long as it lives.
class HeldOptions {
 public:
  HeldOptions(const Options& o, Cell cell, const Tensor& seq, const Extent& e, Ways ways, int64_t H, RnnOptions& out) {
    const bool lstm = cell == Cell::lstm;
    STD_TORCH_CHECK(lstm || !o.peephole, "peephole: only the LSTM has peepholes");
    STD_TORCH_CHECK(lstm || !o.zone_c, "zone_c: only the LSTM has a cell state");
    STD_TORCH_CHECK(ways == Ways::one || (!o.hidden_mask && !o.peephole),
                    "both directions at once have neither hidden_mask nor peephole");
    STD_TORCH_CHECK(o.zoneout_h >= 0 && o.zoneout_h <= 1, "zoneout_h must lie in [0, 1], got ", o.zoneout_h);
    STD_TORCH_CHECK(o.zoneout_c >= 0 && o.zoneout_c <= 1, "zoneout_c must lie in [0, 1], got ", o.zoneout_c);
    if (o.lengths) {
      lengths_ = dense(*o.lengths);
      out.lengths = static_cast<const int64_t*>(lengths_->const_data_ptr());
      out.packed = e.packed;
    }
    if (o.resets) {
      e.packed ? check(*o.resets, seq, {e.rows}, "resets", ScalarType::Bool)
               : check(*o.resets, seq, {e.T, e.B}, "resets", ScalarType::Bool);
      resets_ = dense(*o.resets);
      out.resets = static_cast<const bool*>(resets_->const_data_ptr());
      out.resets_strides = {e.packed ? 1 : e.B, 1};
    }
    if (o.hidden_mask) {
      check(*o.hidden_mask, seq, {e.B, H}, "hidden_mask");
      hidden_mask_ = dense(*o.hidden_mask);
      out.hidden_mask = hidden_mask_->const_data_ptr();
    }
    if (o.peephole) {
      check(*o.peephole, seq, {3, H}, "peephole");
      peephole_ = dense(*o.peephole);
      out.peephole = peephole_->const_data_ptr();
    }
    out.zone_h = zone(o.zone_h, seq, e, ways, H, "zone_h", zone_h_, out.zone_h_strides);
    out.zone_c = zone(o.zone_c, seq, e, ways, H, "zone_c", zone_c_, out.zone_c_strides);
    // a mask comes before a weight
    out.zoneout_h = o.zone_h ? 0.0f : float(o.zoneout_h);
    out.zoneout_c = o.zone_c || !lstm ? 0.0f : float(o.zoneout_c);
  }

 private:
  static const bool* zone(const Maybe& given, const Tensor& seq, const Extent& e, Ways ways, int64_t H,
                          const char* name, Maybe& held, Strides& strides) {
    if (!given) return nullptr;
    check_sequences(*given, seq, e, ways, H, name, ScalarType::Bool);
    held = ways == Ways::one ? sequence(*given) : dense(*given);
    strides = strides_of_first(*held, ways);
    return static_cast<const bool*>(held->const_data_ptr());
  }

  Maybe lengths_, resets_, hidden_mask_, peephole_, zone_h_, zone_c_;
};

}  // namespace seqfuse
