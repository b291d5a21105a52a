// Launches of rnn_forward.cuh, one a time step, and of rnn_backward.cuh: one a time step, one for the initial state,
// two for db_hh. Contract: seqfuse/rnn.h
#include <initializer_list>

#include "cuda/rnn_backward.cuh"
#include "cuda/rnn_forward.cuh"

namespace seqfuse {
namespace {

using namespace cuda;

// time step t of a sequence [T, B, X]; null stays null
template <class T, class Pointer>
Rows<T> rows_at(Pointer* data, Strides strides, int64_t t) {
  return {data ? static_cast<T*>(data) + t * strides.t : nullptr, strides.b};
}

// whether every row of these operands of a product can be read 16 aligned bytes at a time
template <class T>
bool vectors_fit(int64_t H, std::initializer_list<const void*> pointers, std::initializer_list<Strides> strides) {
  bool fit = H % kVector<T> == 0;
  for (const void* p : pointers) fit = fit && dev::aligned_16(p);
  for (const Strides& s : strides) fit = fit && s.t % kVector<T> == 0 && s.b % kVector<T> == 0;
  return fit;
}

int64_t rounded_up(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// fp32 [B, H] that goes from step to step
int64_t carried_bytes(Cell cell, int64_t B, int64_t H) {
  return cell == Cell::lstm || cell == Cell::gru ? rounded_up(B * H * int64_t(sizeof(float))) : 0;
}

constexpr int64_t kPartialRows = 64;  // of db_hh

struct BackwardWorkspace {
  int64_t carry, transposed, partial, bytes;  // offsets, and the whole

  BackwardWorkspace(Cell cell, DType dtype, int64_t B, int64_t H)
      : carry(0),
        transposed(carried_bytes(cell, B, H)),
        partial(transposed + rounded_up(gates_of(cell) * H * H * size_of(dtype))),
        bytes(partial + kPartialRows * gates_of(cell) * H * int64_t(sizeof(float))) {}
};

template <Cell C, class T>
int forward(const RnnForward& a, float* workspace, void* stream) {
  const bool aligned = vectors_fit<T>(a.H, {a.h0, a.w_hh, a.y}, {a.y_strides});
  const auto kernel = aligned ? &rnn_forward_step<C, T, true> : &rnn_forward_step<C, T, false>;
  const int64_t first = a.reverse ? a.T - 1 : 0, step = a.reverse ? -1 : 1;
  ForwardStep<T> p{};
  p.B = int(a.B), p.H = int(a.H), p.relu = a.cell == Cell::rnn_relu;
  p.w_hh = static_cast<const T*>(a.w_hh), p.b_hh = static_cast<const T*>(a.b_hh);
  p.h = {static_cast<const T*>(a.h0), a.H};
  p.c0 = static_cast<const T*>(a.c0);
  for (int64_t i = 0, t = first; i < a.T; i++, t += step) {
    p.xg = rows_at<const T>(a.xg, a.xg_strides, t);
    p.y = rows_at<T>(a.y, a.y_strides, t);
    p.gates = rows_at<T>(a.gates, a.gates_strides, t);
    // the LSTM's cell lives in `cells` where the caller keeps it, else in the workspace, as the GRU's fp32 h does
    p.state_out = {workspace, a.H};
    if (C == Cell::lstm && a.cells) p.state_out = rows_at<float>(a.cells, a.cells_strides, t);
    if (i == a.T - 1) p.h_n = static_cast<T*>(a.h_n), p.c_n = static_cast<T*>(a.c_n);
    if (const int error = dev::launch(kernel, step_grid(a.B, a.H), kStepThreads, stream, p)) return error;
    p.h = {p.y.data, p.y.stride};
    p.state = {p.state_out.data, p.state_out.stride};
  }
  return 0;
}

}  // namespace

int rnn_forward_cuda(const RnnForward& a, void* workspace, void* stream) {
  return dev::with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    float* const w = static_cast<float*>(workspace);
    if (a.cell == Cell::lstm) return forward<Cell::lstm, T>(a, w, stream);
    if (a.cell == Cell::gru) return forward<Cell::gru, T>(a, w, stream);
    return forward<Cell::rnn_tanh, T>(a, w, stream);
  });
}

int64_t rnn_workspace_cuda(Cell cell, DType dtype, int64_t B, int64_t H, bool backward) {
  return backward ? BackwardWorkspace(cell, dtype, B, H).bytes : carried_bytes(cell, B, H);
}

namespace {

template <class T>
int launch_db(const RnnBackward& a, int gates, float* partial, void* stream) {
  const bool gru = a.cell == Cell::gru;
  const int width = int(gates * a.H), split = gru ? int(2 * a.H) : width;
  const SequencePair<T> da{
      static_cast<const T*>(a.dxg), static_cast<const T*>(a.dan), a.dxg_strides, a.dan_strides, split, width};
  const int64_t rows = a.T * a.B, turns = (rows + 63) / 64, blocks = turns < kPartialRows ? turns : kPartialRows;
  const dev::Grid grid{(width + kSumColumns - 1) / kSumColumns, blocks};
  const int error = dev::launch(&sequence_sum<T>, grid, kSumThreads, stream, da, partial, rows, a.B, int(blocks));
  const ColumnSum sum{partial, a.db_hh, blocks, width};
  return error ? error : launch_column_sums<float>(sum, sum, 1, stream);
}

template <Cell C, class T>
int backward(const RnnBackward& a, unsigned char* workspace, void* stream) {
  constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;
  const BackwardWorkspace layout(a.cell, a.dtype, a.B, a.H);
  T* const w_t = reinterpret_cast<T*>(workspace + layout.transposed);
  const int H = int(a.H), width = G * H;
  const dev::Grid tiles{(H + kTransposeTile - 1) / kTransposeTile, (width + kTransposeTile - 1) / kTransposeTile};
  int error = dev::launch(&transpose<T>, tiles, kSumThreads, stream, static_cast<const T*>(a.w_hh), w_t, width, H);

  bool aligned = vectors_fit<T>(a.H, {w_t, a.dxg}, {a.dxg_strides});
  if (C == Cell::gru) aligned = aligned && vectors_fit<T>(a.H, {a.dan}, {a.dan_strides});
  const auto kernel = aligned ? &rnn_backward_step<C, T, true> : &rnn_backward_step<C, T, false>;

  // backwards through the order in which the forward pass went
  const int64_t latest = a.reverse ? 0 : a.T - 1, step = a.reverse ? 1 : -1;
  BackwardStep<T> p{};
  p.B = int(a.B), p.H = H, p.relu = a.cell == Cell::rnn_relu;
  p.w_t = w_t, p.carry = reinterpret_cast<float*>(workspace + layout.carry);
  p.dh_n = static_cast<const T*>(a.dh_n), p.dc_n = static_cast<const T*>(a.dc_n);
  p.c0 = static_cast<const T*>(a.c0);
  for (int64_t i = 0, t = latest; i < a.T && !error; i++, t += step) {
    const bool first = i == a.T - 1;
    p.dy = rows_at<const T>(a.dy, a.dy_strides, t);
    p.y = rows_at<const T>(a.y, a.y_strides, t);
    p.gates = rows_at<const T>(a.gates, a.gates_strides, t);
    p.cells = rows_at<const float>(a.cells, a.cells_strides, t);
    p.cells_before = first ? Rows<const float>{} : rows_at<const float>(a.cells, a.cells_strides, t + step);
    p.h_before = first ? Rows<const T>{static_cast<const T*>(a.h0), a.H} : rows_at<const T>(a.y, a.y_strides, t + step);
    p.dxg = rows_at<T>(a.dxg, a.dxg_strides, t);
    p.dan = rows_at<T>(a.dan, a.dan_strides, t);
    error = dev::launch(kernel, step_grid(a.B, a.H), kStepThreads, stream, p);
    p.da = {p.dxg.data, p.dan.data, p.dxg.stride, p.dan.stride, C == Cell::gru ? 2 * H : width, width};
  }
  p.dxg = {};
  p.dh0 = static_cast<T*>(a.dh0), p.dc0 = static_cast<T*>(a.dc0);
  if (!error) error = dev::launch(kernel, step_grid(a.B, a.H), kStepThreads, stream, p);
  if (error || !a.db_hh) return error;
  return launch_db<T>(a, G, reinterpret_cast<float*>(workspace + layout.partial), stream);
}

}  // namespace

int rnn_backward_cuda(const RnnBackward& a, void* workspace, void* stream) {
  return dev::with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    auto* const w = static_cast<unsigned char*>(workspace);
    if (a.cell == Cell::lstm) return backward<Cell::lstm, T>(a, w, stream);
    if (a.cell == Cell::gru) return backward<Cell::gru, T>(a, w, stream);
    return backward<Cell::rnn_tanh, T>(a, w, stream);
  });
}

}  // namespace seqfuse
