// seqfuse::rope. Contract: csrc/include/seqfuse/rope.h
#include "seqfuse/rope.h"

#include "common.h"

namespace seqfuse {
namespace {

const float* table(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  " must be contiguous float32 [positions, rotary dimensions / 2]");
  check_same_device(t, x, name);
  return static_cast<const float*>(t.const_data_ptr());
}

// y may be x
void rope_on_cpu(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t offset, bool interleaved,
                 bool inverse, Tensor y) {
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4, "x and y must be [batch, heads, time, dim]");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.scalar_type() != ScalarType::Half,
                  "x and y must be float32 or bfloat16, both");
  check_same_device(y, x, "y");
  for (int64_t i = 0; i < 4; i++) STD_TORCH_CHECK(x.size(i) == y.size(i), "y must have the shape of x");
  STD_TORCH_CHECK(x.size(3) <= 1 || (x.stride(3) == 1 && y.stride(3) == 1), "the elements of a head must be dense");
  Rope a{};
  a.dtype = dtype_of(x, "x");
  a.batch = x.size(0), a.heads = x.size(1), a.time = x.size(2), a.dim = x.size(3);
  a.batch_step = x.stride(0), a.head_step = x.stride(1), a.time_step = x.stride(2);
  a.y_batch_step = y.stride(0), a.y_head_step = y.stride(1), a.y_time_step = y.stride(2);
  a.cos = table(cos, x, "cos"), a.sin = table(sin, x, "sin");
  a.half = cos.size(1);
  STD_TORCH_CHECK(sin.size(0) == cos.size(0) && sin.size(1) == a.half, "sin must have the shape of cos");
  STD_TORCH_CHECK(2 * a.half <= a.dim, "cos has ", a.half, " columns, but half a head is ", a.dim / 2);
  if (positions) {
    STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Long && positions->is_contiguous() &&
                        (positions->numel() == a.time || positions->numel() == a.batch * a.time),
                    "positions must be contiguous int64 [time] or [batch, time]");
    check_same_device(*positions, x, "positions");
    a.positions = static_cast<const int64_t*>(positions->const_data_ptr());
    a.position_step = positions->dim() == 1 ? 0 : a.time;
    for (int64_t i = 0; i < positions->numel(); i++)
      STD_TORCH_CHECK(a.positions[i] >= 0 && a.positions[i] < cos.size(0), "position ", a.positions[i],
                      " is outside of the tables, which have ", cos.size(0), " rows");
  } else {
    STD_TORCH_CHECK(offset >= 0 && offset + a.time <= cos.size(0), "positions ", offset, " to ", offset + a.time,
                    " are outside of the tables, which have ", cos.size(0), " rows");
  }
  a.offset = offset, a.interleaved = interleaved, a.inverse = inverse;
  a.x = x.const_data_ptr(), a.y = pointer(y);
  if (x.numel()) rope_cpu(a, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int offset, bool interleaved, bool inverse, "
      "Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope_on_cpu));
}

}  // namespace seqfuse
