"""bench.records: figures that pages quote are not replaced by those of something else."""

from pathlib import Path

import pytest

from bench.records import claim_record
from kernels.common.errors import UserError

ROOT = Path(__file__).parents[2]


def test_only_the_command_without_options_replaces_a_record(tmp_path):
    record = tmp_path / "new" / "cpu-activations.md"
    claim_record(record, ["arms=relu"])  # nothing to replace: the folder is made
    assert record.parent.is_dir()
    record.write_text("figures")
    claim_record(record, [])
    claim_record(record, ["arms=relu", f"out={record}"])
    with pytest.raises(
        UserError, match=r"cpu-activations\.md has other figures, .* write those of arms=relu rounds=2 to"
    ):
        claim_record(record, ["arms=relu", "rounds=2"])


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_with_a_record_claims_it(path):
    text = path.read_text(encoding="utf-8")
    assert ('"out": ' in text) == ("claim_record(options" in text)


def test_the_kernels_of_the_readme_are_those_of_the_record():
    row = next(
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "SwiGLU kernel" in line
    )
    for record, cells in (("cpu-activations.md", ("2.15x", "7.2x")), ("cpu-reductions.md", ("1.53x", "2.55x"))):
        page = (ROOT / "bench" / "results" / record).read_text(encoding="utf-8")
        speeds = [
            line.split("|")[5].split()[0] for line in page.splitlines() if "| swiglu | 4096x2816 | bf16 |" in line
        ]
        assert [f"{float(cell[:-1]):g}" for cell in cells] == [
            f"{round(float(speed), len(cell[:-1].split('.')[1])):g}" for speed, cell in zip(speeds, cells, strict=True)
        ]
        assert all(cell in row for cell in cells)
