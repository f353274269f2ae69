// Whole rows through all layers, for answers: nobody waits for others between layers.
//
// Shape letters: P packed tokens, T tokens of some rows, N states that are read, H hidden.

#pragma once

#include "attention.h"
#include "rows.h"

namespace {

// delta + scale * input is added to the input of a layer at these tokens; scale may be null.
struct Added {
  const int64_t* tokens;
  const float *delta, *scale;
  int64_t count;
};

// As Python hands it over. read: the tokens whose states are wanted, or null: all; one_each: the first token
// of each row.
struct Pass {
  const Layer* const* layers;
  int64_t num_layers, heads, size;
  const int64_t *start, *length;
  int64_t num_rows;
  const Added* added;  // for each layer; not read by pass_rows
  const int64_t* read;
  int64_t num_read;
  int32_t one_each;
  float *hidden, *out;  // (P, H), written over; (N, H)
};

// A special token: which one of its row, and which of the special tokens.
struct Slot {
  int64_t token, row, place, which;
};

// What a thread needs for the rows that it works on.
struct Space {
  std::vector<float> qkv, queries, context, residual, chosen, states, mean;
  std::vector<int64_t> places;
  std::vector<Slot> slots;
  Buffers buffers;
  Between between;
};

inline float* room(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// own += delta (+ scale * own); scale may be null.
void add_vector(float* own, const float* delta, const float* scale, int64_t H) {
  for (int64_t k = 0; k < H; k += 16) {
    const __mmask16 lanes = first_lanes(H - k);
    const Vec x = _mm512_maskz_loadu_ps(lanes, own + k);
    Vec more = _mm512_maskz_loadu_ps(lanes, delta + k);
    if (scale) more = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(lanes, scale + k), more);
    _mm512_mask_storeu_ps(own + k, lanes, _mm512_add_ps(x, more));
  }
}

void add(const Added& a, int64_t first, int64_t behind, float* hidden, int64_t H) {
  for (int64_t r = 0; r < a.count; ++r)
    if (a.tokens[r] >= first && a.tokens[r] < behind)
      add_vector(hidden + a.tokens[r] * H, a.delta + r * H, a.scale ? a.scale + r * H : nullptr, H);
}

void behind_attention(const Layer& l, const float* context, const float* residual, int64_t rows, float* out,
                      Between& between) {
  for (int64_t from = 0; from < rows; from += BLOCK)
    rows_ahead(l, context + from * l.hidden, residual + from * l.hidden, std::min(BLOCK, rows - from),
               out + from * l.hidden, {}, between);
}

// Of the states of some tokens those that are read.
void read_states(const Pass& p, const Layer& l, int64_t first, int64_t behind, const float* context, Space& space) {
  const int64_t H = l.hidden;
  space.places.clear();
  for (int64_t n = 0; n < p.num_read; ++n)
    if (p.read[n] >= first && p.read[n] < behind) space.places.push_back(n);
  const int64_t count = static_cast<int64_t>(space.places.size());
  float *chosen = room(space.chosen, count * H), *residual = room(space.residual, count * H);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = p.read[space.places[i]];
    std::memcpy(chosen + i * H, context + (token - first) * H, H * sizeof(float));
    std::memcpy(residual + i * H, p.hidden + token * H, H * sizeof(float));
  }
  behind_attention(l, chosen, residual, count, residual, space.between);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(p.out + space.places[i] * H, residual + i * H, H * sizeof(float));
}

// The packed rows from one to another through all layers. out: for the states of these rows, if not p.read; one
// for each row with one_each, else one for each token. add(layer): to the input of each layer.
template <typename Add>
void pass_rows(const Pass& p, int64_t from_row, int64_t to_row, bool wants_one, float* out, Space& space, Add add) {
  const int64_t first = p.start[from_row], behind = p.start[to_row - 1] + p.length[to_row - 1];
  const int64_t num_tokens = behind - first, num_rows = to_row - from_row, H = p.heads * p.size;
  float *own = p.hidden + first * H, *context = room(space.context, num_tokens * H);
  for (int64_t i = 0; i < p.num_layers; ++i) {
    const Layer& l = *p.layers[i];
    const bool is_last = i + 1 == p.num_layers, one_each = is_last && wants_one;
    add(i);
    const Weight& w = one_each ? l.key_value : l.qkv;
    float* qkv = room(space.qkv, num_tokens * w.outputs);
    multiply_blocks(l.kind, own, num_tokens, w, qkv, space.between.scratch);
    const float *q = qkv, *k = qkv + (one_each ? 0 : H);
    float* residual = own;
    if (one_each) {
      residual = room(space.residual, num_rows * H);
      for (int64_t r = 0; r < num_rows; ++r)
        std::memcpy(residual + r * H, p.hidden + p.start[from_row + r] * H, H * sizeof(float));
      float* queries = room(space.queries, num_rows * H);
      multiply_blocks(l.kind, residual, num_rows, l.query, queries, space.between.scratch);
      q = queries;
    }
    const int64_t q_stride = one_each ? H : w.outputs;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t token = p.start[from_row + r] - first, length = p.length[from_row + r], query = one_each ? r : token;
      for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t at = token * w.outputs + head * p.size;
        const Head h{q + query * q_stride + head * p.size, k + at, k + H + at, q_stride, w.outputs,
                     one_each ? 1 : length, length, p.size};
        attend(h, context + query * H + head * p.size, H, nullptr, 0, space.buffers);
      }
    }
    if (one_each)
      behind_attention(l, context, residual, num_rows, out, space.between);
    else if (is_last && p.read)
      read_states(p, l, first, behind, context, space);
    else
      behind_attention(l, context, own, num_tokens, is_last ? out : own, space.between);
  }
}

// Neighbouring rows that a thread works on at a time: about a block of tokens, as many for each thread.
std::vector<int64_t> share_rows(const Pass& p, int threads) {
  const int64_t num_tokens = p.start[p.num_rows - 1] + p.length[p.num_rows - 1];
  const int64_t rounds = std::max<int64_t>(1, num_tokens / (BLOCK * threads));
  const int64_t wanted = (num_tokens + rounds * threads - 1) / (rounds * threads);
  std::vector<int64_t> bounds{0};
  int64_t tokens = 0;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (tokens && tokens + p.length[r] / 2 > wanted) {
      bounds.push_back(r);
      tokens = 0;
    }
    tokens += p.length[r];
  }
  bounds.push_back(p.num_rows);
  return bounds;
}

}  // namespace
