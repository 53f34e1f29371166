"""Where the material comes from: packages of npm, fetched here with pinned hashes, and of Debian, which must be there.

| material | package | licence | used for |
| --- | --- | --- | --- |
| Noto Color Emoji | Debian fonts-noto-color-emoji | images Apache-2.0, font OFL-1.1 | training, examination |
| Twemoji | npm @twemoji/svg | CC-BY-4.0 (Twitter, Inc. and contributors) | training |
| Fluent Emoji Flat | npm @iconify-json/fluent-emoji-flat | MIT (Microsoft) | training |
| EmojiOne 2 | npm @iconify-json/emojione | CC-BY-4.0 (Emoji One) | training |
| Firefox OS Emoji | npm @iconify-json/fxemoji | Apache-2.0 (Mozilla) | training |
| OpenMoji | npm openmoji | CC-BY-SA-4.0 | examination only, never committed |
| keywords | npm emojilib | MIT | captions |
| names, keywords | Debian unicode-cldr-core | Unicode-3.0 | captions |
| voices | Debian espeak-ng, flite, festival | GPL-3.0, BSD-like | training; see speech.py for which are held out |
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["BUILD", "ROOT", "material", "require_programs"]

ROOT: Final = Path(__file__).parents[2]
BUILD: Final = ROOT / "build" / "starter"

# Version and sha256 of the archive that `npm pack` gives.
_NPM: Final = {
    "@twemoji/svg": ("15.0.0", "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@iconify-json/emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "emojilib": ("4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
    "openmoji": ("17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
}
_DEBIAN: Final = {
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": "fonts-noto-color-emoji",
    "/usr/share/unicode/cldr/common/annotations/en.xml": "unicode-cldr-core",
    "/usr/bin/espeak-ng": "espeak-ng",
    "/usr/bin/flite": "flite",
    "/usr/bin/text2wave": "festival",
    "/usr/share/festival/voices/english/kal_diphone": "festvox-kallpc16k",
    "/usr/share/festival/voices/us/cmu_us_slt_arctic_hts": "festvox-us-slt-hts",
}


def require_programs() -> None:
    """End with a sentence when something of the system is missing."""
    missing = sorted({package for path, package in _DEBIAN.items() if not Path(path).exists()})
    if missing:
        raise SystemExit(f"make starter needs packages of the system; on Debian: apt install {' '.join(missing)}")
    if shutil.which("npm") is None:
        raise SystemExit("make starter needs npm, to fetch pictures and words; on Debian: apt install npm")


@cache
def material(package: str) -> Path:
    """Give the folder of an npm package, fetched when it is not there yet."""
    version, sha256 = _NPM[package]
    folder = BUILD / "npm" / f"{package.replace('/', '+')}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(folder.parent), "--silent"]
        said = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  (a fixed command)
        archive = folder.parent / said.stdout.split()[-1]
        actual = hashlib.sha256(archive.read_bytes()).hexdigest()
        if actual != sha256:
            raise SystemExit(f"{package} {version} has sha256 {actual}, expected {sha256}: it is not used")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").rename(folder)
        shutil.rmtree(partial)
        archive.unlink()
    return folder
