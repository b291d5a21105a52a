// seqfuse._C: loading it registers the ops of the other bindings with torch. Through pybind11 itself go only facts and
// switches, never a tensor.
#include <pybind11/pybind11.h>

#include "cuda/rnn_cluster_plan.h"
#include "openmp.h"
#include "seqfuse/types.h"

namespace py = pybind11;

namespace {

// refusal is None where the kernel can run
py::dict as_dict(const seqfuse::cuda::RnnClusterPlan& plan) {
  py::dict d;
  d["refusal"] = plan.refusal.empty() ? py::object(py::none()) : py::object(py::str(plan.refusal));
  d["text"] = plan.text();
  d["blocks"] = plan.blocks, d["groups"] = plan.groups, d["resident"] = plan.resident, d["waves"] = plan.waves;
  d["extent"] = plan.extent;
  d["shared_forward"] = plan.shared.forward, d["shared_backward"] = plan.shared.backward;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace seqfuse;
  m.doc() = "Compiled kernels of seqfuse";
  m.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = __VERSION__;
    facts["torch_target"] = "2.11";
    facts["torch"] = SEQFUSE_TORCH;  // the torch of the build, for seqfuse._autograd
#ifdef SEQFUSE_CUDA
    facts["cuda"] = true;
#else
    facts["cuda"] = false;
#endif
    facts["bf16_dots_are_slow"] = bf16_dots_are_slow();
    facts["mkl_is_narrow"] = mkl_is_narrow();
    facts["last_level_cache"] = last_level_cache();
    facts["cached_bytes"] = cached_bytes();
    return facts;
  });
  m.def("set_cached_bytes", &set_cached_bytes, "What the caches are taken to keep from one call to the next; negative: as found");
  m.def("isa_detected", [] { return isa_name(isa_detected()); });
  m.def("isa_active", [] { return isa_name(isa_active()); });
  m.def("isa_for_bf16_products", [] { return isa_name(isa_for_bf16_products()); });
  // by name; None stands for no limit, also in what is returned: the limit there was
  m.def("isa_limit", [](const py::object& top) -> py::object {
    std::optional<Isa> level;
    if (!top.is_none()) {
      const std::string name = py::cast<std::string>(top);
      for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
        if (name == isa_name(isa)) level = isa;
      if (!level)
        throw py::value_error("unknown instruction set '" + name + "': use baseline, avx2, avx512, avx512_bf16 or amx");
    }
    const std::optional<Isa> before = isa_limit(level);
    return before ? py::object(py::str(isa_name(*before))) : py::object(py::none());
  });
  // Launch plans. cell and dtype are the numbers of csrc/include/seqfuse: rnn.h, types.h.
  const auto whose = [](int cell, int dtype, int64_t B, int64_t H, int scans, bool tf32, bool backward) {
    return cuda::RnnClusterCase{Cell(cell), DType(dtype), B, H, scans, tf32, backward};
  };
  m.def(
      "rnn_cluster_plan",
      [whose](int cell, int dtype, int64_t B, int64_t H, int capability, int64_t resident, int scans, bool tf32) {
        return as_dict(
            cuda::rnn_cluster_plan(whose(cell, dtype, B, H, scans, tf32, false), capability, resident));
      },
      py::arg("cell"), py::arg("dtype"), py::arg("B"), py::arg("H"), py::arg("capability"), py::arg("resident"),
      py::arg("scans") = 1, py::arg("tf32") = false,
      "What the recurrent cluster kernel would do on a device of this capability (10 * major + minor) that holds "
      "`resident` clusters at once");
#ifdef SEQFUSE_CUDA
  m.def(
      "rnn_cluster_plan_here",
      [whose](int cell, int dtype, int64_t B, int64_t H, int scans, bool tf32, bool backward) {
        return as_dict(cuda::rnn_cluster_plan_here(whose(cell, dtype, B, H, scans, tf32, backward)));
      },
      py::arg("cell"), py::arg("dtype"), py::arg("B"), py::arg("H"), py::arg("scans"), py::arg("tf32"),
      py::arg("backward"), "What it does on the current device");
  m.def("rnn_cluster_allow", &cuda::rnn_cluster_allow, "False: one launch a step, for tests and benchmarks");
#endif
  m.def("set_openmp", [](bool value) { detail::openmp() = value; });
}
