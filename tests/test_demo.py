"""Stage `demo` on a tiny random teacher: from nothing to a report, and again."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import make_tiny, shrink_demo

from configs import demo as config_file
from instaflow_jax import main
from instaflow_jax.stages.demo import stage as demo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def configured(tiny):
    config = shrink_demo(config_file.get_config(), tiny)
    config.export.formats = ("orbax",)
    return config


@pytest.fixture(scope="module")
def run(tiny, no_drawing, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    main.run(configured(tiny), str(workdir))
    return workdir


class Page(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        fetched = ("src", "srcset", "data", "poster") + (("href",) if tag == "link" else ())
        self.sources += [value for name, value in attributes if name in fetched]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_whole_and_fetches_nothing(run):
    page = Page((run / "report.html").read_text())
    assert len(page.sources) == 4 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "url(" not in (run / "report.html").read_text() and "$" not in page.text
    found = json.loads((run / "evaluate" / "results.json").read_text())
    rows = {(row["model"], row["N"]): row for row in found["rows"]}
    for words in (
        "teacher, 3 steps",
        "2-RF, 1 step",
        "reflow + distil, 1 step",
        "direct distil, 1 step",
        "InstaFlow-0.9B",
        "8 pairs (noise, prompt, picture) by the teacher: 2 steps",
        "2 training steps of 4",
        "CC BY-SA 4.0",
        f"{rows['distill', 1]['fd_emoji']:.1f}",
        f"{rows['teacher', 3]['S']:.4f}",
    ):
        assert words in page.text, words


def test_every_step_left_its_product_and_its_time(run):
    steps = json.loads((run / "demo.json").read_text())["steps"]
    assert list(steps) == [step.name for step in demo.STEPS]
    assert all(note["seconds"] > 0 and note["runs"] == 1 for note in steps.values())
    assert all((run / step.product).is_file() for step in demo.STEPS)


def test_a_second_run_reuses_everything(run, tiny, monkeypatch, capsys):
    def never(config, workdir):
        raise AssertionError("this was finished before")

    monkeypatch.setattr(demo, "STEPS", tuple(step._replace(run=never) for step in demo.STEPS))
    (run / "report.html").unlink()
    main.run(configured(tiny), str(run))
    said = capsys.readouterr().out
    assert len(re.findall(r"\[\d/7\] .*: finished before, in ", said)) == 6 and "everything is there" in said
    assert said.rstrip().endswith(str((run / "report.html").absolute())) and (run / "report.html").is_file()


def test_a_run_that_was_broken_off_goes_on_where_it_was(run, tiny, tmp_path, monkeypatch, capsys):
    """Killed in evaluation: that and what comes after it are done, and counted as a second run of the step."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    ledger = json.loads((copy / "demo.json").read_text())
    del ledger["steps"]["evaluate"]["seconds"], ledger["steps"]["export"]
    (copy / "demo.json").write_text(json.dumps(ledger))
    taken = []
    monkeypatch.setattr(
        demo,
        "STEPS",
        tuple(step._replace(run=lambda config, workdir: taken.append(config.stage)) for step in demo.STEPS),
    )
    main.run(configured(tiny), str(copy))
    assert taken == ["evaluate", "export"]
    assert "in the last of 2 runs" in (copy / "report.html").read_text()
    assert "[5/7] evaluation of all of them  (00:00 gone, about " in capsys.readouterr().out


def test_other_training_settings_are_refused_by_name(run, tiny):
    config = configured(tiny)
    config.distill.loop.steps = 3
    config.generate.N = 1
    with pytest.raises(ValueError, match="begun with another generate.N.*take another --workdir"):
        main.run(config, str(run))
    config.generate.N = 2
    with pytest.raises(ValueError, match="begun with another distill.loop.steps"):
        main.run(config, str(run))


def test_a_network_that_is_gone_is_not_made_again_beside_what_came_of_it(run, tiny, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "reflow" / "export")
    with pytest.raises(ValueError, match="reflow/export/model_index.json is not there, but .*distill/export"):
        main.run(configured(tiny), str(copy))


def test_the_promise_names_every_step():
    config = config_file.get_config()
    assert set(config.minutes) == {step.name for step in demo.STEPS}
    assert config.generate is config.reflow.pairs
