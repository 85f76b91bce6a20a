// softmax_confidence over tiles of pixels. Mirrors reference.softmax_confidence.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::ConfidenceCall;

// What stays of a teacher's tile: exponentials [classes][tile], and three numbers for each pixel.
struct TeacherTile {
  std::unique_ptr<float[], Free> column, member, score, inverse;
  std::unique_ptr<int32_t[], Free> label;

  TeacherTile(int classes, int tile, int members)
      : column(aligned_buffer<float>(classes * row(tile))),
        member(members > 1 ? aligned_buffer<float>(classes * row(tile)) : nullptr),
        score(aligned_buffer<float>(tile)),
        inverse(aligned_buffer<float>(tile)),
        label(aligned_buffer<int32_t>(tile)) {}

  Teacher at(int lane) const {
    return {load(&score[lane]), load(&inverse[lane]), load(&label[lane])};
  }
};

template <Kind KIND, bool WITH_LABEL>
inline void teacher_tile_of(const Pixels& pixels, const View* logits, int members, int classes,
                            float inverse_temperature, int64_t first, int count, int tile,
                            TeacherTile& teacher) {
  if (members == 1) {
    load_tile(pixels, logits[0], first, count, classes, teacher.column.get(), tile);
  } else {
    std::fill_n(teacher.column.get(), classes * row(tile), 0.0f);
    for (int m = 0; m < members; ++m) {
      load_tile(pixels, logits[m], first, count, classes, teacher.member.get(), tile);
      for (int lane = 0; lane < count; lane += W)
        add_member(Column{&teacher.member[lane], row(tile)}, Column{&teacher.column[lane], row(tile)},
                   classes, inverse_temperature);
    }
  }
  for (int lane = 0; lane < count; lane += W) {
    prefetch_pixels(pixels, logits[0], first + tile + lane, classes);
    const Column column{&teacher.column[lane], row(tile)};
    const Teacher result =
        members == 1 ? teacher_pixel<KIND, WITH_LABEL>(column, classes, inverse_temperature)
                     : ensemble_pixel<KIND>(column, classes, members);
    store(&teacher.score[lane], result.score);
    store(&teacher.inverse[lane], result.inverse);
    store(&teacher.label[lane], result.label);
  }
}

// The label is only found if asked for.
template <bool WITH_LABEL>
inline void teacher_tile(Kind kind, const Pixels& pixels, const View* logits, int members,
                         int classes, float inverse_temperature, int64_t first, int count,
                         int tile, TeacherTile& teacher) {
  const auto run = kind == Kind::max_prob  ? teacher_tile_of<Kind::max_prob, WITH_LABEL>
                   : kind == Kind::entropy ? teacher_tile_of<Kind::entropy, WITH_LABEL>
                                           : teacher_tile_of<Kind::margin, WITH_LABEL>;
  run(pixels, logits, members, classes, inverse_temperature, first, count, tile, teacher);
}

inline void confidence(const ConfidenceCall& call, int64_t begin_tile, int64_t end_tile) {
  TeacherTile teacher(call.classes, call.tile, call.members);
  for (int64_t t = begin_tile; t < end_tile; ++t) {
    const int64_t first = t * call.tile;
    const int count = int(std::min<int64_t>(call.tile, call.pixels.count - first));
    teacher_tile<true>(Kind(call.kind), call.pixels, call.logits, call.members, call.classes,
                       call.inverse_temperature, first, count, call.tile, teacher);
    std::copy_n(teacher.score.get(), count, call.score + first);
    std::copy_n(teacher.label.get(), count, call.label + first);
  }
}

}  // namespace FASTMT_ISA
