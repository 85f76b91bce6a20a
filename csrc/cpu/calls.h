// What the host tells the kernels of a call, and the table of kernels of each instruction set.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastmt {

constexpr int MAX_RANK = 8;
constexpr int MAX_CLASSES = 4096;

enum class Type : int32_t { float32, bfloat16, float16, uint8, int64 };

// The output pixels (N, *spatial), dimensions merged where every operand allows it.
struct Pixels {
  int rank = 0;
  int64_t size[MAX_RANK];
  int64_t count = 1;
};

// One operand over these pixels: (N, C, *spatial) or a map (N, *spatial); strides in elements.
struct View {
  void* data = nullptr;
  Type type = Type::float32;
  bool streams = false;  // is written past the caches
  int64_t class_stride = 0;
  int64_t stride[MAX_RANK];
};

struct ConfidenceCall {
  Pixels pixels;
  const View* logits;
  int members, classes, tile, kind;
  float inverse_temperature;
  float* score;
  int64_t* label;
};

struct ConsistencySums {
  double loss, weight, score;
  int64_t selected, valid;
};

struct ConsistencyCall {
  Pixels pixels;
  View student, gradient, pixel_weight, valid;  // the last three may have no data
  const View* teacher;
  int members, classes, tile;
  int loss, kind, weight;
  bool strict;
  float class_share;  // of a mean over classes, else 1
  float inverse_temperature, gradient_scale;
  const float* threshold;
  bool threshold_by_label;
  ConsistencySums* sums;  // one for each tile
};

struct CrossEntropySums {
  double loss, weight;
  int64_t valid, wrong;
};

struct CrossEntropyCall {
  Pixels pixels;
  View logits, labels, gradient, pixel_weight;  // the last two may have no data
  const float* class_weight;                    // may be null
  float mean_class_weight;
  int classes, tile;
  int64_t ignore_index;
  float label_smoothing, gradient_scale;
  CrossEntropySums* sums;  // one for each tile
};

struct NoiseCall {
  const void* images;
  void* noisy;
  Type type;
  int64_t count;
  uint64_t seed;
  float sigma, clip;
  bool clamp;
};

// What a teacher does with a value, as in fastmt/ema_bound.py.
enum class EmaMode : int64_t { average, copy, keep, stochastic, kahan };

// A row of a table of tensor pairs. Elements are of floating types, or bytes, which are copied.
struct EmaRow {
  int64_t teacher, student, length;  // the first two addresses
  int64_t teacher_type, student_type;
  int64_t owner;  // which of the decays and draws are its
  EmaMode mode;
  int64_t number;  // mixed, of the random numbers
  int64_t lost;    // address of what rounding has lost, of EmaMode::kahan
};

// How an average is stored in half precision: to the nearest; up or down at random, right on
// average; or with what the rounding lost kept beside it.
enum class Rounding : int { nearest, stochastic, kahan };

// Elements [begin, end) of one tensor pair.
struct EmaSpan {
  void* teacher;
  const void* student;
  Type teacher_type, student_type;
  int64_t begin, end;
  Rounding rounding = Rounding::nearest;
  uint32_t key = 0;              // of the random numbers
  void* compensation = nullptr;  // what rounding has lost, in the teacher's dtype
};

// Low-resolution logits (N, C, height, width) and where every output row and column falls between
// theirs: after index[o], by the fraction t[o].
struct Grid {
  View view;  // strides of N, height, width
  int height, width;
  const int32_t *row_index, *column_index;
  const float *row_t, *column_t;
  float row_delta;             // between two output rows
  const int32_t* row_origin;   // [output row]: the row from which on each lies row_delta behind
                               // the one before
};

// The output columns by cell. A cell lies between columns x and x + 1 of the low resolution, the last
// one between the last column and the first: it holds the pixels beyond both borders. A chunk is as
// many cells as a vector has floats, and a step takes two neighbouring pixels of each: entry s of
// chunk k names the output columns of the left ones, then of the right ones, -1 where there is none.
struct Lanes {
  int chunks;
  const int32_t* steps;    // of each chunk
  const int32_t* start;    // its first entry in the three tables below
  const int32_t* column;   // [entry][left, right][cell]
  const float* t;          // [entry][left, right][cell]
  const int32_t* origin;   // [entry]: the step from which on every t is the one before plus 2 delta
  const float* delta;      // [chunk][cell]: from one pixel to the next
};

// A call on cells: images, the bands of rows between two low-resolution rows, and groups of bands
// that one thread walks in order.
struct Cells {
  int64_t images;
  int out_height, out_width, classes;
  int bands, bands_in_group, groups;  // of one image
  const int32_t* band_start;          // [bands + 1]: its first output row
  Lanes lanes;
  Grid first;         // what the lanes are made of, and what gets the gradient
  const Grid* others;
  float* edges;  // [images][groups][2][classes][width]: gradients of rows that two groups share
};

// Numbers below `count`, handed to whichever thread is free.
struct Queue {
  int64_t count;
  std::atomic<int64_t> next{0};
};

struct Kernels {
  const char* name;
  int lanes;  // pixels that are worked on at once
  void (*confidence)(const ConfidenceCall&, int64_t begin_tile, int64_t end_tile);
  void (*consistency)(const ConsistencyCall&, int64_t begin_tile, int64_t end_tile);
  void (*cross_entropy)(const CrossEntropyCall&, int64_t begin_tile, int64_t end_tile);
  void (*label_sums)(const CrossEntropyCall&, int64_t begin_tile, int64_t end_tile);
  void (*cells_confidence)(const ConfidenceCall&, const Cells&, Queue& groups);
  void (*cells_consistency)(const ConsistencyCall&, const Cells&, Queue& groups);
  void (*cells_cross_entropy)(const CrossEntropyCall&, const Cells&, Queue& groups);
  void (*cells_join)(const View& gradient, const Cells&, int64_t begin, int64_t end);
  void (*gaussian_noise)(const NoiseCall&, int64_t begin_group, int64_t end_group);
  void (*ema)(const EmaSpan&, double decay);
  void (*scale)(void* data, Type type, int64_t begin, int64_t end, float factor);
};

// The kernels for the widest instruction set that this processor has.
const Kernels& kernels();

}  // namespace fastmt
