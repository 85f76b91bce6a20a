"""The table and the plot of the GPU benchmark, from results of no GPU."""

from __future__ import annotations

import json

import gpu_results
import pytest

from benchmarks import gpu_goals, gpu_plot, gpu_report


@pytest.fixture
def result():
    return gpu_results.result(
        gpu_results.case("consistency", "dense", {"triton": 1e-3, "cpp": 1.25e-3}),
        gpu_results.case("confidence", "dense", {"triton": 5e-4}, None, {"cpp": "no CUDA kernel"}),
        gpu_results.case("tiny", "small", {"triton": 1e-4}, None, counts="call_s"),
        gpu_results.case("EMA", "moving average", {"triton": 9e-7, "cpp": None}, None),
        gpu_results.case("loop", "moving average", {"triton": 1e-3}, None, eager_s=None),
    )


def test_table_json_and_plot_are_made_from_results(result, tmp_path):
    gpu_report.write(result, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("fastmt's kernels beside eager PyTorch and torch.compile on one GPU")
    assert "1 of 1 checks passed." in text
    assert "all variants and a large copy (1000 GB/s) take turns" in text
    cells = "1.00 ms | 1.10 ms | 1000 | 100% | 10.0 x | 2.0 x | 5.0 MB | 3 |"
    assert f"| consistency | triton * | {cells}" in text
    cells = "1.25 ms | 1.35 ms | 800 | 80% | 8.0 x | 1.6 x | 5.0 MB | 3 |"
    assert f"| consistency | cpp | {cells}" in text
    assert "| confidence | triton * | 500.0 us | 600.0 us | 2000 | 200% | 20.0 x | - |" in text
    assert "- cpp: no CUDA kernel (confidence)" in text
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    goals = gpu_goals.judged(result["cases"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == {**result, "goals": goals}
    assert not list(tmp_path.glob("*.part"))


def test_small_cases_are_compared_by_the_call(result):
    text = gpu_report.markdown(result)  # 10.1 ms of eager by 0.2 ms
    assert "| tiny | triton * | 100.0 us | 200.0 us | 5000 | 500% | 50.5 x | - |" in text


def test_a_time_on_the_gpu_that_there_is_not_is_a_dash_and_so_is_what_follows_from_it(result):
    text = gpu_report.markdown(result)
    assert "| EMA | cpp | - | 1.00 ms | - | - | - | - | 5.0 MB | 3 |" in text
    assert "| loop | triton * | 1.00 ms | 1.10 ms | 1000 | 100% | - | - |" in text
    assert "| loop | eager | - | 1.00 ms | - | - |  |  |" in text


def test_the_plot_has_a_row_of_panels_for_each_group_and_plain_numbers(result, tmp_path):
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    pyplot.close = kept.append
    try:
        gpu_plot.plot(result, tmp_path / "gpu.png")
    finally:
        pyplot.close = close
    (figure,) = kept
    panels = list(figure.axes)
    titles = [axes.get_title(loc="left") for axes in panels[::2]]
    assert [title.partition(":")[0] for title in titles] == ["Dense", "Small", "Moving average"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["consistency,  Triton (auto)", "CUDA C++", "confidence,  Triton (auto)"]
    assert "1" in [label.get_text() for label in panels[0].get_xticklabels()]
    figure.canvas.draw()
    boxes = [label.get_window_extent() for axes in panels for label in axes.get_yticklabels()]
    assert min(box.x0 for box in boxes) >= 0
    close(figure)


def test_what_cannot_be_plotted_is_told_and_the_figures_stay(result, tmp_path, monkeypatch):
    def fails(result, path):
        raise ValueError("no such font")

    monkeypatch.setattr(gpu_plot, "plot", fails)
    gpu_report.write(result, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert text.endswith("\nNo plot: ValueError: no such font.\n") and "| tiny |" in text


def test_nothing_is_plotted_where_no_kernel_was_timed(tmp_path):
    gpu_report.write(gpu_results.result(gpu_results.case("eager", "dense", {})), tmp_path)
    assert (tmp_path / "gpu.md").exists() and not (tmp_path / "gpu.png").exists()
