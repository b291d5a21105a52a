// seqfuse::luong_readout. Contract: csrc/include/seqfuse/luong.h
#include "seqfuse/luong.h"

#include "common.h"

namespace seqfuse {
namespace {

Tensor luong_readout(Tensor query_in, Tensor keys_in, Tensor values_in, Tensor added_in,
                     std::optional<Tensor> lengths_in) {
  STD_TORCH_CHECK(query_in.dim() == 2 && keys_in.dim() == 3, "query must be [rows, width] and keys [S, T, width]");
  const int64_t S = keys_in.size(0), T = keys_in.size(1), width = keys_in.size(2), rows = query_in.size(0);
  STD_TORCH_CHECK(S && T && width && rows % S == 0, "query must have as many rows for each of the ", S, " sources");
  auto check = [&](const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
    bool same = t.dim() == int64_t(shape.size()) && t.scalar_type() == ScalarType::Float;
    for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == shape.begin()[i];
    STD_TORCH_CHECK(same, name, " must be float32, query and added [", rows, ", ", width, "], keys and values [", S,
                    ", ", T, ", ", width, "]");
    check_same_device(t, query_in, name);
  };
  check(query_in, {rows, width}, "query"), check(added_in, {rows, width}, "added");
  check(keys_in, {S, T, width}, "keys"), check(values_in, {S, T, width}, "values");
  if (lengths_in) {
    STD_TORCH_CHECK(lengths_in->dim() == 1 && lengths_in->size(0) == S && lengths_in->scalar_type() == ScalarType::Long,
                    "lengths must be int64 [", S, "]");
    lengths_in = dense(*lengths_in);
    const int64_t* lengths = static_cast<const int64_t*>(lengths_in->const_data_ptr());
    for (int64_t s = 0; s < S; s++)
      STD_TORCH_CHECK(lengths[s] >= 1 && lengths[s] <= T, "lengths must lie in 1 to ", T, ", got ", lengths[s]);
  }
  const Tensor query = dense(query_in), keys = dense(keys_in), values = dense(values_in), added = dense(added_in);
  Tensor out = empty(query, {rows, width});
  const LuongReadout a{S,
                       rows / S,
                       T,
                       width,
                       static_cast<const float*>(query.const_data_ptr()),
                       static_cast<const float*>(keys.const_data_ptr()),
                       static_cast<const float*>(values.const_data_ptr()),
                       static_cast<const float*>(added.const_data_ptr()),
                       static_cast<const int64_t*>(pointer_or_null(lengths_in)),
                       pointer<float>(out)};
  if (rows) luong_readout_cpu(a, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("luong_readout(Tensor query, Tensor keys, Tensor values, Tensor added, Tensor? lengths) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("luong_readout", TORCH_BOX(&luong_readout));
}

}  // namespace seqfuse
