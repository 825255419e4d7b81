// Products of a few rows with a weight that was packed once, fp32.
//
// A weight [out, in] is packed into panels of PANEL outputs, [panels, in, PANEL], so that it is read once and in order.
// A block of ROWS x PANEL sums stays in registers. A row's sums are added in the same order whatever rows are beside it.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16, ROWS = 8;  // 24 sums, 3 weights of 32 registers
#else
constexpr int64_t WIDTH = 8, ROWS = 4;  // 12 sums, 3 weights of 16
#endif
constexpr int64_t VECTORS = 3, PANEL = VECTORS * WIDTH;
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float))));

template <int64_t N>
void block(const float* x, int64_t in, const float* panel, float* y, int64_t out, int64_t columns) {
  Vector sums[N][VECTORS] = {};
  for (int64_t k = 0; k < in; ++k, panel += PANEL)
    for (int64_t v = 0; v < VECTORS; ++v) {
      const Vector weight = *reinterpret_cast<const Vector*>(panel + v * WIDTH);
      for (int64_t i = 0; i < N; ++i) sums[i][v] += x[i * in + k] * weight;
    }
  for (int64_t i = 0; i < N; ++i) std::memcpy(y + i * out, sums[i], columns * sizeof(float));
}

template <int64_t N>
void last_rows(int64_t rows, const float* x, int64_t in, const float* panel, float* y, int64_t out, int64_t columns) {
  if constexpr (N > 0) {
    if (rows == N) return block<N>(x, in, panel, y, out, columns);
    last_rows<N - 1>(rows, x, in, panel, y, out, columns);
  }
}

}  // namespace

extern "C" int64_t packed_size(int64_t out, int64_t in) { return (out + PANEL - 1) / PANEL * PANEL * in; }

extern "C" void pack(const float* weight, int64_t out, int64_t in, float* packed) {
  for (int64_t begin = 0; begin < out; begin += PANEL)
    for (int64_t k = 0; k < in; ++k)
      for (int64_t j = begin; j < begin + PANEL; ++j) *packed++ = j < out ? weight[j * in + k] : 0.0f;
}

extern "C" void packed_linear(const float* x, int64_t rows, const float* packed, int64_t out, int64_t in, float* y) {
  for (int64_t begin = 0; begin < out; begin += PANEL, packed += in * PANEL) {
    const int64_t columns = std::min(PANEL, out - begin);
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) block<ROWS>(x + i * in, in, packed, y + i * out + begin, out, columns);
    last_rows<ROWS - 1>(rows - i, x + i * in, in, packed, y + i * out + begin, out, columns);
  }
}
