// Runs one entry point of csrc/cuda on the CPU. `driver JOB`: a text file of lines
//
//   op NAME                        what to call
//   int NAME VALUE | float NAME VALUE
//   in NAME FILE OFFSET            raw bytes, at an address that is OFFSET bytes past a 256-byte boundary
//   out NAME FILE BYTES OFFSET     full of NaN before the call, written to FILE after it
//
// Every buffer is an allocation of its own that ends where its data ends, so that AddressSanitizer sees each overrun.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "cuda/rnn_cluster_plan.h"
#include "self_test.cuh"
#include "seqfuse/attention_cuda.h"
#include "seqfuse/layer_norm.h"
#include "seqfuse/rnn.h"
#include "seqfuse/rnn_both.h"

using namespace seqfuse;
namespace host = seqfuse::dev::host;

namespace {

struct Buffer {
  unsigned char* data;
  size_t bytes;
  std::string file;  // empty: an input
};

struct Job {
  std::string op;
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> floats;
  std::map<std::string, Buffer> buffers;

  int64_t integer(const char* name) const {
    if (!ints.count(name)) host::fail("the job lacks %s", name);
    return ints.at(name);
  }
  template <class T = void>
  T* pointer(const char* name) const {  // null: not given
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : reinterpret_cast<T*>(found->second.data);
  }
  Strides strides(const std::string& name) const {
    if (!buffers.count(name)) return {0, 0};
    return {integer((name + "_t").c_str()), integer((name + "_b").c_str())};
  }
};

Buffer allocate(size_t bytes, size_t offset) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes + offset)) host::fail("no memory");
  return {static_cast<unsigned char*>(p) + offset, bytes, ""};
}

Job read(const char* path) {
  Job job;
  std::ifstream lines(path);
  std::string line;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string kind, name, file;
    size_t bytes = 0, offset = 0;
    words >> kind >> name;
    if (kind == "op") job.op = name;
    if (kind == "int") words >> job.ints[name];
    if (kind == "float") words >> job.floats[name];
    if (kind == "in") {
      words >> file >> offset;
      std::ifstream in(file, std::ios::binary | std::ios::ate);
      Buffer b = allocate(size_t(in.tellg()), offset);
      in.seekg(0);
      in.read(reinterpret_cast<char*>(b.data), long(b.bytes));
      if (!in) host::fail("cannot read %s", file.c_str());
      job.buffers[name] = b;
    }
    if (kind == "out") {
      words >> file >> bytes >> offset;
      Buffer b = allocate(bytes, offset);
      std::memset(b.data, 0xff, bytes);
      b.file = file;
      job.buffers[name] = b;
    }
    if (!words) host::fail("cannot read the job's line: %s", line.c_str());
  }
  return job;
}

NormOptions norm_options(const Job& j) {
  const bool drops = j.floats.count("dropout_p");
  return {j.integer("rms") != 0, j.integer("zero_centered") != 0, drops ? j.floats.at("dropout_p") : 0.0,
          j.pointer<const int64_t>("seed_of_dropout")};
}

int layer_norm_forward(const Job& j) {
  LayerNormForward a{};
  a.dtype = DType(j.integer("dtype")), a.param_dtype = DType(j.integer("param_dtype"));
  a.rows = j.integer("rows"), a.cols = j.integer("cols"), a.eps = float(j.floats.at("eps"));
  a.x = j.pointer("x"), a.residual = j.pointer("residual"), a.weight = j.pointer("weight"), a.bias = j.pointer("bias");
  a.y = j.pointer("y"), a.sum = j.pointer("sum"), a.mean = j.pointer<float>("mean"), a.rstd = j.pointer<float>("rstd");
  a.options = norm_options(j);
  return layer_norm_forward_cuda(a, nullptr);
}

int layer_norm_backward(const Job& j) {
  LayerNormBackward a{};
  a.dtype = DType(j.integer("dtype")), a.param_dtype = DType(j.integer("param_dtype"));
  a.rows = j.integer("rows"), a.cols = j.integer("cols");
  a.dy = j.pointer("dy"), a.dsum = j.pointer("dsum"), a.s = j.pointer("s"), a.weight = j.pointer("weight");
  a.mean = j.pointer<float>("mean"), a.rstd = j.pointer<float>("rstd");
  a.options = norm_options(j);
  a.dx = j.pointer("dx"), a.dresidual = j.pointer("dresidual"), a.dweight = j.pointer("dweight"),
  a.dbias = j.pointer("dbias");
  a.partial_rows = layer_norm_partial_rows_cuda(a.rows, a.cols);
  const size_t bytes = size_t(2 * a.partial_rows * a.cols) * sizeof(float);
  const Buffer partial = allocate(bytes, 0);
  std::memset(partial.data, 0xff, bytes);
  a.partial = reinterpret_cast<float*>(partial.data);
  return layer_norm_backward_cuda(a, nullptr);
}

void* workspace(Cell cell, DType dtype, int64_t B, int64_t H, bool backward) {
  const size_t bytes = size_t(rnn_workspace_cuda(cell, dtype, B, H, backward));
  const Buffer b = allocate(bytes, 0);
  std::memset(b.data, 0xff, bytes);
  return b.data;
}

RnnOptions options(const Job& j) {
  RnnOptions o{};
  o.lengths = j.pointer<const int64_t>("lengths");
  o.resets = j.pointer<const bool>("resets"), o.resets_strides = j.strides("resets");
  o.zone_h = j.pointer<const bool>("zone_h"), o.zone_h_strides = j.strides("zone_h");
  o.zone_c = j.pointer<const bool>("zone_c"), o.zone_c_strides = j.strides("zone_c");
  if (j.floats.count("zoneout_h")) o.zoneout_h = float(j.floats.at("zoneout_h"));
  if (j.floats.count("zoneout_c")) o.zoneout_c = float(j.floats.at("zoneout_c"));
  o.hidden_mask = j.pointer("hidden_mask");
  return o;
}

// 2: both directions of a layer (seqfuse/rnn_both.h)
int scans_of(const Job& j) {
  return j.ints.count("scans") ? int(j.ints.at("scans")) : 1;
}

int rnn_forward(const Job& j, bool cluster) {
  RnnForward a{};
  a.cell = Cell(j.integer("cell")), a.dtype = DType(j.integer("dtype"));
  a.T = j.integer("T"), a.B = j.integer("B"), a.H = j.integer("H"), a.reverse = j.integer("reverse");
  a.xg = j.pointer("xg"), a.xg_strides = j.strides("xg");
  a.h0 = j.pointer("h0"), a.c0 = j.pointer("c0"), a.w_hh = j.pointer("w_hh"), a.b_hh = j.pointer("b_hh");
  a.y = j.pointer("y"), a.y_strides = j.strides("y"), a.h_n = j.pointer("h_n"), a.c_n = j.pointer("c_n");
  a.gates = j.pointer("gates"), a.gates_strides = j.strides("gates");
  a.cells = j.pointer<float>("cells"), a.cells_strides = j.strides("cells");
  a.options = options(j);
  if (cluster) {
    const RnnForward scans[2] = {a, reverse_of(a, a.T * a.B)};
    return rnn_forward_cluster_cuda(scans, scans_of(j), nullptr);
  }
  return rnn_forward_cuda(a, workspace(a.cell, a.dtype, a.B, a.H, false), nullptr);
}

int rnn_backward(const Job& j, bool cluster) {
  RnnBackward a{};
  a.cell = Cell(j.integer("cell")), a.dtype = DType(j.integer("dtype"));
  a.T = j.integer("T"), a.B = j.integer("B"), a.H = j.integer("H"), a.reverse = j.integer("reverse");
  a.dy = j.pointer("dy"), a.dy_strides = j.strides("dy"), a.dh_n = j.pointer("dh_n"), a.dc_n = j.pointer("dc_n");
  a.y = j.pointer("y"), a.y_strides = j.strides("y");
  a.gates = j.pointer("gates"), a.gates_strides = j.strides("gates");
  a.cells = j.pointer<float>("cells"), a.cells_strides = j.strides("cells");
  a.h0 = j.pointer("h0"), a.c0 = j.pointer("c0"), a.w_hh = j.pointer("w_hh");
  a.dxg = j.pointer("dxg"), a.dxg_strides = j.strides("dxg"), a.dan = j.pointer("dan");
  a.dan_strides = j.strides("dan");
  a.dh0 = j.pointer("dh0"), a.dc0 = j.pointer("dc0"), a.db_hh = j.pointer<float>("db_hh");
  a.dcells = j.pointer<float>("dcells"), a.dcells_strides = j.strides("dcells");
  a.options = options(j);
  if (cluster) {
    const RnnBackward scans[2] = {a, reverse_of(a, a.T * a.B)};
    const int count = scans_of(j);
    const Buffer partial = allocate(size_t(count * rnn_workspace_cluster_cuda(a.cell, a.B, a.H)), 0);
    std::memset(partial.data, 0xff, partial.bytes);
    return rnn_backward_cluster_cuda(scans, count, partial.data, nullptr);
  }
  return rnn_backward_cuda(a, workspace(a.cell, a.dtype, a.B, a.H, true), nullptr);
}

HeadStrides head_strides(const Job& j, const std::string& name) {
  return {j.integer((name + "_b").c_str()), j.integer((name + "_h").c_str()), j.integer((name + "_t").c_str())};
}

int attention_forward(const Job& j) {
  AttentionForwardCuda a{};
  a.dtype = DType(j.integer("dtype")), a.causal = j.integer("causal"), a.scale = float(j.floats.at("scale"));
  a.B = j.integer("B"), a.Hq = j.integer("Hq"), a.Hkv = j.integer("Hkv");
  a.Tq = j.integer("Tq"), a.Tk = j.integer("Tk"), a.D = j.integer("D");
  a.q = j.pointer("q"), a.k = j.pointer("k"), a.v = j.pointer("v"), a.out = j.pointer("out");
  a.q_strides = head_strides(j, "q"), a.k_strides = head_strides(j, "k"), a.v_strides = head_strides(j, "v");
  a.out_strides = head_strides(j, "out"), a.lse = j.pointer<float>("lse");
  return attention_forward_cuda(a, nullptr);
}

int attention_backward(const Job& j) {
  AttentionBackwardCuda a{};
  a.dtype = DType(j.integer("dtype")), a.causal = j.integer("causal"), a.scale = float(j.floats.at("scale"));
  a.B = j.integer("B"), a.Hq = j.integer("Hq"), a.Hkv = j.integer("Hkv");
  a.Tq = j.integer("Tq"), a.Tk = j.integer("Tk"), a.D = j.integer("D");
  a.q = j.pointer("q"), a.k = j.pointer("k"), a.v = j.pointer("v");
  a.out = j.pointer("out"), a.dout = j.pointer("dout");
  a.q_strides = head_strides(j, "q"), a.k_strides = head_strides(j, "k"), a.v_strides = head_strides(j, "v");
  a.out_strides = head_strides(j, "out"), a.dout_strides = head_strides(j, "dout");
  a.lse = j.pointer<float>("lse"), a.dlse = j.pointer<float>("dlse");
  a.dq = j.pointer("dq"), a.dk = j.pointer("dk"), a.dv = j.pointer("dv");
  a.dq_strides = head_strides(j, "dq"), a.dk_strides = head_strides(j, "dk"), a.dv_strides = head_strides(j, "dv");
  const Buffer scratch = allocate(size_t(attention_backward_workspace_cuda(a.B, a.Hq, a.Tq)) * sizeof(float), 0);
  std::memset(scratch.data, 0xff, scratch.bytes);
  a.workspace = reinterpret_cast<float*>(scratch.data);
  return attention_backward_cuda(a, nullptr);
}

// the plan's sentence, for what the job says the device is
int plan_here(const Job& j) {
  host::capability = int(j.integer("capability")), host::resident_clusters = int(j.integer("resident"));
  cuda::rnn_cluster_allow(j.integer("allow"));
  cuda::RnnClusterCase c{Cell(j.integer("cell")), DType(j.integer("dtype")), j.integer("B"), j.integer("H")};
  c.scans = scans_of(j), c.tf32 = j.integer("tf32");
  c.backward = j.integer("backward");
  const auto plan = cuda::rnn_cluster_plan_here(c);
  std::string text = plan.text();
  text.resize(j.buffers.at("text").bytes, ' ');
  std::memcpy(j.pointer("text"), text.data(), text.size());
  return 0;
}

int self(const Job& j) {
  using namespace self_test;
  const auto* in = j.pointer<const float>("in");
  auto* out = j.pointer<float>("out");
  auto number = [&](const char* name) { return int(j.integer(name)); };
  if (j.op == "rotate")
    return dev::launch(&rotate, {number("blocks")}, kThreads, nullptr, in, out, number("rounds"), number("first") != 0,
                       number("second") != 0);
  if (j.op == "ring")
    return dev::launch(&ring, {number("blocks"), 1, kCluster}, kThreads, nullptr, in, out, number("first") != 0);
  if (j.op == "relay") {
    const auto mistake = RelayMistake(number("mistake"));
    const int64_t shared = int64_t(sizeof(RelayShared)) - (mistake == RelayMistake::dynamic_size ? 16 : 0);
    const dev::Grid grid{number("blocks"), 1, kCluster, shared};
    return dev::launch(&relay, grid, kThreads, nullptr, in, out, number("rounds"), mistake);
  }
  if (j.op == "group_sum")
    return dev::launch(&group_sum, {number("blocks")}, kThreads, nullptr, in, out, number("group"), number("rounds"));
  if (j.op == "mistaken")
    return dev::launch(&mistaken, {1}, kThreads, nullptr, in, out, number("n"), Mistake(number("mistake")));
  if (j.op == "round")
    return dev::launch(number("dtype") == 1 ? &round_bf16 : &round_f16, {1}, kThreads, nullptr, in, out, number("n"));
  if (j.op == "panels") {
    auto map = [&](const char* name, int64_t rows, int64_t columns) {
      dev::TensorMap m;
      const dev::Tiled t{
          DType(number("dtype")), j.pointer(name), {columns, rows, 1, 1}, {columns, columns, columns}, 64};
      if (dev::make_tensor_map(m, t)) host::fail("no tensor map of %s", name);
      return m;
    };
    return dev::launch(number("dtype") == 1 ? &panels_bf16 : &panels_f16, {1, 1, 1, int64_t(sizeof(PanelShared))},
                       kThreads, nullptr, map("a", 64, 128), map("b", 64, 128), map("c", number("rows"), 64), out,
                       number("by_columns") != 0, PanelMistake(number("mistake")));
  }
  if (j.op == "place")
    return dev::launch(&place, {number("tiles") * number("heads") * number("batches")}, kThreads, nullptr, out,
                       number("tiles"), number("heads"), number("batches"), number("section"), number("longest") != 0);
  if (j.op == "mma" && number("dtype") == 1)
    return dev::launch(&mma_bf16, {1}, 32, nullptr, j.pointer<const dev::bf16>("a"), j.pointer<const dev::bf16>("b"),
                       out);
  if (j.op == "mma")
    return dev::launch(&mma_f16, {1}, 32, nullptr, j.pointer<const dev::f16>("a"), j.pointer<const dev::f16>("b"), out);
  if (j.op == "round_tf32") return dev::launch(&round_tf32, {1}, kThreads, nullptr, in, out, number("n"));
  if (j.op == "mma_tf32")
    return dev::launch(&mma_tf32, {1}, 32, nullptr, j.pointer<const float>("a"), j.pointer<const float>("b"), out);
  host::fail("no op %s", j.op.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) host::fail("usage: driver JOB");
  const Job job = read(argv[1]);
  if (job.ints.count("seed")) host::seed = uint64_t(job.integer("seed"));
  if (job.ints.count("multiprocessors")) host::multiprocessors = int(job.integer("multiprocessors"));
  if (job.ints.count("capability")) host::capability = int(job.integer("capability"));
  int error = 0;
  if (job.op == "layer_norm_forward")
    error = layer_norm_forward(job);
  else if (job.op == "layer_norm_backward")
    error = layer_norm_backward(job);
  else if (job.op == "rnn_forward" || job.op == "rnn_cluster_forward")
    error = rnn_forward(job, job.op != "rnn_forward");
  else if (job.op == "rnn_backward" || job.op == "rnn_cluster_backward")
    error = rnn_backward(job, job.op != "rnn_backward");
  else if (job.op == "attention_forward")
    error = attention_forward(job);
  else if (job.op == "attention_backward")
    error = attention_backward(job);
  else if (job.op == "rnn_cluster_plan")
    error = plan_here(job);
  else
    error = self(job);
  if (error) host::fail("%s returned %d", job.op.c_str(), error);
  for (const auto& [name, b] : job.buffers)
    if (!b.file.empty())
      std::ofstream(b.file, std::ios::binary).write(reinterpret_cast<const char*>(b.data), long(b.bytes));
  return 0;
}
