"""Writes the pictures and clips that the demo shows and the tests read. Nothing in them was trained on but concepts.

The pictures are Noto's, of concepts that were taught in other sizes and colours, and of some that never were; the
scenes are of combinations, and the voices are those, that were kept for the examination.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from starter.concepts import concepts
from starter.exam import clips, scene_pictures
from starter.material import ROOT
from starter.pictures import styles
from starter.sounds import RATE
from starter.speech import ACCENTS, TEST_ACCENTS, Espeak, Flite, festival, test_speakers

__all__ = ["write"]

Float32 = NDArray[np.float32]

DEMO: Final = ROOT / "services" / "embedmesh_cli" / "demo"
FROZEN: Final = ROOT / "tests" / "data" / "starter" / "exam.zip"

# Names of concepts; those that are held out in concepts.py are shown too, as what was never seen.
_SHOWN: Final = """
watch|alarm clock|stopwatch|keyboard|sun|cloud|umbrella|snowman|telephone|hot beverage|skull and crossbones|
anchor|crossed swords|balance scale|gear|high voltage|coffin|soccer ball|baseball|mountain|fountain|sailboat|
tent|scissors|airplane|envelope|pencil|snowflake|red heart|star|rainbow|water wave|volcano|
globe showing Europe-Africa|full moon|crescent moon|shooting star|thermometer|tornado|cloud with rain|
cloud with lightning|hot dog|taco|seedling|evergreen tree|palm tree|cactus|hot pepper|tulip|rose|sunflower|
ear of corn|four leaf clover|maple leaf|mushroom|tomato|grapes|watermelon|lemon|banana|pineapple|red apple|
peach|cherries|strawberry|hamburger|pizza|poultry leg|cooked rice|spaghetti|bread|french fries|sushi|ice cream|
doughnut|cookie|chocolate bar|candy|honey pot|wine glass|beer mug|baby bottle|popcorn|wrapped gift|
birthday cake|jack-o-lantern|Christmas tree|Santa Claus|fireworks|balloon|backpack|graduation cap|
studio microphone|ferris wheel|roller coaster|fishing pole|movie camera|headphone|artist palette|circus tent|
video game|bullseye|game die|bowling|saxophone|guitar|trumpet|violin|musical keyboard|tennis|basketball|trophy|
motorcycle|racing car|beach with umbrella|house|hospital|bank|school|factory|castle|pirate flag|rat|mouse|cow|
tiger|rabbit|cat|black cat|dragon|crocodile|whale|snail|snake|horse|goat|monkey|rooster|chicken|dog|pig|
elephant|octopus|ant|honeybee|lady beetle|fish|turtle|baby chick|penguin|koala|camel|dolphin|frog|wolf|bear|
panda|paw prints|eye|nose|tongue|thumbs up|crown|glasses|necktie|t-shirt|jeans|dress|running shoe|
high-heeled shoe|ghost|alien|skull|lipstick|syringe|pill|ring|gem stone|bouquet|broken heart|light bulb|bomb|
fire|droplet|money bag|credit card|laptop|calendar|books|newspaper|package|mobile phone|camera|television|radio|
battery|magnifying glass tilted left|locked|key|bell|flashlight|wrench|hammer|kitchen knife|microscope|
telescope|crystal ball|candle|spider|spider web|joystick|paintbrush|printer|world map|grinning face|crying face|
sleeping face|angry face|smiling face with sunglasses|face with tears of joy|rocket|helicopter|train|bus|
ambulance|fire engine|police car|taxi|tractor|ship|bicycle|toilet|shower|bed|shopping cart|satellite|skateboard|
robot|clown face|exploding head|drum|croissant|avocado|carrot|potato|egg|pancakes|cheese wedge|sandwich|crab|
lion|scorpion|unicorn|eagle|duck|bat|shark|owl|fox|butterfly|deer|gorilla|giraffe|zebra|hedgehog|kangaroo|
parrot|lobster|flamingo|sloth|brain|tooth|bone|astronaut|firefighter|mermaid|vampire|zombie|scarf|gloves|socks|
magnet|toolbox|teddy bear|broom|soap|sponge|stethoscope|kite|parachute|ringed planet|chair|axe|ladder|mirror|
window|bucket|toothbrush|jellyfish|donkey|teapot|nest with eggs
"""

# What the demo says, by engine; no voice of them was heard in training.
_ESPEAK: Final = (
    "dog", "pizza", "rocket", "birthday cake", "fire engine", "guitar", "penguin", "butterfly", "octopus", "watermelon",
    "mushroom", "police car", "trumpet", "full moon", "carrot", "castle",
)  # fmt: skip
_FLITE: Final = ("snowflake", "elephant", "red apple", "umbrella")
_FESTIVAL: Final = ("sailboat", "crown", "hamburger", "alarm clock")
_FESTIVAL_VOICE: Final = "kal_diphone"
# How much of each part of the examination is kept for the tests.
_FROZEN: Final = {"espeak": 80, "flite": 30, "festival": 60, "sounds": 32}
_FROZEN_SCENES: Final = 60


def write() -> None:
    """Write all of them."""
    _pictures()
    _speech()
    _frozen()


def _pictures() -> None:
    names = _SHOWN.replace("\n", "").split("|")
    drawn = styles()["noto"]
    assert set(names) <= {concept.name for concept in concepts()}  # noqa: S101
    _fresh(DEMO / "pictures")
    for name in names:
        # 128 colours with opacity: half the size, and no difference to the eye.
        image = Image.fromarray(drawn[name]).quantize(128, method=Image.Quantize.FASTOCTREE)
        image.save(DEMO / "pictures" / f"{_slug(name)}.png", optimize=True)
    _table(DEMO / "pictures.tsv", [(f"{_slug(name)}.png", name) for name in names])


def _speech() -> None:
    espeak, flite = Espeak(), Flite()
    speakers = test_speakers(random.Random(3), accents=(*TEST_ACCENTS, *ACCENTS))
    rows = []
    _fresh(DEMO / "speech")

    def keep(words: str, wave: Float32, voice: str) -> None:
        (DEMO / "speech" / f"{_slug(words)}.ogg").write_bytes(_ogg(wave))
        rows.append((f"{_slug(words)}.ogg", words, voice))

    for words in _ESPEAK:
        speaker = next(speakers)
        keep(words, espeak.say(words, speaker), f"espeak-ng {speaker.voice}")
    for words in _FLITE:
        keep(words, flite.say(words, "slt"), "flite slt")
    for words, wave in zip(_FESTIVAL, festival(_FESTIVAL, _FESTIVAL_VOICE), strict=True):
        keep(words, wave, f"festival {_FESTIVAL_VOICE}")
    _table(DEMO / "speech.tsv", rows)


def _frozen() -> None:
    """Keep a part of the examination for `make test`: files, and an index of what each shows or says."""
    chance = random.Random(5)
    index: dict[str, list[dict[str, str]]] = {"scenes": []}
    FROZEN.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(FROZEN, "w") as archive:

        def keep(part: str, file: str, content: bytes, caption: str) -> None:
            index[part].append({"file": file, "caption": caption})
            archive.writestr(zipfile.ZipInfo(file), content)  # without the time, so that the same file comes out

        files, rows, captions = scene_pictures()
        for i in sorted(chance.sample(range(len(files)), _FROZEN_SCENES)):
            keep("scenes", f"scenes/{i}.png", files[i], captions[rows[i]])
        for part, count in _FROZEN.items():
            index[part] = []
            those = clips(part)
            for i in sorted(chance.sample(range(len(those.words)), count)):
                keep(part, f"{part}/{i}.ogg", _ogg(those.waves[i]), those.words[i])
        archive.writestr(zipfile.ZipInfo("index.json"), json.dumps(index, indent=1))


def _ogg(wave: Float32) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="OGG", subtype="VORBIS")
    return file.getvalue()


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
