// consistency_loss on cells, with the gradient. Mirrors reference.consistency_loss and
// csrc/cpu/consistency_kernel.h.
#pragma once

#include "cuda/cells.h"
#include "cuda/gradient.h"
#include "cuda/powers.h"

namespace fastmt::cuda {

enum class Weight { mask, confidence, ratio, none };

struct Sums {
  enum { loss, weight, score, selected, valid };
};

// What a call says of the thread's pixel in row i, asked for long before it is needed.
struct GivenWeight {
  uint8_t valid = 1;
  float weight = 1;

  FASTMT_INLINE GivenWeight(const ConsistencyCells& call, const Place& place, int i) {
    if (!call.valid.data && !call.pixel_weight.data) return;  // past all of their addresses
    const int32_t row = place.first_row + i;
    if (call.valid.data) valid = value_at<uint8_t>(call.valid, place.image, row, place.column());
    if (call.pixel_weight.data)
      weight = value_at<float>(call.pixel_weight, place.image, row, place.column());
  }
};

// The weight of a pixel; `limit` is the threshold of the first class, asked for long before too.
// "ratio" is 1 here: its factor is only known when every pixel has been counted.
FASTMT_INLINE float weigh(const ConsistencyCells& call, Block& block, const Teacher& teacher,
                          const GivenWeight& given, float limit) {
  if (!given.valid || !block.place.inside()) return 0;
  const Weight kind = Weight(call.weight);
  if (call.threshold_by_label) limit = call.threshold[teacher.label];
  const bool passing = call.strict ? teacher.score > limit : teacher.score >= limit;
  float weight = kind > Weight::confidence || passing ? 1.0f : 0.0f;
  if (kind == Weight::confidence && passing) weight = teacher.score;
  if (weight != 0.0f) weight *= given.weight;
  block.tally.count(true, passing);
  block.tally.add(Sums::score, teacher.score);
  block.tally.add(Sums::weight, weight);
  return weight;
}

FASTMT_INLINE void put_sums(Block& block) {
  block.tally.add_counts(Sums::valid, Sums::selected);
  block.tally.put(block.cells);
}

// The weight of a pixel with the share of one class in it.
FASTMT_INLINE float scaled_weight(const ConsistencyCells& call, float weight) {
  return weight * call.class_share;
}

FASTMT_INLINE void put_tiles(const ConsistencyCells& call, const Block& block) {
  block.put_tile();
  for (int m = 0; m < call.members; ++m) block.tile.put(m + 1, call.teacher[m], block.place);
  __syncthreads();
}

FASTMT_INLINE Block block_of(const ConsistencyCells& call, float* shared) {
  const Block block(call.cells, shared);
  put_tiles(call, block);
  return block;
}

template <Loss LOSS>
struct constant {
  static constexpr Loss value = LOSS;
};

template <int C>
FASTMT_INLINE Teacher believe(const ConsistencyCells& call, Loss loss, Powers<C>& teacher) {
  const Column y = teacher.at();
  if (Kind(call.kind) == Kind::margin) return teacher_of_powers<Kind::margin, true>(y, C);
  return call.threshold_by_label || loss == Loss::ce
             ? teacher_of_powers<Kind::max_prob, true>(y, C)
             : teacher_of_powers<Kind::max_prob, false>(y, C);
}

// One teacher scored by "max_prob" or "margin".
template <Loss LOSS, int C>
FASTMT_INLINE void walk_powers(const ConsistencyCells& call, float* shared) {
  const Grid &student_grid = call.cells.first, &teacher_grid = call.teacher[0];
  Block block(call.cells, shared);
  const Place& place = block.place;
  const Tile& tile = block.tile;
  put_tiles(call, block);
  const auto student_column = [&] { return tile.column_at(0); };
  const auto teacher_column = [&] { return tile.column_at(1); };
  const Stage<C> student_stage(block.stage, call.cells.reach, tile.first(0),
                               LOSS == Loss::ce ? block.weights : nullptr);
  const Stage<C> teacher_stage(block.stage + call.cells.reach * Stage<C>::COLUMN,
                               call.teacher_reach, tile.first(1), nullptr);
  Corners<C> corners{};
  each_level(block, corners, [&](int32_t band, int begin, int end) {
    const int32_t teacher_row = tile.row_at(1, begin).at.index;
    const auto of_student = student_stage.ask(student_grid, place.image, band);
    const auto of_teacher = teacher_stage.ask(teacher_grid, place.image, teacher_row);
    student_stage.bring(student_grid, place.image, band, of_student);
    teacher_stage.bring(teacher_grid, place.image, teacher_row, of_teacher);
    __syncthreads();
    Powers<C> student, teacher;
    for (int i = begin; i < end; ++i) {
      const GivenWeight given(call, place, i);
      const Row row = tile.row_at(0, i), teacher_at = tile.row_at(1, i);
      if (teacher_at.move == Move::enter && row.move != Move::enter) {
        __syncthreads();
        teacher_stage.bring(teacher_grid, place.image, teacher_at.at.index);
        __syncthreads();
      }
      teacher.go_to(teacher_stage, teacher_column, teacher_at, teacher_grid.step(),
                    call.inverse_temperature);
      const float limit = call.threshold[0];
      const Teacher belief = believe(call, LOSS, teacher);
      const float weight = weigh(call, block, belief, given, limit);
      if (!any(weight != 0.0f)) {
        student.skip();
        continue;
      }
      student.go_to(student_stage, student_column, row, student_grid.step(), 1.0f);
      if (weight == 0.0f) continue;
      const float scaled = scaled_weight(call, weight);
      const Student state = student_of<LOSS == Loss::ce>(student, student_stage, student_column,
                                                         row.at, belief.label);
      const float value =
          loss_of_powers<LOSS>(student.at(), teacher.at(), state, belief,
                               scaled * call.gradient_scale, corners.at(row.at.t), C);
      block.tally.add(Sums::loss, scaled * value);
    }
  });
  put_sums(block);
}

// "mse". Registers of a thread: power and ratio of two networks and two sums of the gradient, 6 C;
// what is left bounds the blocks that fit.
template <int C>
__global__ void __launch_bounds__(FIXED_TILE, C <= 19 ? 3 : 2)
    cells_consistency_powers_kernel(const __grid_constant__ ConsistencyCells call) {
  extern __shared__ float shared[];
  walk_powers<Loss::mse, C>(call, shared);
}

template <int C>
__global__ void __launch_bounds__(FIXED_TILE, C <= 19 ? 3 : 2)
    cells_consistency_ce_powers_kernel(const __grid_constant__ ConsistencyCells call) {
  extern __shared__ float shared[];
  walk_powers<Loss::ce, C>(call, shared);
}

// The teachers of the pixel in row i: their probabilities are y * inverse; `scratch` is used up.
FASTMT_INLINE Teacher look(const ConsistencyCells& call, const Block& block, int i, Column y,
                           Column scratch, int classes) {
  const float scale = call.inverse_temperature;
  const Kind kind = Kind(call.kind);
  const auto logits = [&](int m, Column to) {
    const Grid& grid = call.teacher[m];
    const Across across(grid, block.place.image, block.tile.column_at(m + 1));
    interpolate(grid, across, block.tile.row_at(m + 1, i).at, classes, to);
  };
  if (call.members == 1) {
    logits(0, y);
    if (kind == Kind::max_prob) return teacher_pixel<Kind::max_prob>(y, classes, scale);
    if (kind == Kind::entropy) return teacher_pixel<Kind::entropy>(y, classes, scale);
    return teacher_pixel<Kind::margin>(y, classes, scale);
  }
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) y[c] = 0;
  for (int m = 0; m < call.members; ++m) {
    logits(m, scratch);
    add_member(scratch, y, classes, scale);
  }
  if (kind == Kind::max_prob) return ensemble_pixel<Kind::max_prob>(y, classes, call.members);
  if (kind == Kind::entropy) return ensemble_pixel<Kind::entropy>(y, classes, call.members);
  return ensemble_pixel<Kind::margin>(y, classes, call.members);
}

// "bce" has logarithms of every class under way at once, too many for registers.
template <bool WITH_BCE, class Gradient>
FASTMT_INLINE float loss_of_logits(Loss loss, Column z, Column y, const Teacher& belief,
                                   float coefficient, Gradient gradient, int classes) {
  const auto of = [&](auto which) {
    return consistency_pixel<which.value>(z, y, belief, coefficient, gradient, classes);
  };
  switch (loss) {
    case Loss::mse:
      return of(constant<Loss::mse>());
    case Loss::kl:
      return of(constant<Loss::kl>());
    case Loss::soft_ce:
      return of(constant<Loss::soft_ce>());
    case Loss::ce:
      return of(constant<Loss::ce>());
    case Loss::js:
      return of(constant<Loss::js>());
    default:
      if constexpr (WITH_BCE) return of(constant<Loss::bce>());
      return 0;
  }
}

// The pixel in row i from its logits; its weight.
template <bool WITH_BCE, class Gradient>
FASTMT_INLINE float visit(const ConsistencyCells& call, Block& block, int i, Column z,
                          Column y, Gradient gradient, int classes) {
  const float limit = call.threshold[0];
  const Teacher belief = look(call, block, i, y, z, classes);
  const GivenWeight given(call, block.place, i);
  const float weight = weigh(call, block, belief, given, limit);
  if (weight == 0.0f) return weight;
  const Across across(call.cells.first, block.place.image, block.tile.column_at(0));
  interpolate(call.cells.first, across, block.tile.row_at(0, i).at, classes, z);
  const Loss loss = Loss(call.loss);
  const float scaled = scaled_weight(call, weight);
  const float value = loss_of_logits<WITH_BCE>(loss, z, y, belief, scaled * call.gradient_scale,
                                               gradient, classes);
  block.tally.add(Sums::loss, scaled * value);
  return weight;
}

// Any loss but "bce", any score and number of teachers, from logits that the first-level cache
// hands out again in every row.
template <int C>
__global__ void __launch_bounds__(FIXED_TILE, 2)
    cells_consistency_logits_kernel(const __grid_constant__ ConsistencyCells call) {
  extern __shared__ float shared[];
  Block block = block_of(call, shared);
  SharedCorners<C> corners(block);
  float z[C], y[C];
  each_level(block, corners, [&](int32_t, int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const auto gradient = corners.at(block.tile.row_at(0, i).at.t);
      visit<false>(call, block, i, Column{z, 1}, Column{y, 1}, gradient, C);
    }
  });
  put_sums(block);
}

// Any number of classes: the columns of the tile lie in shared memory, [classes][tile], and the
// gradient is taken out of them row by row.
__global__ void __launch_bounds__(256, 2)
    cells_consistency_loop_kernel(const __grid_constant__ ConsistencyCells call) {
  extern __shared__ float shared[];
  const int classes = call.cells.classes;
  Block block = block_of(call, shared);
  const Column z{block.rows + threadIdx.x, block.pitch};
  const Column y{z.at + int64_t(classes) * block.pitch, block.pitch};
  if (call.cells.partial) clear_rows(block);
  for (int i = 0; i < block.place.rows; ++i) {
    block.weights[threadIdx.x] = visit<true>(call, block, i, z, y, z, classes);
    if (call.cells.partial) put_row(block, block.tile.row_at(0, i).at);
  }
  put_sums(block);
}

}  // namespace fastmt::cuda
