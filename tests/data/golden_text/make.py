"""Makes `texts.jsonl` and `vectors.npy`: varied texts and the vectors that sentence-transformers gives them.

    python make.py MODEL_FOLDER [--wordnet /usr/share/wordnet]

Needs sentence-transformers (which brings torch) and the all-MiniLM-L6-v2 folder in its original
layout; see README.md. The same texts come out every time.
"""

# ruff: noqa: RUF001  (characters that look like others are the point)
from __future__ import annotations

import argparse
import importlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SENTENCES: dict[str, list[str]] = json.loads((HERE / "sentences.json").read_text(encoding="utf-8"))
SNIPPETS: list[str] = json.loads((HERE / "snippets.json").read_text(encoding="utf-8"))

COMBINING = "".join(map(chr, [0x300, 0x301, 0x308, 0x327, 0x32D, 0x338, 0x35C, 0x5B0, 0x64B, 0x93C, 0x20D7]))
ODD = [
    "",
    " ",
    "\t\n\r ",
    "\u00a0\u2003\u3000",
    "\u200b\u200c\u200d\ufeff",
    "\0",
    "null\0byte and \x07bell\x1b[31m red",
    "\x00" * 300,
    "".join(map(chr, range(32))),
    "\x7f\x80\x9f delete and C1",
    "\ufffd replacement \ufffc object",
    "\ue000\uf8ff private use \U000f0000",
    "\ufdd0 noncharacter \uffff",
    "a",
    "I",
    "?",
    "...",
    "!" * 40,
    "[CLS]",
    "[SEP] inside [MASK] text [PAD] and [UNK]",
    "x[SEP]y",
    "[cls] lower case",
    "##ing ##ed un##related",
    "İstanbul ıIİi ǅ ß ẞ ﬁ ﬀ ŉ",
    "Ａｌｌ ｆｕｌｌ ｗｉｄｔｈ １２３",
    "𝕄𝕒𝕥𝕙 𝓈𝒸𝓇𝒾𝓅𝓉 🅰🅱",
    "e\u0301 and \u00e9, A\u030a and \u212b and \u00c5, \u1112\u1161\u11ab and \ud55c",
    "Z\u0351\u036b\u0343\u0352\u0323a\u0335\u0310l\u0334g\u0321o\u0328 " * 3,
    "\u202eright to left override\u202c and back",
    "soft\u00adhyphen and zero\u200bwidth",
    "one\u2028line\u2029paragraph\x0bvertical\x0cform\x85next",
    "tab\tseparated\tvalues",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "b" * 500 + " tail",
    "é" * 150 + " accents count before they are stripped",
    "𠀀𠀁 rare 漢字 𪜀",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ ᚠᚢᚦ 𐌰𐌱 ꙮ",
    "don't can't won't it's O'Brien's rock'n'roll",
    "“quotes” ‘single’ «guillemets» „low“ – dash — long … ellipsis",
]


def glosses(folder: Path) -> Iterator[str]:
    """Give the glosses of WordNet, definition and examples, in the order of the files."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  ") and " | " in line:
                yield line.split(" | ", 1)[1].strip()


def compose(wordnet: Path) -> list[tuple[str, str]]:
    """Give pairs of text and truncation."""
    rng = random.Random(20250102)
    real = list(glosses(wordnet))
    rng.shuffle(real)
    definitions = iter(real)
    texts = list(ODD)
    texts += [sentence for sentences in SENTENCES.values() for sentence in sentences]
    texts += SNIPPETS
    # Real English from a few words to the model's limit, short ones most often.
    texts += [re.split("[;(]", next(definitions))[0].strip() for _ in range(150)]
    texts += [next(definitions) for _ in range(170)]
    texts += [" ".join(next(definitions) for _ in range(rng.choice([2, 2, 2, 3, 3, 4, 5, 8, 12]))) for _ in range(160)]
    for sentences in SENTENCES.values():
        texts += [" ".join(rng.sample(sentences, count)) for count in (2, 3, 4, 5, 6, 8)]
    everything = [sentence for sentences in SENTENCES.values() for sentence in sentences] + SNIPPETS
    texts += [rng.choice([" ", "\n", "\n\n", "; "]).join(rng.sample(everything, rng.randint(2, 8))) for _ in range(90)]
    for _ in range(40):
        keys = [next(definitions).split()[0] for _ in range(rng.randint(1, 12))]
        values: list[Any] = [
            rng.choice([rng.random(), rng.randint(-999, 99999), None, True, key[::-1]]) for key in keys
        ]
        texts.append(json.dumps(dict(zip(keys, values, strict=True)), indent=rng.choice([None, 2])))
    for _ in range(40):
        rows = [[str(rng.randint(0, 10**n)) for n in range(1, rng.randint(3, 7))] for _ in range(rng.randint(1, 6))]
        texts.append("\n".join(rng.choice([",", "\t", " | "]).join(row) for row in rows))
    for _ in range(30):
        sentence = rng.choice(everything)
        texts.append("".join(c + rng.choice(COMBINING) * rng.choice([0, 0, 1, 3]) for c in sentence))
    for _ in range(20):
        texts.append("".join(chr(rng.choice([rng.randint(1, 0x2FF), rng.randint(0x300, 0xD7FF)])) for _ in range(80)))
    # Around and above the limit, and far above the window in which tokens are counted exactly.
    texts += ["word " * count for count in (253, 254, 255, 256, 300)]
    long = [" ".join(next(definitions) for _ in range(rng.randint(20, 40))) for _ in range(40)]
    long += ["\n".join(rng.choices(everything, k=rng.randint(40, 80))) for _ in range(10)]
    huge = [" ".join(next(definitions) for _ in range(140)), "".join(SENTENCES["Chinese"]) * 90, "no_space" * 1500]
    huge += [" ".join(SENTENCES["Arabic"]) * 40, " " * 9000 + "after much space " * 400, "x" * 9000 + " y z" * 300]
    huge += ["-=" * 5000, ("e\u0301" * 30 + " ") * 200]
    cut = long[:30] + huge
    return [(text, "end") for text in texts + long + huge] + [(text, "start") for text in cut]


def main() -> None:
    """Write both files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of all-MiniLM-L6-v2 in sentence-transformers' layout")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    arguments = parser.parse_args()
    pairs = compose(arguments.wordnet)
    model: Any = importlib.import_module("sentence_transformers").SentenceTransformer(
        str(arguments.model), device="cpu", local_files_only=True
    )
    vectors = np.empty((len(pairs), 384), np.float32)
    for truncation, side in (("end", "right"), ("start", "left")):
        model.tokenizer.truncation_side = side
        chosen = [i for i, pair in enumerate(pairs) if pair[1] == truncation]
        vectors[chosen] = model.encode([pairs[i][0] for i in chosen], batch_size=16)
    with (HERE / "texts.jsonl").open("w", encoding="utf-8") as stream:
        for text, truncation in pairs:
            stream.write(json.dumps({"text": text, "truncation": truncation}) + "\n")
    np.save(HERE / "vectors.npy", vectors)
    print(f"{len(pairs)} texts")  # noqa: T201


if __name__ == "__main__":
    main()
