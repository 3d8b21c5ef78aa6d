"""Stage `demo` on a tiny random teacher: the first run, later runs, and the report."""

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

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def configured(tiny):
    config = shrink_demo(config_file.get_config(), tiny)
    config.export.formats = ("orbax",)
    return config


@pytest.fixture(scope="module")
def run(tiny, no_drawing, only_training, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    main.run(configured(tiny), str(workdir))
    return workdir


class Page(HTMLParser):
    """The URLs that a page would fetch, and its text."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        fetched = ("src", "srcset", "data", "poster") + (("href",) if tag == "link" else ())
        self.sources += [value for name, value in attributes if name in fetched]

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_report_is_complete_and_fetches_nothing(run):
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
        "8 pairs (noise, prompt, image) from the teacher: 2 steps",
        "2 training steps of batch size 4",
        "CC BY-SA 4.0",
        f"{rows['distill', 1]['fd_emoji']:.1f}",
        f"{rows['teacher', 3]['S']:.4f}",
    ):
        assert words in page.text, words


@pytest.mark.slow
def test_every_step_has_its_product_and_its_time(run, tiny):
    steps = json.loads((run / "demo.json").read_text())["steps"]
    assert list(steps) == [step.name for step in demo.steps(configured(tiny))]
    assert all(entry["seconds"] > 0 and entry["runs"] == 1 for entry in steps.values())
    assert all((run / step.product).is_file() for step in demo.steps(configured(tiny)))


@pytest.mark.slow
def test_a_second_run_reuses_everything(run, tiny, monkeypatch, capsys):
    def never(config, workdir):
        raise AssertionError("this step had finished")

    monkeypatch.setattr(demo, "STEPS", tuple(step._replace(run=never) for step in demo.STEPS))
    (run / "report.html").unlink()
    main.run(configured(tiny), str(run))
    output = capsys.readouterr().out
    assert len(re.findall(r"\[\d/7\] .*: finished before, in ", output)) == 6 and "everything is finished" in output
    assert output.rstrip().endswith(str((run / "report.html").absolute())) and (run / "report.html").is_file()


@pytest.mark.slow
def test_an_interrupted_run_continues(run, tiny, tmp_path, monkeypatch, capsys):
    """Killed during evaluation: that step and those after it run, and it counts as a second run of the step.

    A setting that the interrupted version did not have changes nothing.
    """
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    ledger = json.loads((copy / "demo.json").read_text())
    del ledger["steps"]["evaluate"]["seconds"], ledger["steps"]["export"]
    del ledger["steps"]["reflow"]["settings"]["path"]
    (copy / "demo.json").write_text(json.dumps(ledger))
    ran = []
    record = lambda config, workdir: ran.append(config.stage)  # noqa: E731
    monkeypatch.setattr(demo, "STEPS", tuple(step._replace(run=record) for step in demo.STEPS))
    main.run(configured(tiny), str(copy))
    assert ran == ["evaluate", "export"]
    assert "in the last of 2 runs" in (copy / "report.html").read_text()
    assert "[5/7] evaluation of all models  (00:00 passed, about " in capsys.readouterr().out


@pytest.mark.slow
def test_other_training_settings_raise_an_error_that_names_them(run, tiny):
    config = configured(tiny)
    config.distill.loop.steps = 3
    config.generate.N = 1
    with pytest.raises(ValueError, match=r"made with another generate\.N.*use another --workdir"):
        main.run(config, str(run))
    config.generate.N = 2
    with pytest.raises(ValueError, match=r"made with another distill\.loop\.steps"):
        main.run(config, str(run))


@pytest.mark.slow
def test_a_workdir_of_version_0_1_raises_one_clear_error(run, tiny, tmp_path):
    """Its settings have other field names, and its ledger has no version."""
    ledger = json.loads((run / "demo.json").read_text())
    del ledger["version"]
    settings = ledger["steps"]["reflow"]["settings"]
    settings["drop"] = settings.pop("prompt_dropout")
    (tmp_path / "demo.json").write_text(json.dumps(ledger))
    with pytest.raises(
        ValueError, match=r"was made by another version of instaflow_jax \(0\.1, not .*--workdir"
    ) as raised:
        main.run(configured(tiny), str(tmp_path))
    assert "prompt_dropout" not in str(raised.value)


@pytest.mark.slow
def test_a_deleted_model_is_not_trained_again_beside_models_that_came_from_it(run, tiny, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "reflow" / "export")
    with pytest.raises(ValueError, match=r"reflow/export/model_index\.json is missing, but .*distill/export"):
        main.run(configured(tiny), str(copy))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, words",
    [
        ({"reflow.loss.time": "late"}, "time='late' is unknown"),
        ({"distill.match": 1.0}, "match=1.0 must be from 0 to"),
        ({"direct.batch_size": 9}, "batch_size=9 must be from 1 to 8"),
        ({"evaluate.batch": 0}, "config.evaluate.batch=0 must be at least 1"),
        ({"export.formats": ("gguf",)}, "config.formats=('gguf',) must name some of"),
        ({"generate.solver": "euler"}, "does not fit a teacher"),
        ({"check": True}, None),
    ],
)
def test_the_settings_of_every_step_are_checked_first(tiny, tmp_path, fields, words, capsys):
    config = configured(tiny)
    config.update_from_flattened_dict(fields)
    if words is None:
        main.run(config, str(tmp_path))
        assert "demo: every check passed; nothing was run" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=re.escape(words)):
            main.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_full_continues_a_finished_demo_and_reports_what_it_adds(run, tiny, tmp_path, monkeypatch):
    """Training is replaced by copies of the finished models, and the settings say what would have been trained."""
    copy, trained = Path(shutil.copytree(run, tmp_path / "copy")), []

    def train(step):
        def pretend(config, workdir):
            trained.append(step.name)
            folder = Path(workdir) / Path(step.product).parent
            source = "reflow" if step.name == "reflow_3" else "distill"
            shutil.copytree(copy / source / "export", folder)

        return step._replace(run=pretend) if step.trains else step

    monkeypatch.setattr(demo, "STEPS", tuple(map(train, demo.STEPS)))
    config = shrink_demo(config_file.get_config("full"), tiny)
    config.export.formats = ("orbax",)
    main.run(config, str(copy))
    assert trained == ["reflow_3", "lpips", "refine", "stacked", "progressive"]
    page = Page((copy / "report.html").read_text())
    assert len(page.sources) == 5  # with the curve of S
    for words in (
        "3-RF, 1 step",
        "reflow + distil + LPIPS, 1 step",
        "reflow + refine, 1 step",
        "reflow + distil, stacked, 1 step",
        "progressive, 1 step",
        "InstaFlow-1.7B",
        "2 training steps of batch size 4 by LPIPS, starting from the one-step model, on 8 pairs of 2-RF's own",
        "2 training steps of batch size 4 by score distillation, starting from 2-RF, on 8 pairs of 2-RF's own",
        "2,400 training steps of batch size 4, in rounds for N = [16, 8, 4, 2, 1], starting from the teacher",
    ):
        assert words in page.text, words


@pytest.mark.slow
def test_the_lpips_phase_starts_from_the_l2_phase(run, tiny, tmp_path):
    config = shrink_demo(config_file.get_config("full"), tiny)
    assert demo.start_from_distilled(config.lpips, str(run)).init_from == str(run / "distill" / "export")
    assert demo.start_from_distilled(config.lpips, str(tmp_path)).init_from == ""  # to check it before there is one


def test_every_step_has_an_expected_time():
    config = config_file.get_config("full")
    assert set(config.minutes) == {step.name for step in demo.STEPS}
    ordinary = config_file.get_config()
    assert set(ordinary.minutes) == {step.name for step in demo.steps(ordinary)} < set(config.minutes)
    assert config.generate is config.reflow.pairs is config.reflow_3.pairs is config.progressive.pairs
    config.generate.alpha = 3.0
    assert config.progressive.alpha == 3.0
