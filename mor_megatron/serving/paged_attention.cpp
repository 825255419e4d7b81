// Attention of single queries to paged keys and values, fp32.
//
// Queries [Q, N, D], keys and values [rows, G, D]; query head h reads head h / (N / G). A table is a row of page numbers,
// and row t of it lies in page t / size. Keys are read once for all heads; the softmax runs along with them, with the
// largest score so far, so nothing grows with their number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;  // scores of a head that are kept before the values are added up

template <int64_t WIDTH>  // 0: known at run time only
void attend(const float* query, const float* keys, const float* values, const int32_t* pages, int64_t size, int64_t seen,
            float* out, int64_t heads, int64_t groups, int64_t width, std::vector<float>& work) {
  const int64_t D = WIDTH ? WIDTH : width, share = heads / groups, row = groups * D;
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  work.resize(heads * (BLOCK + 2));
  float *scores = work.data(), *largest = scores + heads * BLOCK, *total = largest + heads;
  std::fill(largest, largest + heads, -std::numeric_limits<float>::max());
  std::fill(total, total + heads, 0.0f);
  std::fill(out, out + heads * D, 0.0f);
  int64_t place[BLOCK];
  for (int64_t begin = 0; begin < seen; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, seen - begin);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin + i;
      place[i] = (pages[t / size] * size + t % size) * row;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const float *q = query + h * D, *k = keys + place[i] + h / share * D;
        float sum = 0.0f;
        for (int64_t d = 0; d < D; ++d) sum += q[d] * k[d];
        scores[h * BLOCK + i] = sum * scale;
      }
    for (int64_t h = 0; h < heads; ++h) {
      float *s = scores + h * BLOCK, top = largest[h], sum = 0.0f;
      for (int64_t i = 0; i < count; ++i) top = std::max(top, s[i]);
      for (int64_t i = 0; i < count; ++i) s[i] = std::exp(s[i] - top);
      for (int64_t i = 0; i < count; ++i) sum += s[i];
      const float fade = std::exp(largest[h] - top);
      total[h] = total[h] * fade + sum;
      largest[h] = top;
      if (fade != 1.0f)
        for (int64_t d = 0; d < D; ++d) out[h * D + d] *= fade;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const float weight = scores[h * BLOCK + i], *v = values + place[i] + h / share * D;
        float* o = out + h * D;
        for (int64_t d = 0; d < D; ++d) o[d] += weight * v[d];
      }
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; ++d) out[h * D + d] /= total[h];
}

}  // namespace

extern "C" void paged_attention(const float* query, int64_t stride, const float* keys, const float* values,
                                const int32_t* table, int64_t pages, int64_t size, const int32_t* which,
                                const int32_t* tables, const int32_t* seen, float* out, int64_t count, int64_t heads,
                                int64_t groups, int64_t width) {
  const auto function = width == 64 ? attend<64> : width == 128 ? attend<128> : width == 32 ? attend<32> : attend<0>;
  std::vector<float> work;
  for (int64_t i = 0; i < count; ++i)
    function(query + which[i] * stride, keys, values, table + tables[i] * pages, size, seen[i],
             out + which[i] * heads * width, heads, groups, width, work);
}
