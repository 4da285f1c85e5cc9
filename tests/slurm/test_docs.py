"""docs/slurm.md shows the scripts that the tests run."""

import re
from pathlib import Path

from slurm_server import EXAMPLES

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"


def test_the_scripts_in_the_documentation_are_those_of_the_examples():
    blocks = re.findall(r"^```sbatch\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    scripts = [path.read_text() for path in EXAMPLES.glob("*.sbatch")]

    assert len(blocks) == 2
    for block in blocks:
        assert any(block in script for script in scripts), block
