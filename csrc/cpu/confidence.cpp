#include "cpu/cells_host.h"
#include "cpu/host.h"

namespace fastmt {

namespace {

void run_dense(ConfidenceCall call, const std::vector<Tensor>& logits) {
  std::vector<View> views(logits.size());
  std::vector<Operand> operands;
  for (size_t m = 0; m < logits.size(); ++m) operands.push_back({&views[m], &logits[m], true});
  call.pixels = describe(operands);
  call.logits = views.data();
  call.tile = tile_size(call.classes);
  const int64_t tiles = (call.pixels.count + call.tile - 1) / call.tile;
  for_each_stretch(tiles, 16, [&](int64_t begin, int64_t end) {
    kernels().confidence(call, begin, end);
  });
}

void run_cells(const ConfidenceCall& call, const std::vector<Tensor>& logits,
               const std::vector<int64_t>& size, bool align_corners) {
  const CellTables tables(logits[0], logits, size[0], size[1], align_corners);
  share_out(tables.groups(),
            [&](Queue& groups) { kernels().cells_confidence(call, tables.cells, groups); });
}

}  // namespace

std::tuple<Tensor, Tensor> softmax_confidence(const std::vector<Tensor>& logits, int64_t kind,
                                              double inverse_temperature,
                                              const std::optional<std::vector<int64_t>>& size,
                                              bool align_corners) {
  for (const Tensor& member : logits) check_floating("logits", member);
  const Tensor& first = logits[0];
  std::vector<int64_t> out{first.size(0)};
  for (int64_t d = 2; d < first.dim(); ++d) out.push_back(size ? (*size)[d - 2] : first.size(d));
  Tensor score = torch::stable::new_empty(first, out, ScalarType::Float);
  Tensor label = torch::stable::new_empty(first, out, ScalarType::Long);
  if (score.numel() == 0) return {score, label};

  ConfidenceCall call{};
  call.members = int(logits.size());
  call.classes = int(first.size(1));
  call.kind = int(kind);
  call.inverse_temperature = float(inverse_temperature);
  call.score = static_cast<float*>(score.data_ptr());
  call.label = static_cast<int64_t*>(label.data_ptr());
  if (size)
    run_cells(call, logits, *size, align_corners);
  else
    run_dense(call, logits);
  return {score, label};
}

}  // namespace fastmt
