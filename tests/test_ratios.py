"""What ``fastens bench`` shows of a result."""

import json

import pytest

from fastens import ratios
from fastens.cli import main


@pytest.fixture
def result(tmp_path):
    def benchmark(batch, seconds, theirs):
        return {
            "name": "test_eager",
            "group": f"C2 forward, batch {batch}",
            "stats": {"median": seconds},
            "extra_info": {
                "shape": "8x8",
                "rivals": {"eager loop": [theirs * 0.9, theirs, theirs * 1.1]},
                "wanted": {"eager loop": 10},
                "peak_bytes": {"ours": 2**21, "eager loop": 2**20},
                "scale": {"network": "C2", "K": 5, "B": batch, "dtype": "float32"},
            },
        }

    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps({"benchmarks": [benchmark(1, 0.001, 0.02), benchmark(4, 0.002, 0.03), benchmark(16, 0.01, 0.05)]})
    )
    return path


def test_scaling_has_a_panel_for_what_varies(result):
    lines = ratios._scaling_lines(ratios.read(result))
    panel = {"ours": {1: 0.001, 4: 0.002, 16: 0.01}, "eager loop": {1: 0.02, 4: 0.03, 16: 0.05}}
    assert lines == {("C2", "float32", "K = 5", "B"): panel}


def test_memory_stands_beside_time(result):
    table = ratios.memory_table(ratios.read(result))
    assert "| C2 forward, batch 1 | eager loop | 2.0 | 1.0 | 2.00 | 20.00 |" in table
    assert ratios.memory_table([{**row, "peak_theirs": 0} for row in ratios.read(result)]) == ""


def test_bench_writes_tables_and_plots(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main(["bench", "--json", str(result), "--out", str(tmp_path / "out")])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"ratios.md", "ratios.png", "scaling.png", "memory.md"}
    assert "20.00 | 10 |" in capsys.readouterr().out
