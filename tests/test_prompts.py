"""Prompts: each source yields its texts in order, cleaning follows its rules, bad rows are counted and not fatal."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from instaflow_jax.data import prompts, records
from instaflow_jax.data.openmoji.dataset import encode_png
from instaflow_jax.data.prompt_sources import OPENMOJI
from instaflow_jax.data.prompts import Cleaning
from instaflow_jax.stages.common import loading

UNCHANGED = Cleaning(normalize=False, min_chars=0, max_chars=0, unique=False)
TIDY = Cleaning(normalize=True, min_chars=1, max_chars=0, unique=False)


def load(source, column="", cleaning=TIDY, **fields):
    return prompts.load(
        str(source),
        column=column,
        cleaning=cleaning,
        **{"split": "val", "data_dir": "", "count": 0, "seed": 0} | fields,
    )


def test_normalizing_composes_and_collapses_spaces():
    found = prompts.clean(["  cafe\u0301 \t au\u00a0lait\n", "\ufb01g"], TIDY)
    assert found.texts == ["caf\u00e9 au lait", "\ufb01g"]  # NFC is canonical composition only: the ligature stays
    assert prompts.clean(["  a  "], UNCHANGED).texts == ["  a  "]


def test_every_rule_drops_and_counts():
    rows = ["red apple", "red  apple", "", None, "x" * 50, "a", "half \ud83d", "RED APPLE"]
    found = prompts.clean(rows, Cleaning(normalize=True, min_chars=2, max_chars=20, unique=True))
    assert found.texts == ["red apple", "RED APPLE"]
    assert found.report == {"read": 8, "malformed": 2, "too short": 2, "too long": 1, "repeated": 1, "kept": 2}
    assert prompts.describe(found.report) == "8 rows: 2 malformed, 2 too short, 1 too long, 1 repeated, 2 kept"


def test_a_text_file_with_a_broken_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\xff\xfe\nthree")
    found = load(tmp_path / "p.txt")
    assert found.texts == ["one", "two", "three"]
    assert found.report["malformed"] == 1 and found.report["too short"] == 1


def test_every_stage_reads_a_text_file_in_the_same_way(tmp_path):
    """A byte-order mark and Windows line ends are not part of a prompt."""
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfred apple\r\n\r\n house\r\n")
    assert load(path).texts == loading.read_prompts(str(path)) == ["red apple", "house"]
    assert loading.read_prompts(str(path.rename(tmp_path / "P.TXT"))) == ["red apple", "house"]


def test_a_text_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("red apple\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.txt': line 2 of the file is not UTF-8 .*save the file as UTF-8"):
        loading.read_prompts(str(path))
    path.write_bytes("red apple\nhouse\n".encode("utf-16"))
    for read in (load, lambda file: loading.read_prompts(str(file))):
        with pytest.raises(ValueError, match=r"p\.txt is UTF-16, not UTF-8; save it as UTF-8"):
            read(path)


def test_jsonl_supports_nested_columns_and_lists(tmp_path):
    rows = [
        '{"c": {"t": "one"}}',
        '{"c": {"t": ["two", 3]}}',
        '{"c": 1}',
        "{broken",
        '{"c": {"t": "a \\ud800"}}',
        "[" * 9999,
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    found = load(tmp_path / "p.jsonl", "c.t")
    assert found.texts == ["one", "two"] and found.report["malformed"] == 5


def test_parquet_globs_are_sorted_and_errors_list_the_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"TEXT": ["three", None], "W": [1, 2]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"TEXT": ["one", "two"], "W": [1, 2]}), tmp_path / "a.parquet")
    found = load(tmp_path / "*.parquet", "TEXT")
    assert found.texts == ["one", "two", "three"] and found.report["malformed"] == 1
    with pytest.raises(ValueError, match=r"a.parquet has no column 'caption'; it has TEXT, W"):
        load(tmp_path / "*.parquet", "caption")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"c.parquet is not a Parquet file"):
        load(tmp_path / "*.parquet", "TEXT")


def test_parquet_without_pyarrow_names_the_package_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load(tmp_path / "a.parquet", "TEXT")


@pytest.fixture
def coco(tmp_path):
    """A TFDS set with the features of coco_captions, in the directory where TFDS would have prepared it."""
    captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), "captions": captions})
    row = {
        "image": encode_png(np.zeros((8, 8, 3), np.uint8)),
        "captions": [{"id": 1, "text": "a dog"}, {"id": 2, "text": "é"}],
    }
    directory = tmp_path / "coco_captions" / "2014" / "1.1.0"
    directory.mkdir(parents=True)
    records.write(directory / "coco_captions-val.array_record-00000-of-00001", [features.serialize_example(row)])
    about = {"version": "1.1.0", "description": "", "license": "", "homepage": ""}
    records.write_metadata(directory, "coco_captions", features, {"val": [(1, 100)]}, **about)
    return directory


def test_tfds_by_name_and_by_directory(coco):
    for name in ("coco_captions", "coco_captions/2014", coco):
        assert load(f"tfds:{name}", "captions.text", data_dir=str(coco.parents[2])).texts == ["a dog", "é"]
    with pytest.raises(ValueError, match="no split 'train'; it has val"):
        load(f"tfds:{coco}", "captions.text", split="train")
    with pytest.raises(
        ValueError, match=r"no column 'text'; it has image, captions|no column 'text'; it has captions, image"
    ):
        load(f"tfds:{coco}", "text")
    with pytest.raises(ValueError, match="gave no prompt"):
        load(f"tfds:{coco}", "captions.id")


def test_fewer_openmoji_captions_are_a_prefix_of_more_and_never_empty():
    some, more = (load("openmoji", count=count, seed=3).texts for count in (20, 60))
    assert more[:20] == some and len(more) == 60 and all(more)
    assert load("openmoji", count=60, seed=4).texts != more
    flags = [load(name, count=2000, seed=3).texts.count("a flag") for name in OPENMOJI]
    assert flags[1] > 2 * flags[0] > 0


@pytest.mark.parametrize(
    "source, column, error, words",
    [
        ("nowhere.txt", "", FileNotFoundError, "nowhere.txt"),
        (
            "prompts.csv",
            "",
            ValueError,
            r"openmoji, openmoji_kinds, tfds:NAME, or a file ending in .txt, .jsonl, .parquet",
        ),
        ("tfds:nowhere", "text", FileNotFoundError, "no prepared set in .*nowhere"),
        ("tfds:coco_captions", "", ValueError, "needs prompts.column"),
        ("openmoji", "", ValueError, "count=0 is not positive"),
    ],
)
def test_unreadable_sources_are_refused(source, column, error, words, tmp_path):
    with pytest.raises(error, match=words):
        load(source, column, data_dir=str(tmp_path))


def test_a_column_that_no_row_has_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "one"}))
    with pytest.raises(ValueError, match=r"gave no prompt \(1 rows: 1 malformed, 0 kept\)"):
        load(tmp_path / "p.jsonl", "TEXT")


def test_the_hash_depends_on_order_and_boundaries():
    lists = (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])
    assert len({prompts.sha256(texts) for texts in lists}) == 4
