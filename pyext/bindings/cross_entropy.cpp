// seqfuse::cross_entropy_rows / kl_rows. Contract: csrc/include/seqfuse/cross_entropy.h
#include "seqfuse/cross_entropy.h"

#include "common.h"

namespace seqfuse {
namespace {

struct Scale {
  const float* values;
  int64_t step;
};

// Rows of contiguous elements; between rows there may be a gap, the same in `like`.
void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1) &&
                      (t.size(0) <= 1 || (t.stride(0) >= t.size(1) && t.stride(0) == like.stride(0))),
                  name, " must be [rows, vocabulary] with contiguous rows");
  STD_TORCH_CHECK(t.size(0) == like.size(0) && t.size(1) == like.size(1), name, " must have the shape of the logits");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the logits");
  check_same_device(t, like, name);
}

void check_cpu_dtype(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Half, "logits: the CPU kernel takes float32 and bfloat16");
}

Scale check_scale(const std::optional<Tensor>& scale, const std::optional<Tensor>& out, const Tensor& logits) {
  STD_TORCH_CHECK(bool(scale) == bool(out), "scale and the tensor for the gradient must be given together");
  if (!scale) return {nullptr, 0};
  check_rows(*out, logits, "the gradient");
  check_same_device(*scale, logits, "scale");
  const int64_t n = scale->numel();
  STD_TORCH_CHECK(
      scale->scalar_type() == ScalarType::Float && scale->is_contiguous() && (n == 1 || n == logits.size(0)),
      "scale must be float32, one value or one a row");
  return {static_cast<const float*>(scale->const_data_ptr()), n == 1 ? 0 : 1};
}

std::tuple<Tensor, Tensor> cross_entropy_rows_on_cpu(Tensor logits, Tensor target, std::optional<Tensor> class_weight,
                                                     std::optional<Tensor> scale, std::optional<Tensor> lse_in,
                                                     std::optional<Tensor> dlogits, int64_t ignore_index,
                                                     double label_smoothing, double softcap, double z_loss) {
  check_rows(logits, logits, "logits");
  check_cpu_dtype(logits);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == rows && target.scalar_type() == ScalarType::Long && target.is_contiguous(),
      "target must be contiguous int64 [", rows, "]");
  check_same_device(target, logits, "target");
  CrossEntropyRows a{};
  a.dtype = dtype_of(logits, "logits");
  a.rows = rows, a.cols = cols, a.stride = logits.stride(0);
  a.logits = logits.const_data_ptr();
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t r = 0; r < rows; r++)
    STD_TORCH_CHECK(a.target[r] == ignore_index || (a.target[r] >= 0 && a.target[r] < cols), "target ", a.target[r],
                    " is out of bounds: the vocabulary has ", cols, " entries and ignore_index is ", ignore_index);
  a.class_weight_sum = float(cols);
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->dim() == 1 && class_weight->size(0) == cols && class_weight->is_contiguous() &&
                        class_weight->scalar_type() == ScalarType::Float,
                    "class_weight must be contiguous float32 [", cols, "]");
    check_same_device(*class_weight, logits, "class_weight");
    a.class_weight = static_cast<const float*>(class_weight->const_data_ptr());
    double sum = 0;
    for (int64_t i = 0; i < cols; i++) sum += a.class_weight[i];
    a.class_weight_sum = float(sum);
  }
  a.ignore_index = ignore_index;
  a.label_smoothing = float(label_smoothing), a.softcap = float(softcap), a.z_loss = float(z_loss);
  const Scale s = check_scale(scale, dlogits, logits);
  a.scale = s.values, a.scale_step = s.step;
  if (dlogits) a.dlogits = pointer(*dlogits);
  Tensor loss = empty(logits, {lse_in ? 0 : rows}, ScalarType::Float);
  Tensor lse = empty(logits, {lse_in ? 0 : rows}, ScalarType::Float);
  if (lse_in) {
    STD_TORCH_CHECK(lse_in->numel() == rows && lse_in->is_contiguous() && lse_in->scalar_type() == ScalarType::Float,
                    "lse must be contiguous float32 [", rows, "]");
    check_same_device(*lse_in, logits, "lse");
  } else {
    a.loss = pointer<float>(loss);
  }
  a.lse = lse_in ? const_cast<float*>(static_cast<const float*>(lse_in->const_data_ptr())) : pointer<float>(lse);
  if (rows && cols) cross_entropy_rows_cpu(a, torch_threads());
  return {loss, lse};
}

Tensor kl_rows_on_cpu(Tensor student, Tensor teacher, std::optional<Tensor> keep, std::optional<Tensor> scale,
                      std::optional<Tensor> dstudent, double temperature) {
  check_rows(student, student, "student");
  check_rows(teacher, student, "teacher");
  STD_TORCH_CHECK(student.is_contiguous(), "student and teacher must be contiguous");
  check_cpu_dtype(student);
  const int64_t rows = student.size(0);
  KlRows a{};
  a.dtype = dtype_of(student, "student");
  a.rows = rows, a.cols = student.size(1);
  a.student = student.const_data_ptr(), a.teacher = teacher.const_data_ptr();
  if (keep) {
    STD_TORCH_CHECK(keep->numel() == rows && keep->is_contiguous() && keep->scalar_type() == ScalarType::Bool,
                    "keep must be contiguous bool [", rows, "]");
    check_same_device(*keep, student, "keep");
    a.keep = static_cast<const bool*>(keep->const_data_ptr());
  }
  a.temperature = float(temperature);
  const Scale s = check_scale(scale, dstudent, student);
  a.scale = s.values, a.scale_step = s.step;
  if (dstudent) a.dstudent = pointer(*dstudent);
  Tensor loss = empty(student, {rows}, ScalarType::Float);
  a.loss = pointer<float>(loss);
  if (rows && a.cols) kl_rows_cpu(a, torch_threads());
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "cross_entropy_rows(Tensor logits, Tensor target, Tensor? class_weight, Tensor? scale, Tensor? lse, "
      "Tensor(a!)? dlogits, int ignore_index, float label_smoothing, float softcap, float z_loss) "
      "-> (Tensor loss, Tensor lse)");
  m.def(
      "kl_rows(Tensor student, Tensor teacher, Tensor? keep, Tensor? scale, Tensor(a!)? dstudent, float temperature) "
      "-> Tensor loss");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows_on_cpu));
  m.impl("kl_rows", TORCH_BOX(&kl_rows_on_cpu));
}

}  // namespace seqfuse
