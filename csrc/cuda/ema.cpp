#include "cuda/host.h"

namespace fastmt::cuda {

// `table` of EmaRow, `starts` (rows + 1), `decays`, float64, and `draws`, int64, as in EmaCall; all
// on the device.
void ema_update_(const Tensor& table, const Tensor& starts, const Tensor& decays,
                 const std::optional<Tensor>& draws) {
  if (table.size(0) == 0) return;
  STD_TORCH_CHECK(decays.is_cpu() == table.is_cpu(),
                  "decays: a tensor on the CPU, expected the device of the tensors");
  STD_TORCH_CHECK(!draws || draws->is_cpu() == table.is_cpu(),
                  "draws: a tensor on the CPU, expected the device of the tensors");
  const OnDevice device(table);
  EmaCall call{};
  call.table = data_of<const EmaRow>(table);
  call.starts = data_of<const int64_t>(starts);
  call.rows = table.size(0);
  call.decays = data_of<const double>(decays);
  call.draws = draws ? data_of<const int64_t>(*draws) : nullptr;
  launch_ema(call, device.stream);
}

// data *= scale * factor in place, for a dense tensor; both factors are 0-dim float32 on its
// device.
void scale_(Tensor data, const Tensor& scale, const Tensor& factor) {
  if (data.numel() == 0) return;
  const OnDevice device(data);
  launch_scale({data.data_ptr(), type_of(data), data.numel(), data_of<const float>(scale),
                data_of<const float>(factor)},
               device.stream);
}

}  // namespace fastmt::cuda
