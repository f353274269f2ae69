// Frozen transformer layers on packed tokens, forward and back, for processors with AVX-512: what Python calls.
//
// Three kinds of products, all in one shape of loop: a group of numbers that fills four bytes of a row
// (one fp32, two bf16, four int8) is broadcast and multiplied with the same group of 64 outputs. With AMX
// sixteen groups of sixteen rows are, and fp32 is three bf16: tiles.h. Rows are worked on in blocks that stay
// in the caches from one product to the next; a row never depends on others.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, B rows of tokens, H hidden, I intermediate.

#include "ask.h"

namespace {

// work(first row, rows, space) for each block of rows, on several threads; each thread has a space of its own.
template <typename Space, typename Work>
void each_block(int kind, int64_t rows, int threads, Work work) {
  const Blocks blocks(kind, rows, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local Space space;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks.count; ++b) work(blocks.start(b), blocks.start(b + 1) - blocks.start(b), space);
  }
}

// work(first row, row behind, space) for some neighbouring packed rows at a time; returns the largest that it said.
template <typename Work>
int64_t each_share(const Pass& p, int threads, Work work) {
  const std::vector<int64_t> bounds = share_rows(p, threads);
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  int64_t largest = -1;
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, count))) reduction(max : largest)
  {
    thread_local Space space;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, work(bounds[i], bounds[i + 1], space));
  }
  return largest;
}

}  // namespace

extern "C" {

// out (M, N) = x (M, K) @ weight + bias (+ plus); rows of x lie `stride` apart. keys (M) or null: see Rounding.
void pastina_affine(int32_t kind, const Weight* weight, const float* x, int64_t stride, int64_t rows, const float* plus,
                    float* out, const uint64_t* keys, int32_t threads) {
  const Weight& w = *weight;
  each_block<Scratch>(kind, rows, threads, [&](int64_t from, int64_t count, Scratch& scratch) {
    multiply(kind, x + from * stride, stride, count, w, plus ? plus + from * w.outputs : nullptr, w.outputs,
             out + from * w.outputs, w.outputs, Rounding{keys}.from(from), scratch);
  });
}

// See rows_ahead. Kept for the way back, or null: unit1, unit2 (M, H), inverse (2, M), slope (M, I).
void pastina_rows(const Layer* layer, const float* context, const float* residual, int64_t rows, float* out,
                  float* unit1, float* unit2, float* inverse, void* slope, int32_t threads) {
  const Layer& l = *layer;
  const Kept kept{unit1, unit2, inverse, inverse ? inverse + rows : nullptr, slope};
  each_block<Between>(l.kind, rows, threads, [&](int64_t from, int64_t count, Between& between) {
    const int64_t at = from * l.hidden;
    rows_ahead(l, context + at, residual + at, count, out + at, kept.from(from, l), between);
  });
}

// See rows_back and pastina_rows; keys (M) or null: see Rounding.
void pastina_rows_back(const Layer* layer, const float* grad, int64_t rows, float* unit1, float* unit2, float* inverse,
                       void* slope, float* grad_context, float* grad_residual, const uint64_t* keys, int32_t threads) {
  const Layer& l = *layer;
  const Kept kept{unit1, unit2, inverse, inverse + rows, slope};
  each_block<Between>(l.kind, rows, threads, [&](int64_t from, int64_t count, Between& between) {
    const int64_t at = from * l.hidden;
    rows_back(l, grad + at, count, kept.from(from, l), grad_context + at, grad_residual + at,
              Rounding{keys}.from(from), between);
  });
}

// Rows of tokens: start (B), length (B) in packed tokens. q: (P, ...) rows of q_stride numbers, or, with
// one_each, one query for each row. context like q but (..., H); log_sum like q but (..., heads), or null.
void pastina_attend(const float* q, int64_t q_stride, const float* k, const float* v, int64_t kv_stride,
                    const int64_t* start, const int64_t* length, int64_t num_rows, int64_t heads, int64_t size,
                    int32_t one_each, float* context, float* log_sum, int32_t threads) {
  const Heads all{q, k, v, q_stride, kv_stride, start, length, num_rows, heads, size, one_each != 0};
  each_head(all, threads, [&](const Head& h, int64_t first, int64_t, int64_t head, Buffers& buffers) {
    attend(h, context + first * heads * size + head * size, heads * size,
           log_sum ? log_sum + first * heads + head : nullptr, heads, buffers);
  });
}

// Gradients of q, k and v, laid out as these are, given the context's; see pastina_attend.
void pastina_attend_back(const float* grad, const float* q, int64_t q_stride, const float* k, const float* v,
                         int64_t kv_stride, const int64_t* start, const int64_t* length, int64_t num_rows, int64_t heads,
                         int64_t size, int32_t one_each, const float* log_sum, float* grad_q, float* grad_k,
                         float* grad_v, int32_t threads) {
  const Heads all{q, k, v, q_stride, kv_stride, start, length, num_rows, heads, size, one_each != 0};
  each_head(all, threads, [&](const Head& h, int64_t first, int64_t token, int64_t head, Buffers& buffers) {
    const int64_t own = head * size, place = token * kv_stride + own;
    attend_back(h, grad + first * heads * size + own, heads * size, log_sum + first * heads + head, heads,
                grad_q + first * q_stride + own, q_stride, grad_k + place, grad_v + place, kv_stride, buffers);
  });
}

// The input of the first layer, (count, H), of tokens with these ids and positions; types may be null.
void pastina_embed(const Embedding* embedding, const int64_t* ids, const int64_t* positions, const int64_t* types,
                   int64_t count, int64_t H, float* out, int32_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; ++i)
    embed_token(*embedding, ids[i], positions[i], types ? types[i] : 0, H, out + i * H);
}

// Packed rows through all layers; see Pass.
void pastina_pass(const Pass* pass, int32_t threads) {
  const Pass& p = *pass;
  const int64_t H = p.heads * p.size;
  each_share(p, threads, [&](int64_t row, int64_t to_row, Space& space) -> int64_t {
    const int64_t first = p.start[row], behind = p.start[to_row - 1] + p.length[to_row - 1];
    float* out = p.out + (p.one_each ? row : first) * H;
    pass_rows(p, row, to_row, p.one_each, out, space,
              [&](int64_t layer) { add(p.added[layer], first, behind, p.hidden, H); });
    return -1;
  });
}

// From token ids to the logits of many tasks; see Ask. Returns -1, or a row with more special tokens than it has
// slots, and then not all logits are there.
int64_t pastina_ask(const Ask* ask, int32_t threads) {
  return each_share(ask->pass, threads,
                    [&](int64_t row, int64_t to_row, Space& space) { return ask_rows(*ask, row, to_row, space); });
}

}  // extern "C"
