"""Pairs on disk: reading returns what was written, batches are shuffled as documented, errors name the damage."""

import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from instaflow_jax.data import noise as noise_file
from instaflow_jax.data.noise import NAME, checksum, noise
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import reader as pairs_file
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import PairBatches, Pairs
from instaflow_jax.infra import files

RECIPE = {
    "teacher": {"unet": "u"},
    "latent_shape": [2, 2, 4],
    "tokens": 3,
    "seed": 5,
    "noise": NAME,
    "store_noise": True,
    "count": 22,
    "shard_size": 8,
}


def X1_of(number):
    return np.random.default_rng(number).normal(size=RECIPE["latent_shape"]).astype(np.float16)


def ids_of(number):
    return np.array([number, 1, 2], np.int32)


def rows(recipe, shard):
    features = pairs_store.make_features(recipe)
    for i in pairs_manifest.shard_range(recipe, shard):
        yield pairs_store.serialize(
            features,
            recipe,
            prompt=f"prompt {i} é",
            ids=ids_of(i),
            seed=i,
            X0=noise(recipe["seed"], i, recipe["latent_shape"]),
            X1=X1_of(i),
        )


def write(directory, **changed):
    """Writes a finished directory without a teacher."""
    recipe = RECIPE | changed
    pairs_manifest.begin(directory, recipe, {"model": "none"})
    for shard in range(pairs_manifest.shard_count(recipe)):
        pairs_store.write_shard(directory, recipe, shard, rows(recipe, shard))
    assert pairs_store.finish(directory, recipe)
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "pairs")


@pytest.fixture(params=[True, False], ids=["stored", "regenerated"])
def either(request, tmp_path):
    return write(tmp_path / "pairs", store_noise=request.param)


def test_reading_returns_what_was_written(either):
    pairs = Pairs(either)
    assert len(pairs) == 22
    for number in (0, 7, 8, 21):
        pair = pairs[number]
        assert pair["prompt"] == f"prompt {number} é"
        assert pair["X0"].dtype == pair["X1"].dtype == np.float16 and pair["ids"].dtype == np.int32
        np.testing.assert_array_equal(pair["X0"], noise(5, number, (2, 2, 4)))
        np.testing.assert_array_equal(pair["X1"], X1_of(number))
        np.testing.assert_array_equal(pair["ids"], ids_of(number))


def test_tfds_and_grain_read_pairs(directory):
    grain = pytest.importorskip("grain.python")
    source = tfds.builder_from_directory(directory).as_data_source("train")
    assert [row["seed"] for row in source] == list(range(22))
    row = grain.MapDataset.source(source).shuffle(seed=1)[3]
    assert row["prompt"].decode() == f"prompt {row['seed']} é"
    np.testing.assert_array_equal(row["X0"], noise(5, row["seed"], (2, 2, 4)))
    np.testing.assert_array_equal(row["X1"], X1_of(row["seed"]))


def test_without_stored_noise_tfds_reads_its_checksum(tmp_path):
    row = tfds.builder_from_directory(write(tmp_path / "pairs", store_noise=False)).as_data_source("train")[9]
    assert row.keys() == {"prompt", "ids", "seed", "noise_crc", "X1"}
    assert row["noise_crc"] == checksum(noise(5, 9, (2, 2, 4)))


def test_noise_of_another_generator_is_refused(tmp_path, monkeypatch):
    directory = write(tmp_path / "pairs", store_noise=False)
    monkeypatch.setattr(
        pairs_file, "noise", lambda seed, index, shape: np.nextafter(noise(seed, index, shape), np.float16(9))
    )
    with pytest.raises(ValueError, match="noise of pair 3, regenerated from seed 5, is not the noise"):
        Pairs(directory).batch([3])
    monkeypatch.setattr(pairs_file, "NAME", "another")
    with pytest.raises(ValueError, match=f"which '{NAME}' generates; this version generates noise by 'another'"):
        Pairs(directory)


def test_noise_is_normal_and_depends_on_seed_and_number_alone():
    many = np.stack([noise(1, i, (8, 8, 4)) for i in range(400)]).astype(float)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01 and abs((many**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01
    assert np.abs(noise(1, 2, (8, 8, 4)) - noise(2, 1, (8, 8, 4))).max() > 0.1
    np.testing.assert_array_equal(noise(1, 2, (3, 1, 1)), noise(1, 2, (3,)).reshape(3, 1, 1))


def test_the_generator_has_not_changed():
    """Data sets on disk depend on the generator: a change needs another `noise.NAME`."""
    assert noise_file.NAME == "philox4x64-boxmuller"
    assert checksum(noise(7, 2**33, (8, 8, 4))) == 1258258430


# ---------------------------------------------------------------- batches


def epoch(batches, count):
    return [next(batches) for _ in range(count)]


def numbers(batch):
    return batch["ids"][:, 0].tolist()


def test_an_epoch_repeats_no_pair_and_the_next_has_another_order(directory):
    batches = PairBatches(Pairs(directory), batch_size=5, seed=1)
    first, second = epoch(batches, 4), epoch(batches, 4)
    for seen in ([i for batch in found for i in numbers(batch)] for found in (first, second)):
        assert len(set(seen)) == 20
    assert numbers(first[0]) != numbers(second[0])
    for batch in first:
        for X0, X1, ids in zip(batch["X0"], batch["X1"], batch["ids"], strict=True):
            np.testing.assert_array_equal(X0, noise(5, int(ids[0]), (2, 2, 4)))
            np.testing.assert_array_equal(X1, X1_of(int(ids[0])))


def test_position_is_restored_forwards_and_backwards(either):
    def batches():
        return PairBatches(Pairs(either), batch_size=5, seed=1)

    expected = [numbers(batch) for batch in epoch(batches(), 9)]
    ours = batches()
    epoch(ours, 3)
    state = json.loads(json.dumps(ours.state()))
    assert numbers(next(ours)) == expected[3]
    resumed = batches()
    resumed.restore(state)
    assert [numbers(batch) for batch in epoch(resumed, 6)] == expected[3:]
    resumed.restore({"step": 1})
    assert numbers(next(resumed)) == expected[1]


def test_processes_share_a_batch_without_overlap(directory, monkeypatch):
    expected = epoch(PairBatches(Pairs(directory), batch_size=6, seed=1), 5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(epoch(PairBatches(Pairs(directory), batch_size=6, seed=1), 5))
    assert [numbers(a) + numbers(b) for a, b in zip(*parts, strict=True)] == [numbers(batch) for batch in expected]


def test_the_order_is_the_one_of_version_0_1(directory):
    """A run of version 0.1 that is resumed must see the same batches."""
    found = [numbers(batch) for batch in epoch(PairBatches(Pairs(directory), batch_size=5, seed=1), 9)]
    orders = [np.random.default_rng([1, epoch]).permutation(22)[:20].tolist() for epoch in range(3)]
    assert found == [order[i : i + 5] for order in orders for i in range(0, 20, 5)][:9]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_batches_match_their_spec(directory, dtype):
    batches = PairBatches(Pairs(directory), batch_size=4, seed=0, dtype=dtype)
    spec = batches.spec()
    assert {name: (s.shape, s.dtype) for name, s in spec.items()} == {
        name: (rows.shape, rows.dtype) for name, rows in next(batches).items()
    }
    assert spec["X0"].dtype == dtype


@pytest.mark.parametrize("size", [0, 23])
def test_a_batch_that_cannot_be_filled_is_refused(directory, size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be from 1 to 22"):
        PairBatches(Pairs(directory), batch_size=size, seed=0)


# ---------------------------------------------------------------- damage


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_reported_by_the_check_and_by_reading(directory):
    pairs_store.verify(directory)
    path = pairs_store.shard_path(directory, RECIPE, 1)
    flip(path, path.read_bytes().index(b"prompt 9"))
    with pytest.raises(ValueError, match=f"1 of 3 shards .*{path.name} is damaged.*Delete the damaged"):
        pairs_store.verify(directory)
    batches = PairBatches(Pairs(directory), batch_size=22, seed=0)
    for _ in range(2):  # the position stays at the batch that cannot be read
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*delete it and start generate again"):
            next(batches)
    np.testing.assert_array_equal(Pairs(directory)[0]["X1"], X1_of(0))


@pytest.mark.parametrize(
    "harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])], ids=["missing", "truncated"]
)
def test_a_missing_or_truncated_shard_is_reported_and_made_again(directory, harm):
    path = pairs_store.shard_path(directory, RECIPE, 2)
    before = path.read_bytes()
    harm(path)
    with pytest.raises(ValueError, match=f"{path.name} is missing or incomplete"):
        pairs_store.verify(directory)
    with pytest.raises(FileNotFoundError, match=f"1 of 3 shards are missing.*{path.name}: start generate again"):
        Pairs(directory)
    pairs_store.write_shard(directory, RECIPE, 2, rows(RECIPE, 2))
    assert path.read_bytes() == before and pairs_store.verify(directory)


def test_a_shard_without_metadata_is_not_finished(directory):
    """The state that a kill between the two writes leaves."""
    pairs_store.metadata_path(pairs_store.shard_path(directory, RECIPE, 1)).unlink()
    assert [pairs_store.shard_metadata(directory, RECIPE, shard) is None for shard in range(3)] == [False, True, False]
    assert not pairs_store.finish(directory, RECIPE)


def test_the_manifest_of_another_teacher_is_refused(directory, tmp_path):
    other = RECIPE | {"teacher": {"unet": "w"}}
    with pytest.raises(
        ValueError, match=r'manifest.json belongs to other pairs: teacher is {"unet": "u"}, not {"unet": "w"}. Use'
    ):
        pairs_manifest.begin(directory, other, {})
    pairs_manifest.begin(tmp_path / "other", other, {})
    (tmp_path / "other" / "manifest.json").replace(directory / "manifest.json")
    for use in (Pairs, pairs_store.verify):
        with pytest.raises(ValueError, match=r"00000-of-00003.json: this shard was made by another recipe"):
            use(directory)


def test_edited_truncated_newer_and_missing_manifests_are_refused(directory):
    path = directory / "manifest.json"
    text = path.read_text()
    for edited, words in (
        (text.replace('"seed": 5', '"seed": 6'), "edited after"),
        (text[:-9], "is not valid JSON"),
        (json.dumps({"format": 2, "recipe": {}}), "format 2 is not 1"),
    ):
        path.write_text(edited)
        with pytest.raises(ValueError, match=words):
            Pairs(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no pairs; make them with configs/generate.py"):
        Pairs(directory)


def test_the_hash_of_weights_does_not_depend_on_their_order():
    a, b = np.arange(6.0, dtype=np.float32), np.ones(2, np.float32)
    one = files.sha256_of_params({"a": a, "b": b})
    assert one == files.sha256_of_params({"b": jax.numpy.asarray(b), "a": a})
    others = [{"a": a.reshape(2, 3), "b": b}, {"a": a, "c": b}, {"a": np.nextafter(a, 9), "b": b}]
    assert len({one, *map(files.sha256_of_params, others)}) == 4
