"""Columns over a run: what is appended, cut, merged and downsampled."""

import numpy as np
import pytest

from affmae_cli.dashboard.columns import CAPACITY, Columns, downsampled


def test_rows_become_columns_and_what_is_missing_is_nan() -> None:
    found = Columns()
    found.extend([1, 2], [{"loss": 1.0}, {"loss": None, "lr": 0.1}])
    found.extend([3], [{"lr": 0.2, "huge": 1e301}])
    x_N, loss_3N = found.get("loss")
    assert x_N.tolist() == [1, 2, 3] and loss_3N[0, 0] == 1.0 and np.isnan(loss_3N[:, 1:]).all()
    assert found.get("lr")[1][0, 1:].tolist() == [0.1, 0.2] and np.isnan(found.get("huge")[1]).all()
    assert found.last("lr") == 0.2 and found.last("lr", 2) == pytest.approx(0.15) and np.isnan(found.last("no such"))


def test_a_row_that_goes_back_replaces_what_came_from_there_on() -> None:
    found = Columns()
    found.extend([1, 2, 3, 2, 3], [{"loss": float(n)} for n in range(5)])
    assert found.x_N.tolist() == [1, 2, 3] and found.get("loss")[1][0].tolist() == [0, 3, 4]
    found.cut(2)
    assert found.x_N.tolist() == [1]


def test_a_long_run_is_merged_and_keeps_its_mean_and_its_spikes() -> None:
    found, count = Columns(), 5 * CAPACITY
    for start in range(0, count, 1000):
        rows = [{"loss": 1000.0 if n == 4321 else 1.0} for n in range(start, min(start + 1000, count))]
        found.extend(range(start, start + len(rows)), rows)
    x_N, loss_3N = found.get("loss")
    assert CAPACITY // 4 < len(x_N) <= CAPACITY and found.weight_N.sum() == count
    assert loss_3N[2].max() == 1000.0 and loss_3N[1].min() == 1.0
    assert float((loss_3N[0] * found.weight_N).sum()) == pytest.approx(count + 999.0)
    assert np.diff(x_N).max() < 8 * count / CAPACITY  # no part of the run is coarser than another by much


def test_downsampling_keeps_extremes_and_passes_over_nan() -> None:
    y_3N = np.stack([np.where(np.arange(1000) % 2, np.nan, 5.0)] * 3)
    y_3N[2, 500] = 9.0
    x_N, drawn_3N = downsampled(np.arange(1000.0), y_3N, 50)
    assert len(x_N) == 50 and x_N[-1] == 999 and (drawn_3N[0] == 5.0).all() and drawn_3N[2].max() == 9.0
    assert downsampled(np.arange(3.0), y_3N[:, :3], 50)[0].tolist() == [0, 1, 2]
