"""The numbers of an evaluation, against the libraries that define them and against cases that have a formula."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_image_processor, normal, randomize, references, relative

from instaflow_jax import flow, pipeline, solvers
from instaflow_jax.evals import clip_score, features, frechet, kid, precision_recall, retrieval
from instaflow_jax.evals.diversity import diversity
from instaflow_jax.evals.error_bar import mean_and_error
from instaflow_jax.evals.frechet import Moments
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.weights.tokenizer import Tokenizer


def draw(seed: int, count: int, dim: int, offset: float = 0.0) -> np.ndarray:
    """Correlated features in float64."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, dim)) @ random.normal(size=(dim, dim)) + offset


def moments(x: np.ndarray) -> Moments:
    return Moments.empty(x.shape[1]).add(x)


# ---------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8, 300), (0, 500)])
def test_streamed_moments_are_those_of_all_features_at_once(cuts):
    x = draw(0, 500, 12)
    got = Moments.empty(12)
    for part in np.split(x, cuts):
        got = got.add(part)
    assert got.count == 500
    assert relative(got.mean, x.mean(0)) < 1e-13 and relative(got.covariance, np.cov(x, rowvar=False)) < 1e-13


def test_a_large_offset_loses_nothing():
    x = draw(0, 400, 6)
    far = Moments.empty(6)
    for part in np.split(x + 1e7, 40):
        far = far.add(part)
    assert relative(far.covariance, np.cov(x, rowvar=False)) < 1e-7  # 1e7 + x itself is only known to 2e-9


def test_merging_equals_adding_in_any_order():
    x, y = draw(0, 40, 5), draw(1, 70, 5)
    both, turned, added = moments(x).merge(moments(y)), moments(y).merge(moments(x)), moments(x).add(y)
    for other in (turned, added):
        assert other.count == both.count == 110
        assert relative(other.covariance, both.covariance) < 1e-14
    assert moments(x).merge(Moments.empty(5)).count == 40 and Moments.empty(5).merge(moments(x)).count == 40


@pytest.mark.parametrize("dim,count", [(16, 400), (64, 1000)])
@pytest.mark.slow
def test_distance_equals_pytorch_fid(dim, count, torch, tmp_path):
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = draw(0, count, dim), draw(1, count + 50, dim, offset=0.3)
    want = calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet.distance(moments(x), moments(y)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("counts", [(20, 33), (2, 500), (500, 5)])
def test_distance_of_fewer_features_than_dimensions_is_exact(counts):
    x, y = (draw(seed, count, 64) for seed, count in enumerate(counts))
    # Σ = RᵀR with R = centred rows / √(n−1), so tr (Σ_a Σ_b)^½ is the sum of R_a R_bᵀ's singular values
    rows = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    cross = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((r**2).sum() for r in rows) - 2 * cross
    assert frechet.distance(moments(x), moments(y)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 300])
def test_a_set_is_at_distance_zero_from_itself_and_never_negative(count):
    x = moments(draw(0, count, 40, offset=5.0))
    assert 0 <= frechet.distance(x, x) < 1e-8 * np.trace(x.covariance)
    flat = moments(np.ones((9, 4)))
    assert frechet.distance(flat, flat) == 0
    assert frechet.distance(flat, moments(np.zeros((9, 4)))) == pytest.approx(4)


@pytest.mark.slow
def test_statistics_are_pytorch_fids_files(torch, tmp_path):
    from pytorch_fid.fid_score import compute_statistics_of_path

    ours = moments(draw(0, 30, 7))
    ours.save(tmp_path / "ours.npz")
    mean, covariance = compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 7, "cpu")
    assert np.array_equal(mean, ours.mean) and np.array_equal(covariance, ours.covariance)
    again = Moments.load(tmp_path / "ours.npz")
    assert again.count == 30 and np.array_equal(again.covariance, ours.covariance)
    np.savez_compressed(tmp_path / "theirs.npz", mu=ours.mean, sigma=ours.covariance)  # as save_fid_stats does
    theirs = Moments.load(tmp_path / "theirs.npz")
    assert theirs.count is None and frechet.distance(theirs, ours) < 1e-9
    theirs.save(tmp_path / "again.npz")
    assert Moments.load(tmp_path / "again.npz").count is None
    with pytest.raises(ValueError, match="without a count of features"):
        theirs.merge(ours)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "not an .npz file"),
        (b"PK\x03\x04 truncated", "not an .npz file"),
        (b"text", "not an .npz file"),
        ({"mu": np.ones(3)}, "but not sigma"),
        ({"mu": np.ones(3), "sigma": np.ones((2, 2))}, "do not match"),
        ({"mu": np.ones(3), "sigma": np.array([{}])}, "not an .npz file"),
    ],
)
def test_a_broken_statistics_file_is_named(content, words, tmp_path):
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ValueError, match=words) as error:
        Moments.load(path)
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz is missing"):
        Moments.load(tmp_path / "nowhere.npz")


def test_moments_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match="1 of 3 features are not finite"):
        Moments.empty(2).add(np.array([[0, 1], [2, np.nan], [3, 4]]))
    with pytest.raises(ValueError, match=r"expected \[N, 2\]"):
        Moments.empty(2).add(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="needs at least 2 features in each set, got 1"):
        frechet.distance(moments(np.ones((1, 3))), moments(draw(0, 9, 3)))
    with pytest.raises(ValueError, match="with 3 and 4 numbers"):
        frechet.distance(moments(draw(0, 9, 3)), moments(draw(0, 9, 4)))


# ---------------------------------------------------------------- KID, precision and recall


def test_kernel_distance_equals_its_sums_written_out():
    a, b = draw(0, 5, 3), draw(1, 6, 3)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    want = (
        np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
        + np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
        - 2 * np.mean([k(x, y) for x in a for y in b])
    )
    assert kid.mmd2(a, b) == pytest.approx(want, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average_however_small_the_sets():
    random = np.random.default_rng(0)
    values = [kid.mmd2(random.normal(size=(12, 4)), random.normal(size=(12, 4))) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(2000) and min(values) < 0
    near, _ = kid.kid(random.normal(size=(200, 4)), random.normal(size=(150, 4)), size=50)
    far, deviation = kid.kid(random.normal(size=(200, 4)), random.normal(size=(150, 4)) + 1, size=50)
    assert abs(near) < 0.2 < far and 0 < deviation < far
    with pytest.raises(ValueError, match="at least 2 features"):
        kid.kid(np.ones((1, 4)), np.ones((5, 4)))


def test_precision_falls_for_too_wide_sets_and_recall_for_too_narrow_ones():
    random = np.random.default_rng(0)
    left, right = random.normal(size=(300, 2)), random.normal(size=(300, 2)) + 50
    both = np.concatenate([left, right])
    precision, recall = precision_recall.precision_recall(
        both, random.normal(size=(400, 2))
    )  # one of two modes is made
    assert precision > 0.9 and 0.4 < recall < 0.52
    precision, recall = precision_recall.precision_recall(left, np.concatenate([random.normal(size=(300, 2)), right]))
    assert 0.4 < precision < 0.52 and recall > 0.9
    assert precision_recall.precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall.precision_recall(left, right) == (0.0, 0.0)
    with pytest.raises(ValueError, match="k=3"):
        precision_recall.precision_recall(left[:3], right)


def test_neighbours_are_the_same_in_pieces_and_far_from_zero(monkeypatch):
    real, made = draw(0, 50, 4), draw(1, 40, 4)
    want = precision_recall.precision_recall(real, made)
    apart = np.sort(((real[:, None] - real) ** 2).sum(-1), axis=1)[:, 3]
    np.testing.assert_allclose(precision_recall.radii(real, 3), apart, rtol=1e-10)
    monkeypatch.setattr(precision_recall, "_ROWS", 7)
    assert precision_recall.precision_recall(real + 1e6, made + 1e6) == want


# ---------------------------------------------------------------- CLIP score


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Our CLIP and transformers', random weights, 16 px."""

    references()
    from transformers import CLIPConfig
    from transformers import CLIPModel as Theirs

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 49, "bos_token_id": 48}
    config = CLIPConfig(
        text_config=words | shape, vision_config={"image_size": 16, "patch_size": 4} | shape, projection_dim=24
    )
    theirs = randomize(Theirs(config))
    folder = tmp_path_factory.mktemp("clip")
    theirs.save_pretrained(folder)
    return folder, theirs, *CLIPModel.from_pretrained(folder)


def bytes_of(seed: int, *shape: int) -> np.ndarray:
    """Images with edges and gradients, uint8."""
    smooth = normal(seed, *shape).cumsum(-3).cumsum(-2)
    return np.clip(127 + 25 * smooth, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_clip_score_equals_transformers_from_bytes_on(clips, torch):
    folder, theirs, net, params = clips
    processor = make_image_processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    images, ids = bytes_of(0, 3, 40, 56, 3), np.array([[48, 1, 2, 49, 49], [48, 3, 4, 5, 49], [48, 49, 49, 49, 49]])
    how = clip_score.read_preprocessor(folder, "", net)
    got = jax.jit(clip_score.make_clip_score(net))(params, clip_score.preprocess(images, how), ids)
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), **processor(list(images), return_tensors="pt"))
    want = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).numpy()
    assert np.abs(np.asarray(got) - want).max() < 1e-5 and np.ptp(want) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 20, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 9}, "crop_size": 16},
        {"size": {"shortest_edge": 18}, "crop_size": {"height": 15, "width": 16}, "resample": 2},
        {"size": {"shortest_edge": 15}, "crop_size": 16, "image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0]},
    ],
)
@pytest.mark.parametrize("size", [(37, 55), (64, 21), (12, 12)])
@pytest.mark.slow
def test_preprocessing_is_that_of_transformers(options, size, torch):
    theirs = make_image_processor(**options)
    how = clip_score.Preprocessor.from_dict(theirs.to_dict())
    assert how == clip_score.Preprocessor.from_dict(options)
    images = bytes_of(1, 2, *size, 3)
    want = theirs(list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    got = clip_score.preprocess(images, how)
    assert got.shape == want.shape and got.dtype == np.float32 and np.abs(got - want).max() < 1e-5


@pytest.mark.slow
def test_the_embedded_clip_takes_images_in_minus_one_to_one():
    source = pipeline.locate("openmoji")
    net, params = CLIPModel.from_pretrained(source, "clip")
    how = clip_score.read_preprocessor(source, "clip", net)
    images = bytes_of(2, 2, 32, 32, 3)
    np.testing.assert_allclose(clip_score.preprocess(images, how), images / 127.5 - 1, atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"has neither preprocessor_config\.json nor processor_config\.json"):
        clip_score.read_preprocessor(source, "unet", net)
    ids = Tokenizer.from_pretrained(source)(["red apple", "house"])
    pixels = jnp.asarray(images / 127.5 - 1, jnp.float32)
    score = jax.jit(clip_score.make_clip_score(net))(params, pixels, ids)
    out = jax.jit(net.apply)(params, ids, pixels)
    np.testing.assert_allclose(score, np.sum(out.image_embeds * out.text_embeds, -1), atol=1e-6)


def test_the_image_processor_that_transformers_5_nests_is_read(tmp_path):
    """It saves no preprocessor_config.json. The values are CLIP's own, which no default of ours may replace."""
    net = CLIPModel.from_config({"vision_config": {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1}})
    values = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3]}
    values |= {"image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True, "do_pad": None}
    nested = {"processor_class": "CLIPProcessor", "image_processor": values}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    how = clip_score.read_preprocessor(tmp_path, "", net)
    assert how == clip_score.Preprocessor(16, (), (16, 16), 2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(FileNotFoundError, match=r"nor processor_config\.json with an image_processor"):
        clip_score.read_preprocessor(tmp_path, "", net)
    for wrong in ([1], "text", {"size": [16]}, {"image_mean": 3}, {"rescale_factor": "x"}):
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": wrong}))
        with pytest.raises(ValueError, match=r"^[^\n]*processor_config\.json: [^\n]*$"):
            clip_score.read_preprocessor(tmp_path, "", net)


@pytest.mark.parametrize(
    "raw,words",
    [
        ({"do_normalize": False}, "do_normalize=False is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"size": {"longest_edge": 9}}, "names neither shortest_edge nor"),
        ({"size": 16, "crop_size": 24}, "the network beside it takes 16×16"),
    ],
)
@pytest.mark.slow
def test_an_unsupported_preprocessor_is_refused(raw, words, clips, tmp_path):
    (tmp_path / clip_score.FILE).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=words) as error:
        clip_score.read_preprocessor(tmp_path, "", clips[2])
    assert clip_score.FILE in str(error.value)


# ---------------------------------------------------------------- straightness and its error bar


def straightness(velocity, X0: np.ndarray, N: int) -> np.ndarray:
    return np.asarray(flow.straightness(solvers.trajectory(velocity, solvers.euler(N), jnp.asarray(X0))[1]))


def test_a_straight_flow_has_S_zero():
    """Toward a fixed X1 the velocity is X1 − X0 = (X1 − Z) / (1 − t) everywhere."""
    X0, X1 = normal(0, 64, 4, 4, 4), normal(1, 64, 4, 4, 4)
    S = straightness(lambda Z, t: (X1 - Z) / (1 - t), X0, 25)
    mean, error = mean_and_error(S)
    assert 0 <= mean < 1e-10 and 0 <= error < 1e-10


@pytest.mark.slow
def test_S_of_a_curved_flow_is_its_analytic_value():
    """dZ/dt = Z gives v = Z0 eᵗ, so S = E Z0² ∫ (e − 1 − eᵗ)² dt = E Z0² (e − 1)(3 − e) / 2."""
    X0 = normal(0, 4000, 2, 2, 4)
    mean, error = mean_and_error(straightness(lambda Z, t: Z, X0, 400))
    want = (np.e - 1) * (3 - np.e) / 2  # of E Z0² = 1
    assert mean == pytest.approx(want * np.mean(X0**2), rel=0.01)
    assert abs(mean - want) < 4 * error < 0.05 * want


def test_the_error_bar_shrinks_with_the_square_root_of_the_samples():
    S = np.random.default_rng(0).exponential(size=40000)
    (_, few), (mean, many) = mean_and_error(S[:400]), mean_and_error(S)
    assert few / many == pytest.approx(10, rel=0.15) and mean == pytest.approx(1, abs=4 * many)
    for bad in (S[:1], np.array([1.0, np.nan]), S.reshape(2, -1)):
        with pytest.raises(ValueError):
            mean_and_error(bad)


# ---------------------------------------------------------------- features, retrieval


@pytest.mark.parametrize("count", [1, 4, 11])
def test_the_runner_gives_a_row_for_each_row(count):
    runner = BatchedRunner(lambda w, x, y: w * x.sum((1, 2)) + y, 2)
    x, y = normal(0, count, 3, 5), normal(1, count)
    np.testing.assert_allclose(runner(np.float32(2), x, y), 2 * x.sum((1, 2)) + y, rtol=1e-5)


def test_retrieval_counts_right_neighbours_in_both_directions():
    x = retrieval.unit(np.array([[3.0, 0.0], [3.0, 0.5], [0.0, 2.0]]))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
    similarity = np.array([[0.9, 0.2, 0.1], [0.8, 0.3, 0.1], [0.1, 0.4, 0.7]])  # image 1 looks like caption 0
    names = {"": ("red cap", "red cap dark", "house"), "_toneless": ("red cap", "red cap", "house")}
    got = retrieval.retrieval(similarity, names)
    assert got == pytest.approx(
        {"image_to_text": 2 / 3, "text_to_image": 2 / 3, "image_to_text_toneless": 1, "text_to_image_toneless": 2 / 3}
    )


def test_missing_inception_weights_say_where_to_download_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth is missing: .*pytorch-fid/releases"):
        features.load_inception(tmp_path / "x.pth")


# ---------------------------------------------------------------- diversity


def test_diversity_is_the_mean_cosine_distance_within_a_prompt():
    features, prompts = normal(0, 8, 5), ["flag", "face", "flag", "flag", "face", "animal", "face", "flag"]
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [
        np.mean([1 - units[i] @ units[j] for i in rows for j in rows if i != j]) for rows in ([0, 2, 3, 7], [1, 4, 6])
    ]
    assert diversity(features, prompts) == pytest.approx(
        np.average(pairs, weights=[4, 3]), rel=1e-6
    )  # one animal has no pair
    assert diversity(np.repeat(features[:1], 3, 0), ["flag"] * 3) == pytest.approx(0, abs=1e-6)
    assert np.isnan(diversity(features[:2], ["flag", "face"]))
