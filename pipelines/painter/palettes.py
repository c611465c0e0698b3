"""The painters' colours: for each manner a ramp (dark, middle, light) for every role, and the moods that
change some of them."""

from __future__ import annotations

import numpy as np

from pipelines.painter.scene import ROLES, Scene

NUM_SHADES = 64

PALETTES: dict[str, dict[str, str]] = {
    "pointillism": {
        "sky": "6a8ad4 a9c4ee fde6c0",
        "cloud": "b4a8dc ecdcea fffbea",
        "light": "f4a430 ffd860 fff8c8",
        "far": "6c6cb8 a096d4 dcc8e4",
        "green": "2a6a58 7cb450 e4e46c",
        "water": "3a64b4 74b0d6 e4f0e0",
        "earth": "9a5670 e4a878 fdeab0",
        "wall": "b87490 f0c0a0 fff2d0",
        "roof": "a83450 ec7850 fac080",
        "fruit": "c03450 f47840 fcd460",
        "cloth": "4454b4 8898e4 dadafa",
        "flower": "c84490 f488aa ffdada",
    },
    "impasto": {
        "sky": "122060 2c5cba a4c8ea",
        "cloud": "4670ba a8c6e0 f4f0cc",
        "light": "e89c14 fbd034 fff49c",
        "far": "1a3678 3c66aa 84a8ca",
        "green": "0c3024 387a3a b8c43c",
        "water": "0e245c 2a60a2 7cbaca",
        "earth": "5e3818 ba842c eeca66",
        "wall": "be8838 eaca5c fcf0b0",
        "roof": "7a2816 c65428 ea9044",
        "fruit": "a84614 ea8a1c fad044",
        "cloth": "1a3c80 3c80ba a0d2d2",
        "flower": "c8860c f2c01c fff28c",
    },
    "woodblock": {
        "sky": "1f4676 a9c0ba f2e4c2",
        "cloud": "e2d6b8 f4ead2 fbf4e2",
        "light": "c43a28 d84c34 e4664a",
        "far": "31567c 7096a4 bccab8",
        "green": "1d4842 4d7f62 a9ba78",
        "water": "153a70 3f7ca6 aed0c8",
        "earth": "6f5438 bc9c6a dfcb9c",
        "wall": "b0a07e dccca4 f2e6ca",
        "roof": "26324a 4a5a72 7c8a98",
        "fruit": "a02c20 d2523a ea9260",
        "cloth": "1e3c6a 4e78a2 a0bec8",
        "flower": "b84850 de8a88 f6cabe",
    },
    "watercolour": {
        "sky": "6ea6d8 b4d8f0 f6f4ea",
        "cloud": "c4cce0 e6eaf2 fcfcf8",
        "light": "f2b45c fad888 fdf0c0",
        "far": "8490c0 b0bedc dce4ee",
        "green": "4f8a5c 9cc67e e2efbe",
        "water": "4c94b4 98cad6 e2f2ee",
        "earth": "a8805c d6ba90 f2e4c6",
        "wall": "c8ac98 e8d6c2 faf2e6",
        "roof": "c06a5c e29c86 f4ccb8",
        "fruit": "cc4c54 f09468 fcd090",
        "cloth": "5c74b8 9cb4e0 dce8f6",
        "flower": "c85c9c ee9cc0 fcdce6",
    },
    "cubism": {
        "sky": "5a584e 969280 ccc4a8",
        "cloud": "8c886e c0b896 e8e0c4",
        "light": "b48638 d8b664 f4e2a6",
        "far": "474842 7c7868 aaa28c",
        "green": "30362a 636842 9a986a",
        "water": "39424a 6b7474 a6aa9a",
        "earth": "382616 7e5a32 c09656",
        "wall": "6c5436 ac8e5a e0cc98",
        "roof": "40261a 7e4a28 b67a46",
        "fruit": "6c2e16 ae622a daa052",
        "cloth": "282c2e 5a605e 9a9a8e",
        "flower": "86603a bc966a e4d0a2",
    },
    # Here a colour says how dark a thing is drawn, not how it is dyed.
    "charcoal": {
        "sky": "6a6a6a b4b4b4 ececec",
        "cloud": "a0a0a0 d8d8d8 ffffff",
        "light": "c8c8c8 f0f0f0 ffffff",
        "far": "4c4c4c 909090 cccccc",
        "green": "000000 5c5c5c b8b8b8",
        "water": "383838 949494 e4e4e4",
        "earth": "101010 888888 dcdcdc",
        "wall": "505050 a8a8a8 f0f0f0",
        "roof": "181818 585858 a0a0a0",
        "fruit": "101010 686868 d8d8d8",
        "cloth": "000000 585858 d0d0d0",
        "flower": "383838 909090 e8e8e8",
    },
    "fauvism": {
        "sky": "e83c7c fa9450 fed860",
        "cloud": "f89cba fed0c8 fff0d8",
        "light": "f8ca10 ffe83c fff694",
        "far": "5420a4 8444d0 d47cdc",
        "green": "066a46 12ae54 b4e434",
        "water": "1244c0 1094d8 54e4d0",
        "earth": "cc1048 f44c24 fab034",
        "wall": "f29c14 fad43c fff298",
        "roof": "b0082c ee2038 ff745c",
        "fruit": "cc0434 fc3c18 fea814",
        "cloth": "121294 2c40ec 5ca0fc",
        "flower": "d40880 fc40a0 ffa4d0",
    },
    "nocturne": {
        "sky": "06101c 183e54 44808a",
        "cloud": "122632 345a66 74989c",
        "light": "e89420 ffc648 fff0b0",
        "far": "050a14 0e1c2c 203a4c",
        "green": "030c0c 0a2622 2c5040",
        "water": "05121c 144058 4c9098",
        "earth": "0c0806 2c1c12 70502c",
        "wall": "120e14 3c2e32 7c6654",
        "roof": "0c0608 3c161a 843c28",
        "fruit": "200808 802818 dc7a2c",
        "cloth": "050a1c 162a4c 467096",
        "flower": "200818 742c4e cc7a8e",
    },
}

# Each painting takes one mood: the palette as it is, or with these roles dyed anew.
MOODS: dict[str, tuple[dict[str, str], ...]] = {
    "pointillism": (
        {},
        {"sky": "9a7cc8 f4b0b8 ffe8a8", "water": "6a64bc d09ac0 ffe0b4", "far": "5a60b4 9a84cc e8b8cc"},
        {"green": "3a7a4c a4c850 f4ec78", "sky": "5c9ad8 a4d8ea fbf4cc", "earth": "b07058 f0c080 fff0b8"},
    ),
    "impasto": (
        {},
        {"sky": "0a1444 1c3c8c 5c8cc8", "water": "081440 183c7c 5894b4", "green": "08241e 1e5634 7c9834"},
        {"sky": "186a84 44a8a8 dce8a4", "earth": "9c6414 e0ac24 fae060", "green": "20481c 7c9420 e0d038"},
    ),
    "woodblock": (
        {},
        {"sky": "24588a e0b890 f2d8b0", "far": "54507a 8c86a0 c8bcb8"},
        {"sky": "2c4a5c c8ccb4 f4e8c8", "green": "2c5038 6c8c54 c0be78", "water": "1c4a5c 5496a0 bcd8c4"},
    ),
    "watercolour": (
        {},
        {"sky": "b49cd0 f2ccc4 fcf0d4", "water": "7c90c4 d0c0d8 faece0", "far": "9c8cc0 ccb8d8 eee0ea"},
        {"green": "7c9850 c2cc78 eef0bc", "sky": "74c0d0 c0e6e6 f8f8ec", "earth": "b88c50 e4c68c f8ecc8"},
    ),
    "cubism": (
        {},
        {"sky": "505a58 8c9486 c8c8ae", "cloth": "33443c 64786a a0a890"},
        {"sky": "6a5640 a88c64 dcc498", "water": "4a4440 80766a b8aa90"},
    ),
    "charcoal": ({}, {"sky": "3c3c3c 888888 d4d4d4"}, {"far": "707070 a8a8a8 dcdcdc"}),
    "fauvism": (
        {},
        {"sky": "0c7cc8 20c4d0 a0f0c0", "far": "c01070 f04890 ffa0b0", "water": "6418b0 b038d0 f880d8"},
        {"sky": "f0b000 fcdc30 fff290", "water": "084c9c 08a0a0 80e8b0", "green": "0c5858 e0402c fca040"},
    ),
    "nocturne": (
        {},
        {"sky": "0a0a20 222c60 5068a0", "water": "080a20 1a2c64 4a70ac", "far": "060614 10142e 262f54"},
        {"sky": "0a1410 1e4038 5c8460", "water": "08120e 183f38 508c70"},
    ),
}


def ramp(stops: str) -> np.ndarray:
    """ "dark middle light" in hexadecimal -> float32 [NUM_SHADES, 3], 0 to 1."""
    colours = np.array([list(bytes.fromhex(stop)) for stop in stops.split()], np.float32) / 255
    where = np.linspace(0, len(colours) - 1, NUM_SHADES)
    bands = [np.interp(where, range(len(colours)), band) for band in colours.T]
    return np.stack(bands, axis=1).astype(np.float32)


def dye(scene: Scene, manner: str, rng: np.random.Generator) -> np.ndarray:
    """The scene in the manner's colours, in a mood drawn from `rng`: float32 [H, W, 3], 0 to 1."""
    moods = MOODS[manner]
    stops = PALETTES[manner] | moods[int(rng.integers(len(moods)))]
    table = np.stack([ramp(stops[role]) for role in ROLES])
    return table[scene.role, (scene.tone * (NUM_SHADES - 1)).astype(np.intp)]
