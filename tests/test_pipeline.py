"""Images: drawn parameters, DALI against its Pillow twin, orientation, bad files, independence of the batch."""

import ctypes
import io
import json
import os
import weakref
from contextlib import closing
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from harness.core.errors import UserError
from harness.data import nvjpeg
from harness.data.backends import open_pipeline
from harness.data.decode_dali import ImagePipeline
from harness.data.decode_pillow import ReferencePipeline
from harness.data.preprocess import PreprocessSpec, draw_parameters
from tests.runs import tiny_config, trainer

GROCERY = Path(__file__).parents[2] / "shared" / "data" / "grocery" / "images"
# Leaves colours in 0..1, so that differences read in pixel units.
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def drawing(width, height, seed=0):
    """A smooth random picture in which no two regions look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image, form="JPEG", orientation=None, **options):
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def parameters(spec, sizes, train=True, **words):
    widths, heights = np.array(sizes).T
    return draw_parameters(spec, 1, 0, np.arange(len(sizes)), widths, heights, train, **words)


def difference(spec, encoded, params):
    """Absolute difference of the two pipelines in 0..255."""
    pipeline, twin = ImagePipeline(spec, len(encoded)), ReferencePipeline(spec, len(encoded))
    (images, ok), (expected, expected_ok) = pipeline.decode(encoded, params), twin.decode(encoded, params)
    pipeline.close(), twin.close()
    assert ok.all() and expected_ok.all()
    assert images.shape == expected.shape == (len(encoded), 3, spec.image_size, spec.image_size)
    assert images.dtype == expected.dtype == torch.float32 and images.is_contiguous()
    return (images - expected).abs().numpy() * 255


# ---------------------------------------------------------------- parameters


def test_windows_lie_inside_and_follow_the_specification():
    spec = PreprocessSpec()
    rng = np.random.default_rng(0)
    width, height = rng.integers(200, 2000, (2, 5000))
    drawn = draw_parameters(spec, 3, 0, np.arange(5000), width, height, train=True)
    (x, y), (w, h) = drawn["anchor"].T, drawn["shape"].T
    assert (x >= 0).all() and (y >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (x + w <= width).all() and (y + h <= height).all()
    ratio, share = w / h, w * h / (width * height)
    assert ratio.min() > 0.74 and ratio.max() < 1.35 and share.max() <= 1.0
    # Where an image is too long for the least area at the drawn ratio, the largest window of that ratio is taken.
    near_square = (width / height < 1.3) & (height / width < 1.3)
    assert share[near_square].min() > 0.34
    fits = ~near_square & (share < 0.34)
    assert np.all((w[fits] >= width[fits] - 1) | (h[fits] >= height[fits] - 1))
    assert 0.45 < drawn["flip"].mean() < 0.55
    assert {name: (array.dtype.str[1:], array.shape) for name, array in drawn.items()} == {
        "anchor": ("i4", (5000, 2)),
        "shape": ("i4", (5000, 2)),
        "flip": ("i4", (5000,)),
        "matrix": ("f4", (5000, 3, 3)),
        "offset": ("f4", (5000, 3)),
    }


def test_degenerate_images_get_windows_too():
    spec = PreprocessSpec()
    for train in (True, False):
        drawn = parameters(spec, [(1, 1), (1, 5000), (5000, 1), (3, 2)], train)
        assert (drawn["shape"] >= 1).all()
        assert (drawn["anchor"] + drawn["shape"] <= [(1, 1), (1, 5000), (5000, 1), (3, 2)]).all()


def test_parameters_are_a_function_of_seed_epoch_sample_and_variant():
    spec = PreprocessSpec()
    ids, width, height = np.array([7, 8, 9]), np.array([640, 480, 300]), np.array([480, 640, 300])

    def draw(rows=slice(None), seed=1, epochs=0, variant=0):
        return draw_parameters(spec, seed, epochs, ids[rows], width[rows], height[rows], True, variant)

    base = draw()
    for row in range(3):
        alone = draw(slice(row, row + 1))
        assert all(np.array_equal(alone[name][0], base[name][row]) for name in base)
    for other in (draw(seed=2), draw(epochs=1), draw(variant=1)):
        assert not np.array_equal(other["anchor"], base["anchor"])
        assert not np.array_equal(other["matrix"], base["matrix"])
    mixed = draw(epochs=np.array([0, 1, 0]), variant=np.array([0, 0, 1]))
    assert np.array_equal(mixed["shape"][0], base["shape"][0])
    assert np.array_equal(mixed["shape"][1], draw(epochs=1)["shape"][1])
    assert np.array_equal(mixed["shape"][2], draw(variant=1)["shape"][2])


def test_evaluation_takes_the_centre_unchanged():
    drawn = parameters(PreprocessSpec(eval_crop=0.5), [(200, 100), (100, 300)], train=False)
    assert drawn["anchor"].tolist() == [[75, 25], [25, 125]] and drawn["shape"].tolist() == [[50, 50], [50, 50]]
    assert not drawn["flip"].any() and not drawn["offset"].any()
    assert np.array_equal(drawn["matrix"], np.tile(np.eye(3, dtype=np.float32), (2, 1, 1)))


def test_colour_keeps_what_each_change_must_keep():
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    luma = np.array([0.299, 0.587, 0.114])
    sizes = [(10, 10)] * 50

    def colour(**strength):
        drawn = parameters(PreprocessSpec(**{**off, **strength}), sizes)
        return drawn["matrix"].astype(np.float64), drawn["offset"].astype(np.float64)

    matrix, offset = colour()
    assert np.abs(matrix - np.eye(3)).max() < 1e-6 and not offset.any()
    matrix, offset = colour(brightness=0.4)
    factors = matrix[:, 0, 0]
    assert np.allclose(matrix, factors[:, None, None] * np.eye(3)) and 0.6 <= factors.min() < 0.7 < 1.3 < factors.max()
    matrix, offset = colour(contrast=0.4)
    assert np.allclose(matrix @ np.full(3, 0.5) + offset, 0.5) and np.ptp(matrix[:, 0, 0]) > 0.5
    matrix, offset = colour(saturation=0.4, hue=0.5)
    assert np.allclose(matrix @ np.ones(3), 1, atol=1e-6) and not offset.any()
    # The published YIQ coefficients have 3 digits.
    assert np.allclose(luma @ matrix, luma, atol=2e-3)
    matrix, _ = colour(hue=0.5)
    assert np.ptp(matrix[:, 0, 1]) > 0.5 and np.allclose(np.linalg.det(matrix), 1, atol=1e-5)


def test_specification_survives_json_and_refuses_nonsense():
    spec = PreprocessSpec(image_size=96, hue=0.1, crop_scale=(0.2, 0.9))
    assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    older = {key: value for key, value in spec.to_dict().items() if key != "background"}
    assert PreprocessSpec.from_dict(older) == spec, "files from before it was a field"
    with pytest.raises(UserError, match="missing or unknown: sharpness"):
        PreprocessSpec.from_dict({**spec.to_dict(), "sharpness": 1})


# ---------------------------------------------------------------- DALI against the twin


def test_twins_agree_on_every_format_and_scale():
    spec = PreprocessSpec(image_size=48, **PLAIN)
    picture = drawing(300, 200)
    alpha = Image.merge("RGBA", [*picture.split(), picture.split()[0]])
    deep = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
    cases = {
        "jpeg 4:2:0": (encode(picture, quality=90), picture),
        "jpeg 4:4:4": (encode(picture, subsampling=0), picture),
        "jpeg progressive": (encode(picture, progressive=True), picture),
        "jpeg grey": (encode(picture.convert("L")), picture),
        "jpeg cmyk": (encode(picture.convert("CMYK")), picture),
        "png": (encode(picture, "PNG"), picture),
        "png alpha": (encode(alpha, "PNG"), picture),
        "png palette": (encode(picture.convert("P"), "PNG"), picture),
        "png 16 bit": (encode(deep, "PNG"), picture),
        "webp": (encode(picture, "WEBP"), picture),
        "gif": (encode(picture, "GIF"), picture),
        "tiff": (encode(picture, "TIFF"), picture),
        "trailing bytes": (encode(picture) + bytes(500), picture),
        "enlarged": (encode(drawing(30, 20)), drawing(30, 20)),
        "one pixel": (encode(Image.new("RGB", (1, 1), (9, 80, 200))), Image.new("RGB", (1, 1))),
        "large": (encode(drawing(1400, 900)), drawing(1400, 900)),
    }
    encoded, pictures = zip(*cases.values(), strict=True)
    for train in (True, False):
        params = parameters(spec, [picture.size for picture in pictures], train)
        off = difference(spec, list(encoded), params)
        for name, one in zip(cases, off, strict=True):
            assert one.mean() < 0.5 and one.max() <= 4, (name, train, one.mean(), one.max())


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_windows_refer_to_the_upright_image(form):
    """All eight EXIF orientations, each with a window off the centre."""
    spec = PreprocessSpec(image_size=32, **PLAIN)
    picture = drawing(200, 120)
    encoded = [encode(picture, form, orientation) for orientation in range(1, 9)]
    upright = [picture.size if orientation < 5 else picture.size[::-1] for orientation in range(1, 9)]
    params = parameters(spec, upright, train=True)
    params["anchor"][:], params["shape"][:] = (10, 50), (90, 60)
    off = difference(spec, encoded, params)
    assert off.mean() < 0.5 and off.max() <= 4
    lying = parameters(spec, [picture.size] * 8, train=False)
    plain, turned = (ReferencePipeline(spec, 8).decode([data] * 8, lying)[0][0] for data in (encoded[0], encoded[2]))
    assert (plain - turned).abs().mean() > 0.05, "the picture must not look the same upside down"


@pytest.mark.skipif(not GROCERY.is_dir(), reason="needs the grocery photos under ../shared/data")
@pytest.mark.parametrize("train", [True, False])
def test_twins_agree_on_real_photos(train):
    spec = PreprocessSpec(image_size=64, **PLAIN)
    photos = [path.read_bytes() for path in sorted(GROCERY.rglob("*.jpg"))[::20]]
    off = difference(spec, photos, parameters(spec, [Image.open(io.BytesIO(photo)).size for photo in photos], train))
    assert off.mean() <= 0.5 and np.quantile(off, 0.999) <= 4, (off.mean(), np.quantile(off, 0.999))


def test_a_trained_tower_embeds_what_either_twin_decodes_alike(catalogue, tmp_path):
    """Cosine >= 0.999 for real photos (drawn ones where there are none) in every form that cameras and shops bring."""
    photos = sorted(GROCERY.rglob("*.jpg"))[::100] if GROCERY.is_dir() else []
    pictures = [Image.open(path).convert("RGB") for path in photos] or [drawing(300, 200, seed) for seed in range(8)]
    forms = [encode(picture) for picture in pictures]
    for turn, picture in enumerate(pictures):
        alpha = Image.merge("RGBA", [*picture.split(), picture.split()[0]])
        forms += [encode(picture, orientation=1 + turn % 8), encode(picture.convert("CMYK"))]
        forms += [encode(picture.convert("L")), encode(picture.convert("P"), "PNG"), encode(alpha, "PNG")]
    config = tiny_config(catalogue, tmp_path / "run", **{"train.steps": 60, "optimizer.lr": 3e-3})
    with trainer(config) as t:
        for data in t.loader.steps(0, 60):
            t.train_step(data)
        t.method.towers.eval()
        sizes = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size for data in forms]
        params = parameters(config.data.preprocess, sizes, train=False)
        vectors = []
        for twin in (ImagePipeline, ReferencePipeline):
            with closing(twin(config.data.preprocess, len(forms))) as pipeline, torch.no_grad():
                images, ok = pipeline.decode(forms, params)
                assert ok.all()
                vectors.append(torch.nn.functional.normalize(t.method.towers.query(images).double(), dim=-1))
    dali, pillow = vectors
    assert (dali * pillow).sum(1).min() >= 0.999
    spread = dali[: len(pictures)] @ dali[: len(pictures)].T
    assert spread.min() < 0.9, "the tower must tell photos apart"


def test_mirroring_colour_and_normalising_do_what_they_say():
    spec = PreprocessSpec(image_size=40)
    picture = drawing(40, 40)
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255
    params = parameters(PreprocessSpec(image_size=40, eval_crop=1.0), [(40, 40)] * 2, train=False)
    params["flip"][1] = 1
    params["matrix"][1] = [[0, 1, 0], [0, 0, 2], [1, 0, 0]]
    params["offset"][1] = [0.1, -0.5, 0.0]
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (spec.mean, spec.std))
    mirrored = pixels[:, :, ::-1]
    changed = np.stack([mirrored[1] + 0.1, 2 * mirrored[2] - 0.5, mirrored[0]]).clip(0, 1)
    for pipeline in (ImagePipeline(spec, 2), ReferencePipeline(spec, 2)):
        images, _ = pipeline.decode([encode(picture, "PNG")] * 2, params)
        assert np.allclose(images[0], (pixels - mean) / std, atol=1e-5)
        assert np.allclose(images[1], (changed - mean) / std, atol=1e-5)


# ---------------------------------------------------------------- batches and bad files


def test_an_image_does_not_depend_on_its_batch():
    """Bit for bit: one by one, in parts, all at once, on one thread or two."""
    spec = PreprocessSpec(image_size=56)
    pictures = [drawing(120 + 37 * seed, 300 - 29 * seed, seed) for seed in range(7)]
    encoded = [encode(picture, "PNG" if seed == 3 else "JPEG") for seed, picture in enumerate(pictures)]
    params = parameters(spec, [picture.size for picture in pictures])
    pipeline, other = ImagePipeline(spec, 7), ImagePipeline(spec, 32, num_threads=2)
    together, ok = pipeline.decode(encoded, params)
    kept = together.clone()
    assert ok.all()

    def some(rows):
        return [encoded[row] for row in rows], {name: array[rows] for name, array in params.items()}

    for rows in [[row] for row in range(7)] + [[0, 1, 2], [6, 5, 4, 3, 2]]:
        assert torch.equal(pipeline.decode(*some(rows))[0], together[rows])
    assert torch.equal(other.decode(encoded, params)[0], together)
    assert torch.equal(together, kept), "a later call must not write into an earlier batch"
    images, ok = pipeline.decode(*some([]))
    assert images.shape == (0, 3, 56, 56) and ok.shape == (0,)
    with pytest.raises(ValueError, match="at most 7"):
        pipeline.decode(encoded * 2, params)


def test_a_bad_image_costs_itself_alone():
    spec = PreprocessSpec(image_size=32)
    good = encode(drawing(160, 120), quality=95)
    broken_header = good[:150] + bytes(100) + good[250:]
    bad = {
        "empty": b"",
        "page": b"<html>404</html>" * 10,
        "cut short": good[: len(good) // 2],
        "header only": good[:200],
        "broken header": broken_header,
        "cut png": encode(drawing(160, 120), "PNG")[:3000],
        "window outside": good,
    }
    encoded = [good, *bad.values(), good]
    params = parameters(spec, [(160, 120)] * len(encoded))
    params["anchor"][-2], params["shape"][-2] = (100, 0), (61, 50)
    for pipeline in (ImagePipeline(spec, 16), ReferencePipeline(spec, 16)):
        first = {name: array[:1] for name, array in params.items()}
        alone, _ = pipeline.decode([good], first)
        for _ in range(2):
            images, ok = pipeline.decode(encoded, params)
            assert ok.tolist() == [True, *[False] * len(bad), True]
            assert not images[~ok].any(), "a bad image is the mean colour: exactly zero"
            assert torch.equal(images[0], alone[0]) and images[-1].any()
        images, ok = pipeline.decode([broken_header], first)
        assert not ok.any() and not images.any()
        assert torch.equal(pipeline.decode([good], first)[0], alone)


def test_a_broken_pipeline_does_not_pass_for_bad_images(monkeypatch):
    spec = PreprocessSpec(image_size=32)
    pipeline = ImagePipeline(spec, 4)

    class Broken:
        def run(self, **inputs):
            raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(pipeline, "_pipeline", Broken())
    with pytest.raises(RuntimeError, match="device lost"):
        pipeline.decode([encode(drawing(50, 50))] * 4, parameters(spec, [(50, 50)] * 4))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads through /proc")
def test_close_ends_the_threads():
    spec = PreprocessSpec(image_size=32)
    picture = drawing(50, 50)

    def use(count):
        for _ in range(count):
            pipeline = ImagePipeline(spec, 4, num_threads=3)
            pipeline.decode([encode(picture)], parameters(spec, [(50, 50)]))
            pipeline.close()
        return len(os.listdir("/proc/self/task"))

    assert use(5) <= use(1)


def test_device_is_checked():
    with pytest.raises(ValueError, match="'cpu' or 'mixed'"):
        ImagePipeline(PreprocessSpec(), 4, device="gpu")


# ---------------------------------------------------------------- a GPU, pretended


class Queue:
    """A stream that runs nothing before someone waits for it, as a busy GPU's."""

    def __init__(self):
        self.work, self.done = [], 0

    def run(self, upto):
        while self.done < upto:
            self.work[self.done]()
            self.done += 1


class Memory:
    """DALI's: the next run overwrites a buffer that nobody holds, even if a queued operation still reads it."""

    def __init__(self, pipeline):
        self.pipeline, self.buffers, self.streams = pipeline, [], []

    def run(self, stream, **inputs):
        self.streams.append(stream)
        for buffer, holder in self.buffers:
            if holder() is None:
                buffer.fill(np.nan)
        (batch,) = self.pipeline.run(**inputs)
        buffer = np.array(batch.as_tensor())
        lent = torch.from_numpy(buffer)
        self.buffers.append((buffer, weakref.ref(lent)))
        return (SimpleNamespace(as_tensor=lambda: lent),)


def test_a_buffer_lives_until_the_colour_step_has_read_it(monkeypatch):
    """In a GPU's order: a colour step reads its buffer when its stream gets there, long after decode has returned."""
    queue, spec = Queue(), PreprocessSpec(image_size=16)
    encoded = [[encode(drawing(40, 30, 3 * step + row)) for row in range(3)] for step in range(6)]
    params = parameters(spec, [(40, 30)] * 3)

    class Event:
        def record(self, stream):
            self.upto = len(stream.work)

        def synchronize(self):
            queue.run(self.upto)

    with closing(ImagePipeline(spec, 4)) as pipeline:
        wanted = [pipeline.decode(step, params)[0].clone() for step in encoded]
    pipeline = ImagePipeline(spec, 4)
    memory, colour = Memory(pipeline._pipeline), pipeline._colour

    def later(planes, params):
        found, shape = torch.empty(planes.shape), tuple(planes.shape)
        place = ctypes.cast(planes.data_ptr(), ctypes.POINTER(ctypes.c_float))  # does not keep the buffer
        queue.work.append(lambda: found.copy_(colour(torch.from_numpy(np.ctypeslib.as_array(place, shape)), params)))
        return found

    for owner, name, value in (
        (torch.cuda, "current_stream", lambda device=None: queue),
        (torch.cuda, "Event", Event),
        (torch, "from_dlpack", lambda lent: lent),
        (pipeline, "_pipeline", memory),
        (pipeline, "_colour", later),
        (pipeline, "_mixed", True),
    ):
        monkeypatch.setattr(owner, name, value)
    found = []
    for number, step in enumerate(encoded):
        found.append(pipeline.decode(step, params)[0])
        assert queue.done == number, "the host is one batch ahead of the device and no more"
    assert all(stream is queue for stream in memory.streams), "DALI brings its result on the stream that reads it"
    pipeline.close()
    for step, (images, right) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(images, right), f"batch {step}"
    assert all(holder() is None for _, holder in memory.buffers), "nor does a buffer live for ever"
    counts = encoded[0][0].index(b"\xff\xc4") + 5  # of a Huffman table: only a decoder sees that they are wrong
    before, bad = len(memory.buffers), encoded[0][0][:counts] + b"\xff" * 16 + encoded[0][0][counts + 16 :]
    monkeypatch.setattr(pipeline, "_pipeline", memory)
    pipeline.decode([*encoded[0], bad], parameters(spec, [(40, 30)] * 4))
    assert len(memory.buffers) > before + 1, "a bad image makes several runs of a call"
    assert all(holder() is not None for _, holder in memory.buffers[before:]), (
        "whose buffers are read by what is queued"
    )


# ---------------------------------------------------------------- which nvJPEG


def test_the_nvjpeg_in_this_process_tells_its_version():
    """Run for real where DALI's wheels bring one: its functions that ask nothing of a GPU work without one."""
    with closing(ImagePipeline(PreprocessSpec(image_size=16), 1)):
        found = nvjpeg.loaded_nvjpeg()
    if found is None:
        pytest.skip("no nvJPEG is installed")
    (major, minor, patch), file = found
    installed = metadata.version("nvidia-nvjpeg")  # the wheel's, unless another CUDA is on the library path
    assert f"{major}.{minor}.{patch}." in f"{installed}." or "site-packages" not in file
    assert Path(file).is_file() and Path(file).name.startswith("libnvjpeg.so")
    assert nvjpeg.require_nvjpeg() == f"{major}.{minor}.{patch} ({file})"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (((13, 1, 9), "/cuda-13.0/libnvjpeg.so.13"), "/cuda-13.0/libnvjpeg.so.13 is nvJPEG 13.1.9; before 13.2 DALI"),
        (((12, 4, 0), "libnvjpeg.so.12"), "libnvjpeg.so.12 is nvJPEG 12.4.0"),
        (None, "DALI has loaded no nvJPEG"),
        (((13, 2, 0), "a"), ""),
        (((14, 0, 0), "a"), ""),
    ],
)
def test_an_old_nvjpeg_is_refused_on_a_gpu(found, said, monkeypatch):
    monkeypatch.setattr(nvjpeg, "loaded_nvjpeg", lambda: found)
    if not said:
        assert nvjpeg.require_nvjpeg() == f"{found[0][0]}.{found[0][1]}.0 (a)"
        return
    with pytest.raises(UserError) as error:
        nvjpeg.require_nvjpeg()
    text = str(error.value)
    assert text.startswith(said) and "\n" not in text
    for remedy in ("LD_LIBRARY_PATH", "module unload cuda", "data.backend dali_cpu"):
        assert remedy in text


def test_only_dali_on_a_gpu_asks_for_an_nvjpeg(monkeypatch):
    """`dali` there is refused with an old one; `dali_cpu` never decodes there."""
    asked = []
    spec, cuda = PreprocessSpec(image_size=16), torch.device("cuda", 3)
    monkeypatch.setattr("harness.data.decode_dali.ImagePipeline", lambda *words: asked.append(words[3:]))
    for backend, device in (("dali", cuda), ("dali_cpu", cuda), ("dali", torch.device("cpu"))):
        open_pipeline(spec, backend, 1, 1, device)
    assert asked == [("mixed", 3), ("cpu", 3), ("cpu", 0)]
