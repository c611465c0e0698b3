"""Large pictures: tiles that show no seams, and what happens when memory does not suffice."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from nst.approaches import RganModel, UniganModel
from nst.images import to_float
from nst.networks.blocks import channel_statistics
from nst.networks.build import build_generator
from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator
from nst.picture_statistics import around, cells, longest
from nst.stylize import Stylizer
from nst.tiling import shares, spans

CONFIG = UniganModel(content_widths=(8, 12, 16, 16), style_width=8, num_blocks=2, embedding_dim=16)
UNTILED = 2048  # px
PICTURES = {
    "retina": (data.retina, (704, 704)),
    "chelsea": (data.chelsea, (860, 570)),
    "hubble": (data.hubble_deep_field, (760, 663)),
}


@pytest.fixture(scope="module")
def generator() -> StyleGenerator:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_generator(CONFIG).eval()


def picture(name: str) -> np.ndarray:
    """uint8 [H, W, 3] of a real photograph."""
    read, size = PICTURES[name]
    return np.array(Image.fromarray(read()).resize(size, Image.Resampling.LANCZOS))


def stylized(generator: StyleGenerator, photo: np.ndarray, tile_side: int) -> np.ndarray:
    """Levels of 255, [H, W, 3], unrounded."""
    done = Stylizer(generator, tile_side=tile_side)(to_float(photo), data.coffee())
    return done.permute(1, 2, 0).numpy() * 127.5


def seams(difference: np.ndarray, tile_side: int) -> tuple[float, float]:
    """Of tiled minus untiled [H, W, 3]: how much steeper it is where tiles begin and end than elsewhere, in
    levels a px, and by how many levels neighbouring tiles' means differ at most."""
    steeper, steps = 0.0, 0.0
    for pixels in (difference, difference.swapaxes(0, 1)):
        found = spans(len(pixels), tile_side, 128, 8)
        slopes = np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2))
        borders = sorted({edge for span in found for edge in span if 0 < edge < len(pixels)})
        if borders:
            steeper = max(steeper, max(slopes[edge - 1] for edge in borders) - float(np.median(slopes)))
        means = [pixels[start:stop].mean(axis=(0, 1)) for start, stop in found]
        steps = max([steps, *(float(np.abs(a - b).max()) for a, b in itertools.pairwise(means))])
    return steeper, steps


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_tiled_and_untiled_are_alike_and_no_seam_shows(generator: StyleGenerator, name: str) -> None:
    photo = picture(name)
    whole = stylized(generator, photo, UNTILED)
    for tile_side in (256, 320, 384):
        difference = stylized(generator, photo, tile_side) - whole
        assert np.abs(difference).any(), "it was not tiled"
        assert np.abs(difference).mean() < 1, tile_side
        steeper, steps = seams(difference, tile_side)
        assert steeper < 0.5, tile_side
        assert steps < 1, tile_side


def test_tiles_with_statistics_of_their_own_would_show(generator: StyleGenerator) -> None:
    """The measures above see what they are for."""
    photo = picture("retina")
    whole = stylized(generator, photo, UNTILED)
    halves = [stylized(generator, np.ascontiguousarray(half), UNTILED) for half in np.split(photo, 2, axis=1)]
    difference = np.concatenate(halves, axis=1) - whole
    assert np.abs(difference).mean() > 2
    slopes = np.abs(np.diff(difference, axis=1)).mean(axis=(0, 2))
    assert slopes[photo.shape[1] // 2 - 1] - np.median(slopes) > 2


@pytest.mark.parametrize("palette", ["style", "content"])
def test_the_other_approach_is_tiled_too(palette) -> None:
    torch.manual_seed(0)
    config = RganModel(widths=(8, 12, 16, 16), style_width=8, style_side=64, palette=palette)
    unet = build_generator(config).eval()
    photo = picture("retina")[:500, :500]
    difference = stylized(unet, photo, 256) - stylized(unet, photo, UNTILED)
    assert 0 < np.abs(difference).mean() < 1


def test_the_contents_own_colours_are_those_of_the_whole_picture() -> None:
    torch.manual_seed(0)
    config = RganModel(widths=(8, 12, 16, 16), style_width=8, style_side=64, palette="content")
    stylizer = Stylizer(build_generator(config).eval(), tile_side=256)
    photo = to_float(picture("retina")[:416, :400])
    statistics = stylizer.renderer.statistics(photo, stylizer.encode_style(data.coffee()), 256)
    for found, exact in zip(statistics["palette.norm"][0], channel_statistics(photo[None]), strict=True):
        assert torch.allclose(found, exact, atol=0.01 / 127.5)


def test_a_mask_and_content_colours_reach_every_tile(generator: StyleGenerator) -> None:
    photo = picture("retina")
    mask = np.zeros(photo.shape[:2], np.float32)
    mask[:, 260:] = 1
    options = {"mask": mask, "colors": "content"}
    tiled = Stylizer(generator, tile_side=256)(photo, data.coffee(), **options).astype(int)
    whole = Stylizer(generator, tile_side=UNTILED)(photo, data.coffee(), **options).astype(int)
    assert np.array_equal(tiled[:, :260], photo[:, :260])
    assert np.abs(tiled[:, 260:] - photo[:, 260:]).mean() > 5
    assert np.abs(tiled - whole).mean() < 1


class SmallMemory(StyleGenerator):
    """A generator on a device that holds so many pixels at once."""

    def __init__(self, generator: StyleGenerator, num_pixels: int) -> None:
        super().__init__()
        self.generator, self.num_pixels, self.stride = generator, num_pixels, generator.stride
        self.asked: list[tuple[int, ...]] = []

    def encode_style(self, style: torch.Tensor) -> StyleCode:
        return self.generator.encode_style(style)

    def forward(self, content: torch.Tensor, code: StyleCode) -> torch.Tensor:
        self.asked.append(tuple(content.shape))
        if content[:, 0].numel() > self.num_pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it.")
        return self.generator(content, code)


def test_where_memory_runs_out_tiles_become_smaller(generator: StyleGenerator, caplog) -> None:
    photo = picture("retina")
    small = Stylizer(SmallMemory(generator, 256 * 264))
    whole = Stylizer(generator)(photo, data.coffee()).astype(int)
    assert np.abs(small(photo, data.coffee()).astype(int) - whole).mean() < 1
    assert [record.getMessage() for record in caplog.records] == [
        "not enough memory for tiles of 640 px; trying 320 px",
        "not enough memory for tiles of 320 px; trying 256 px",
    ]


def test_where_memory_runs_out_batches_are_divided(generator: StyleGenerator) -> None:
    photos = np.stack([picture("retina")[top : top + 96, :128] for top in range(0, 320, 64)])
    memory = SmallMemory(generator, 2 * 96 * 128)
    small, plain = Stylizer(memory), Stylizer(generator)
    code = plain.encode_style(data.coffee())
    batch = small.stylize_batch(photos, code).astype(int)
    assert np.abs(batch - plain.stylize_batch(photos, code)).max() <= 1
    assert [shape[0] for shape in memory.asked] == [5, 2, 3, 1, 2]


def test_too_little_memory_for_any_tile_is_said_in_words(generator: StyleGenerator) -> None:
    stylizer = Stylizer(SmallMemory(generator, 1000))
    with pytest.raises(
        MemoryError, match=r"704x704 px do not fit on cpu.*Tried to allocate 20.00 GiB\.\)"
    ) as caught:
        stylizer(picture("retina"), data.coffee())
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(generator: StyleGenerator, monkeypatch) -> None:
    stylizer = Stylizer(generator)
    monkeypatch.setattr(generator, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        stylizer(picture("retina")[:64, :64], data.coffee())


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 256, 64), (257, 256, 64), (5000, 768, 128), (770, 768, 384)]
)
def test_spans_cover_everything_with_overlap(length: int, tile: int, overlap: int) -> None:
    found = spans(length, tile, overlap, 8)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(start % 8 == 0 for start, _ in found)
    assert all(stop - start < tile + 8 for start, stop in found)
    for (_, stop), (start, _) in itertools.pairwise(found):
        assert stop - start >= overlap
    total = np.zeros(length)
    for (start, stop), share in zip(found, shares(found, length, overlap), strict=True):
        total[start:stop] += share.numpy()
    assert np.allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize(("length", "side", "stride"), [(100, 704, 8), (705, 704, 8), (12000, 704, 64)])
def test_cells_divide_a_picture(length: int, side: int, stride: int) -> None:
    found = cells(length, side, stride)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(found))
    assert all(start % stride == 0 and 16 <= stop - start <= side + stride for start, stop in found)
    size = longest(found) + 64
    for start, stop in found:
        first, last = around((start, stop), length, size, stride)
        assert first % stride == 0
        assert 0 <= first <= start < stop <= last <= length
        assert last - first == length or size <= last - first < size + stride
