"""The README's picture: that it is there, and that its script draws one from a job."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from din_dist.config import Split
from tests.benchmarks import picture
from tests.support.repository import ROOT
from tests.support.small_log import small_config
from tests.support.trained_job import write_job


def test_the_readme_shows_a_small_picture() -> None:
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", (ROOT / "README.md").read_text())
    path = ROOT / name
    assert path.stat().st_size < 60_000
    assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_script_draws_what_the_model_does(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT, evaluation_negatives_per_positive=3)
    write_job(config)
    bought, drawn = picture.find(Path(config.job.output_dir))
    assert (bought.label, drawn.label) == (1, 0)
    assert bought.user == drawn.user
    assert [behaviour.item for behaviour in bought.behaviours] == [behaviour.item for behaviour in drawn.behaviours]
    path = tmp_path / "picture.svg"
    picture.main([str(path), f"--job={config.job.output_dir}"])
    texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    for example in (bought, drawn):
        assert f"click probability {example.probability:.2f}" in texts
        for behaviour in example.behaviours:
            assert behaviour.category in texts
            assert f"{behaviour.weight:.2f}" in texts
