// seqfuse._C: loading it registers the ops of the other bindings with torch. Through pybind11 itself go only facts and
// switches, never a tensor.
#include <pybind11/pybind11.h>

#include "common.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace seqfuse;
  m.doc() = "Compiled kernels of seqfuse";
  m.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = __VERSION__;
    facts["torch_target"] = "2.11";
#ifdef SEQFUSE_CUDA
    facts["cuda"] = true;
#else
    facts["cuda"] = false;
#endif
    return facts;
  });
  m.def("isa_detected", [] { return isa_name(isa_detected()); });
  m.def("isa_active", [] { return isa_name(isa_active()); });
  m.def("isa_limit", [](const std::string& top) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
      if (top == isa_name(isa)) return isa_limit(isa);
    }
    throw py::value_error("unknown instruction set '" + top + "': use baseline, avx2, avx512 or avx512_bf16");
  });
  m.def("set_openmp", [](bool value) { detail::openmp() = value; });
}
