// From token ids to the logits of many tasks, each row with a head of its own.
//
// Shape letters: P packed tokens, B rows of tokens, T tokens of some rows, H hidden, C outputs.

#pragma once

#include "pass.h"

namespace {

// What stands before the first layer; type may be null. padding: its token has a position of its own, from
// which the others count (RoBERTa); below 0: they count from 0.
struct Embedding {
  const float *word, *position, *type;
  const float *norm_weight, *norm_bias;
  float norm_eps;
  int64_t padding;
};

// How the vectors of some tasks are used. special: ids whose tokens get vectors. place_of_layer: for each layer of
// the backbone which part of the vectors is its own, or -1. column: for each of these parts and each slot which
// vector it gets, or -1; null: its own. by_token: the vector is that of the id; is_shared: the first one;
// everywhere: the last one goes to every token. rank: behind the vectors of a layer stand so many columns of a
// matrix, down, and as many rows of another one, up; each token's state h gets h @ down @ up as well.
struct Plan {
  const int64_t* special;
  int64_t num_special, num_slots, num_vectors, rank;
  int64_t by_token, is_shared, everywhere;
  const int64_t *place_of_layer, *column;
};

enum Pooling : int64_t { FIRST = 0, MEAN = 1, LISTED = 2 };

// As Python hands it over. pass: without added, read, one_each and out. ids, types: (P), types may be null. table:
// vectors. For each row: plan, or -1; first_vector: where its vectors begin; pooling; item_start (B + 1): which of
// `items`, packed tokens, are its own; head_start, head_outputs: rows of `heads`, (H weights, bias); out_start: where
// its logits go.
struct Ask {
  Pass pass;
  Embedding embedding;
  const int64_t *ids, *types;
  const Plan* plans;
  const float* table;
  const int64_t *plan, *first_vector;
  const int64_t *pooling, *item_start, *items;
  const float* heads;
  const int64_t *head_start, *head_outputs, *out_start;
  float* logits;
};

void embed_token(const Embedding& e, int64_t id, int64_t place, int64_t kind, int64_t H, float* out) {
  const float *word = e.word + id * H, *position = e.position + place * H;
  const float* type = e.type ? e.type + kind * H : nullptr;
  for (int64_t k = 0; k < H; k += 16) {
    const __mmask16 lanes = first_lanes(H - k);
    Vec sum = _mm512_maskz_loadu_ps(lanes, word + k);
    if (type) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, type + k));
    _mm512_mask_storeu_ps(out + k, lanes, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, position + k)));
  }
  norm_row(Norm{e.norm_weight, e.norm_bias, e.norm_eps}, out, H, out, nullptr);
}

void embed_row(const Ask& a, int64_t row, int64_t H) {
  const int64_t padding = a.embedding.padding;
  int64_t place = padding < 0 ? -1 : padding;
  for (int64_t i = 0; i < a.pass.length[row]; ++i) {
    const int64_t token = a.pass.start[row] + i, id = a.ids[token];
    const bool is_padding = padding >= 0 && id == padding;
    place += !is_padding;
    embed_token(a.embedding, id, is_padding ? padding : place, a.types ? a.types[token] : 0, H,
                a.pass.hidden + token * H);
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Vec sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, a + k), _mm512_maskz_loadu_ps(lanes, b + k), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

void mean_of(const float* states, int64_t count, int64_t H, float* out) {
  const Vec share = _mm512_set1_ps(static_cast<float>(count));
  for (int64_t k = 0; k < H; k += 16) {
    const __mmask16 lanes = first_lanes(H - k);
    Vec sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, states + i * H + k));
    _mm512_mask_storeu_ps(out + k, lanes, _mm512_div_ps(sum, share));
  }
}

// The special tokens of a row; false if there are more than it has slots.
bool find_slots(const Ask& a, int64_t row, std::vector<Slot>& slots) {
  if (a.plan[row] < 0) return true;
  const Plan& plan = a.plans[a.plan[row]];
  int64_t place = 0;
  for (int64_t token = a.pass.start[row]; token < a.pass.start[row] + a.pass.length[row]; ++token)
    for (int64_t which = 0; which < plan.num_special; ++which)
      if (a.ids[token] == plan.special[which]) slots.push_back({token, row, place++, which});
  return place <= plan.num_slots;
}

constexpr int64_t MOST_RANK = 256;

void add_product(float* state, const float* down, const float* up, int64_t rank, int64_t H) {
  float inner[MOST_RANK];
  for (int64_t r = 0; r < rank; ++r) inner[r] = dot(state, down + r * H, H);
  for (int64_t k = 0; k < H; k += 16) {
    const __mmask16 lanes = first_lanes(H - k);
    Vec sum = _mm512_maskz_loadu_ps(lanes, state + k);
    for (int64_t r = 0; r < rank; ++r)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(inner[r]), _mm512_maskz_loadu_ps(lanes, up + r * H + k), sum);
    _mm512_mask_storeu_ps(state + k, lanes, sum);
  }
}

// Add the products and the vectors of a layer.
void add_vectors(const Ask& a, int64_t layer, int64_t from_row, int64_t to_row, const std::vector<Slot>& slots) {
  const int64_t H = a.pass.heads * a.pass.size;
  auto vectors = [&](int64_t row) -> const float* {  // of the row's task for this layer, or null
    if (a.plan[row] < 0) return nullptr;
    const Plan& plan = a.plans[a.plan[row]];
    const int64_t place = plan.place_of_layer[layer];
    const int64_t num_rows = plan.num_vectors + 2 * plan.rank;
    return place < 0 ? nullptr : a.table + (a.first_vector[row] + place * num_rows) * H;
  };
  for (int64_t row = from_row; row < to_row; ++row) {  // of the states as they are, so before the vectors
    const float* own = vectors(row);
    if (!own || !a.plans[a.plan[row]].rank) continue;
    const Plan& plan = a.plans[a.plan[row]];
    const float* down = own + plan.num_vectors * H;
    for (int64_t i = 0; i < a.pass.length[row]; ++i)
      add_product(a.pass.hidden + (a.pass.start[row] + i) * H, down, down + plan.rank * H, plan.rank, H);
  }
  for (const Slot& slot : slots) {
    const float* own = vectors(slot.row);
    if (!own) continue;
    const Plan& plan = a.plans[a.plan[slot.row]];
    int64_t vector = plan.column ? plan.column[plan.place_of_layer[layer] * plan.num_slots + slot.place] : slot.place;
    if (vector < 0) continue;
    vector = plan.by_token ? slot.which : plan.is_shared ? 0 : vector;
    add_vector(a.pass.hidden + slot.token * H, own + vector * H, nullptr, H);
  }
  for (int64_t row = from_row; row < to_row; ++row) {
    const float* own = vectors(row);
    if (!own || !a.plans[a.plan[row]].everywhere) continue;
    own += (a.plans[a.plan[row]].num_vectors - 1) * H;
    for (int64_t i = 0; i < a.pass.length[row]; ++i) add_vector(a.pass.hidden + (a.pass.start[row] + i) * H, own, nullptr, H);
  }
}

// The packed rows from one to another, from ids to logits; see pastina_ask.
int64_t ask_rows(const Ask& a, int64_t from_row, int64_t to_row, Space& space) {
  const Pass& p = a.pass;
  const int64_t H = p.heads * p.size, first = p.start[from_row];
  bool one_each = true;
  space.slots.clear();
  for (int64_t row = from_row; row < to_row; ++row) {
    if (!find_slots(a, row, space.slots)) return row;
    embed_row(a, row, H);
    one_each = one_each && a.pooling[row] == FIRST;
  }
  const int64_t num_states = one_each ? to_row - from_row : p.start[to_row - 1] + p.length[to_row - 1] - first;
  float *states = room(space.states, num_states * H), *mean = room(space.mean, H);
  pass_rows(p, from_row, to_row, one_each, states, space,
            [&](int64_t layer) { add_vectors(a, layer, from_row, to_row, space.slots); });
  for (int64_t row = from_row; row < to_row; ++row) {
    const float* own = states + (one_each ? row - from_row : p.start[row] - first) * H;
    const float* head = a.heads + a.head_start[row] * (H + 1);
    const int64_t outputs = a.head_outputs[row];
    float* out = a.logits + a.out_start[row];
    auto answer = [&](const float* state) {
      for (int64_t c = 0; c < outputs; ++c) *out++ = dot(state, head + c * (H + 1), H) + head[c * (H + 1) + H];
    };
    if (a.pooling[row] == MEAN) {
      mean_of(own, p.length[row], H, mean);
      answer(mean);
    } else if (a.pooling[row] == FIRST) {
      answer(own);
    } else {
      for (int64_t i = a.item_start[row]; i < a.item_start[row + 1]; ++i) answer(states + (a.items[i] - first) * H);
    }
  }
  return -1;
}

}  // namespace
