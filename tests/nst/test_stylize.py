"""What a user of `Stylizer` relies on, with a generator that is small and untrained: mechanics, not looks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

import nst.stylize
from nst.approaches import UniganModel
from nst.images import to_float
from nst.networks.generator import Generator
from nst.stylize import Stylizer, joined_codes

CONFIG = UniganModel(content_widths=(8, 12, 16, 16), style_width=8, num_blocks=2, embedding_dim=16)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Generator(CONFIG).eval()


@pytest.fixture
def stylizer(generator: Generator) -> Stylizer:
    return Stylizer(generator)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[:197, :301])


@pytest.fixture(scope="module")
def painting() -> np.ndarray:
    return load_sample_image("flower.jpg")


def test_strength_zero_is_the_content_itself(
    stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray
) -> None:
    assert np.array_equal(stylizer(photo, painting, strength=0), photo)
    planes = to_float(photo)
    assert torch.equal(stylizer(planes, painting, strength=0.0, colors="content"), planes)


def test_strength_moves_pixels_in_proportion(
    stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray
) -> None:
    full, half = stylizer(photo, painting).astype(int), stylizer(photo, painting, strength=0.5).astype(int)
    assert np.abs(full - photo).mean() > 10
    assert np.abs(half - (full + photo) / 2).max() <= 1


@pytest.mark.parametrize("size", [(301, 197), (16, 16), (17, 250), (256, 256)])
def test_the_result_is_the_same_kind_in_the_same_size(
    stylizer: Stylizer, painting: np.ndarray, size: tuple[int, int]
) -> None:
    image = Image.fromarray(data.astronaut()).resize(size)
    result = stylizer(image, painting)
    assert isinstance(result, Image.Image)
    assert (result.size, result.mode) == (size, "RGB")
    pixels = np.array(image)
    assert np.array_equal(stylizer(pixels, painting), np.array(result))
    floats = stylizer(to_float(pixels), Image.fromarray(painting))
    assert floats.shape == (3, size[1], size[0])
    assert float((floats - to_float(np.array(result))).abs().max()) <= 1.01 / 127.5
    assert stylizer(to_float(pixels)[None], painting).shape == (1, 3, size[1], size[0])


def test_alpha_is_kept(stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray) -> None:
    alpha = np.tile(np.linspace(0, 255, 301, dtype=np.uint8), (197, 1))
    image = Image.fromarray(np.dstack([photo, alpha]))
    result = stylizer(image, painting)
    assert result.mode == "RGBA"
    assert np.array_equal(np.array(result)[..., 3], alpha)
    assert np.array_equal(np.array(result)[..., :3], stylizer(photo, painting))
    assert stylizer(image, painting, max_side=100).size == (100, 65)


def test_pictures_come_out_upright(stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray) -> None:
    image = Image.fromarray(photo)
    image.getexif()[0x0112] = 6
    assert stylizer(image, painting).size == (197, 301)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "I;16"])
def test_other_modes_become_rgb(
    stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray, mode: str
) -> None:
    result = stylizer(Image.fromarray(photo).convert(mode), painting)
    assert result.mode == ("RGBA" if mode == "LA" else "RGB")


def test_large_pictures_are_tiled_in_every_kind(generator: Generator, painting: np.ndarray) -> None:
    stylizer = Stylizer(generator, tile_side=256)
    photo = np.array(Image.fromarray(data.chelsea()).resize((500, 330)))
    result = stylizer(photo, painting)
    assert result.shape == photo.shape
    floats = stylizer(to_float(photo), painting)
    assert float((floats - to_float(result)).abs().max()) < 4 / 127.5  # its thumbnail was not rounded
    batch = stylizer.stylize_batch(photo[None], stylizer.encode_style(painting))
    assert np.array_equal(batch[0], result)


def test_threads_may_share_one(generator: Generator, painting: np.ndarray) -> None:
    """A server answers in threads: what one picture's tiles are normalised by is not another's."""
    stylizer = Stylizer(generator, tile_side=256)
    pictures = [np.ascontiguousarray(data.chelsea()[:250, :450]), data.coffee(), data.astronaut()[:99, :77]]
    alone = [stylizer(photo, painting) for photo in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda photo: stylizer(photo, painting), pictures * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert np.array_equal(found, expected)


def test_batches_are_the_single_pictures(stylizer: Stylizer, painting: np.ndarray) -> None:
    photos = np.stack([data.astronaut()[:128, :160], data.astronaut()[200:328, 100:260]])
    codes = [stylizer.encode_style(painting), stylizer.encode_style(data.retina())]
    single = np.stack([stylizer(photo, painting) for photo in photos])
    batch = stylizer.stylize_batch(photos, codes[0])
    assert np.abs(batch.astype(int) - single).max() <= 1
    both = stylizer.stylize_batch(photos, joined_codes(codes), strength=0.7, colors="content")
    second = stylizer(photos[1], codes[1], strength=0.7, colors="content")
    assert np.abs(both[1].astype(int) - second).max() <= 1


def test_pictures_of_many_sizes_come_back_in_order(
    stylizer: Stylizer, painting: np.ndarray, monkeypatch
) -> None:
    astronaut = Image.fromarray(data.astronaut())
    sizes = [(96, 64), (64, 96), (96, 64), (128, 128), (64, 96), (96, 64)]
    photos: list = [astronaut.resize(size) for size in sizes]
    photos[2] = np.array(photos[2])
    photos[4] = photos[4].convert("RGBA")
    num_taken, batches = [], []

    def taken():
        for photo in photos:
            num_taken.append(1)
            yield photo

    draw = stylizer.renderer.inference.draw
    monkeypatch.setattr(
        stylizer.renderer.inference,
        "draw",
        lambda batch, code: batches.append(len(batch)) or draw(batch, code),
    )
    monkeypatch.setattr(nst.stylize, "NUM_AT_ONCE", 5)
    done = stylizer.stylize_many(taken(), painting, strength=0.8)
    first = next(done)
    assert len(num_taken) == 5  # it does not hold all there are
    results = [first, *done]
    assert batches == [2, 2, 1, 1]
    for photo, result in zip(photos, results, strict=True):
        assert type(result) is type(photo) or isinstance(result, Image.Image)
        single = np.array(stylizer(photo, painting, strength=0.8)).astype(int)
        assert np.abs(np.array(result).astype(int) - single).max() <= 1
    with pytest.raises(ValueError, match="strength 2"):
        stylizer.stylize_many(photos, painting, strength=2)


def test_a_mask_says_where(stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray) -> None:
    full = stylizer(photo, painting).astype(int)
    mask = np.zeros((197, 301), np.float32)
    mask[:, 100:200], mask[:, 200:] = 0.5, 1
    result = stylizer(photo, painting, mask=mask).astype(int)
    assert np.array_equal(result[:, :100], photo[:, :100])
    assert np.array_equal(result[:, 200:], full[:, 200:])
    assert np.abs(result[:, 100:200] - (full + photo)[:, 100:200] / 2).max() <= 1
    alike = [(mask * 255).round().astype(np.uint8), torch.from_numpy(mask)[None]]
    for other in [*alike, Image.fromarray(alike[0])]:
        assert np.abs(stylizer(photo, painting, mask=other).astype(int) - result).max() <= 1
    assert np.array_equal(stylizer(photo, painting, mask=mask == 1)[:, :200], photo[:, :200])
    small = stylizer(photo, painting, mask=mask, max_side=150)
    assert np.array_equal(small[:, :48], stylizer(photo, painting, strength=0, max_side=150)[:, :48])
    floats = to_float(photo)
    assert torch.equal(stylizer(floats, painting, mask=mask)[..., :100], floats[..., :100])


def test_a_compiler_that_fails_is_done_without(
    generator: Generator, photo: np.ndarray, painting: np.ndarray, monkeypatch, caplog
) -> None:
    def fail(*inputs):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda network, **options: fail)
    stylizer = Stylizer(generator, compile=True)
    plain = Stylizer(generator)(photo, painting)
    assert all(np.array_equal(stylizer(photo, painting), plain) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile cannot be used here, going on without it: no C++ compiler"
    ]


def test_only_sizes_that_come_again_are_compiled_and_not_too_many(
    generator: Generator, painting: np.ndarray, monkeypatch
) -> None:
    compiled = set()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda network, **_: lambda batch, code: compiled.add(batch.shape) or network(batch, code),
    )
    stylizer = Stylizer(generator, compile=True)
    code = stylizer.encode_style(painting)
    for _ in range(2):
        for side in range(16, 16 + 8 * 12, 8):
            assert len(compiled) <= 8
            stylizer(np.zeros((side, 16, 3), np.uint8), code)
    assert len(compiled) == 8


def test_content_colors_keep_chroma_and_contrast(stylizer: Stylizer, painting: np.ndarray) -> None:
    grey_ish = to_float(data.astronaut()[:192, :192]) * 0.4  # far from the ends, where colours are cut off
    result = stylizer(grey_ish, painting, colors="content")
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    light, light_before = (result * weights).sum(0), (grey_ish * weights).sum(0)
    inside = (result.abs() < 0.999).all(dim=0)
    assert float(inside.float().mean()) > 0.95
    chroma = ((result - light) - (grey_ish - light_before)).abs().amax(dim=0)
    assert float(chroma[inside].max()) < 1e-4
    assert float(light.mean()) == pytest.approx(float(light_before.mean()), abs=0.01)
    assert float(light.std()) == pytest.approx(float(light_before.std()), rel=0.05)
    assert float((light - light_before).abs().mean()) > 0.02


def test_mixes_lie_between_their_styles(stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray) -> None:
    styles = [painting, data.retina()]
    first, second = (stylizer(photo, style).astype(int) for style in styles)
    assert np.array_equal(stylizer(photo, styles, weights=[2, 0]), first)
    assert np.array_equal(stylizer(photo, styles), stylizer(photo, styles, weights=[1, 1]))
    mixed = stylizer(photo, styles).astype(int)
    apart = np.abs(first - second).mean()
    assert np.abs(mixed - first).mean() < apart
    assert np.abs(mixed - second).mean() < apart


def test_codes_are_encoded_once(
    generator: Generator, photo: np.ndarray, painting: np.ndarray, monkeypatch
) -> None:
    stylizer = Stylizer(generator)
    num_calls = []
    encode = generator.encode_style
    monkeypatch.setattr(
        generator, "encode_style", lambda style: num_calls.append(style.shape) or encode(style)
    )
    for _ in range(3):
        stylizer(photo, [painting.copy(), data.retina()])
    assert len(num_calls) == 2
    assert [min(shape[2:]) for shape in num_calls] == [427, 512]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": 1.5}, "strength 1.5"),
        ({"strength": float("nan")}, "strength nan"),
        ({"colors": "both"}, "'both'"),
        ({"max_side": 4}, "max_side 4"),
        ({"style": []}, "no style"),
        ({"weights": [1, 2]}, "2 weights for 1 styles"),
        ({"weights": [-1.0]}, "0 or more"),
        ({"weights": [float("inf")]}, "not all numbers"),
        ({"content": np.zeros((15, 40, 3), np.uint8)}, "40x15 px"),
        ({"content": np.zeros((64, 64), np.uint8)}, r"uint8 \[H, W, 3\]"),
        ({"content": np.zeros((64, 64, 3), np.float32)}, "float32"),
        ({"content": torch.full((3, 64, 64), 200.0)}, r"scale it to \[-1, 1\]"),
        ({"content": torch.zeros(64, 64, 3)}, "floats"),
        ({"content": Image.new("F", (64, 64))}, "8-bit"),
        ({"mask": np.zeros((64, 64), np.uint8)}, r"give \[197, 301\]"),
        ({"mask": np.ones((197, 301), np.uint8)}, "0 and 1 as uint8"),
        ({"mask": np.full((197, 301), 255.0)}, "scale it to 0..1"),
        ({"mask": np.full((197, 301), np.nan)}, "scale it to 0..1"),
        ({"mask": np.zeros((197, 301), int)}, "booleans, uint8 or floats"),
        ({"mask": Image.new("F", (301, 197))}, "convert it to 8 bits"),
        ({"style": torch.zeros(2, 3, 64, 64)}, "list of styles"),
    ],
)
def test_mistakes_say_what_to_do(
    stylizer: Stylizer, photo: np.ndarray, painting: np.ndarray, arguments, words
) -> None:
    with pytest.raises(ValueError, match=words):
        stylizer(**{"content": photo, "style": painting, **arguments})
