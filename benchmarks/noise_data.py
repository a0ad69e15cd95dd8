"""Data that installed packages ship, and labels that are wrong as people get them wrong; for `benchmarks.noise`.

Every set comes from the packages of the `test` extra or Python itself, but for "segments" and
"phishing" (`pip install river`), which are left out where they are missing. The wrong labels:

* random: any other class, all alike;
* fixed: each class has one other, drawn by the seed, that it is taken for;
* confused: each class is taken for the one that a linear model mixes it up with most;
* weak: the samples that a weak model (linear, taught by a tenth of the data) is most tempted to call
  something else, called so;
* annotators: five of different skill, each led astray by its own draw from the weak model's doubt; the
  majority's vote, as often wrong in all as asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images, load_wine, make_classification

from benchmarks.tasks import modules

KINDS = ("random", "fixed", "confused", "weak", "annotators")
CHOSEN_ON = ("digits", "cancer", "wine", "modules", "letters", "languages", "names", "segments", "glyphs")
"""Real sets that the guard's constants may be chosen on."""
HELD_OUT = ("docstrings", "icons", "patches", "phishing")
"""Real sets that nothing is chosen on: written down before anything was run on them. "glyphs" was one of them, until
the guard did harm on it and was changed."""
GENERATED = ("many", "overlap")
OPTIONAL = ("segments", "phishing")


@dataclass(frozen=True, eq=False)
class Task:
    """Training data with the labels as given, which of them are wrong, and clean test data."""

    x: np.ndarray
    y: np.ndarray
    wrong: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    true: np.ndarray


# The sets -------------------------------------------------------------------------------------


def available(names):
    """Return those of the names whose data are installed, and those that are not."""
    there = importlib.util.find_spec("river") is not None
    return [n for n in names if there or n not in OPTIONAL], [n for n in names if not there and n in OPTIONAL]


@functools.cache
def load(name):
    """Return x float32 `[n, features]`, y int64 `[n]`, and the number of training samples."""
    x, y, size = _SETS[name]()
    return np.ascontiguousarray(x, np.float32), np.asarray(y, np.int64), size


def _standard(x):
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def _digits():
    x, y = load_digits(return_X_y=True)
    return x / 16 - 0.3, y, 1200


def _cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return _standard(x), y, 400


def _wine():
    x, y = load_wine(return_X_y=True)
    return _standard(x), y, 120


def _modules():
    return *modules(), 2000


def _many():
    x, y = make_classification(
        3600, 30, n_informative=16, n_redundant=4, n_classes=10, n_clusters_per_class=1, class_sep=1.6, flip_y=0,
        random_state=11,
    )  # fmt: skip
    return x / x.std(0), y, 2000


def _overlap():
    x, y = make_classification(
        2600, 20, n_informative=8, n_redundant=4, n_classes=4, class_sep=1.2, flip_y=0, random_state=3
    )
    return x / x.std(0), y, 1500


def _fonts(faces, sizes):
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [[ImageFont.truetype(folder / f"{face}.ttf", size) for size in sizes] for face in faces]


_DEJAVU = [
    f"DejaVu{family}{style}"
    for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
]
_STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]


def _drawn(characters, faces, sizes, count, seed, spread):
    """Return characters of several fonts, each turned and moved, with noise, 16 x 16 pixels."""
    rng, fonts = np.random.default_rng(seed), _fonts(faces, sizes)
    y, images = rng.integers(0, len(characters), count), []
    for label in y:
        image = Image.new("L", (16, 16))
        font = fonts[rng.integers(len(fonts))][rng.integers(len(sizes))]
        place = tuple(8 + rng.uniform(-spread, spread, 2))
        ImageDraw.Draw(image).text(place, characters[label], 255, font, anchor="mm")
        images.append(image.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR))
    x = np.array([np.asarray(image) for image in images]).reshape(count, -1) / 255
    return x + rng.normal(0, 0.05, x.shape) - 0.2, y


def letters(count=3500):
    """Return capital letters of twelve fonts and which they are."""
    return _drawn([chr(65 + i) for i in range(26)], _DEJAVU, (15, 17), count, 53, 1.0)


def _letters():
    return *letters(), 2500


def _glyphs():
    greek = [chr(c) for c in range(0x3B1, 0x3CA) if c != 0x3C2]
    return *_drawn(greek, _DEJAVU + _STIX, (13, 16), 3200, 59, 1.5), 2200


def _trigrams(texts, size=256):
    """Return the roots of hashed counts of three characters in a row."""
    rows = np.zeros((len(texts), size), np.float32)
    for row, text in zip(rows, texts, strict=True):
        codes = np.array([ord(c) for c in f"  {text} "], np.int64)
        hashed = (codes[:-2] * 31 * 31 + codes[1:-1] * 31 + codes[2:]) * 2654435761 % 2**32 >> 16
        np.add.at(row, hashed % size, 1)
    return np.sqrt(rows)


def _text_set(texts, labels, count, size, seed, buckets=256):
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    return _trigrams([texts[i] for i in order], buckets), np.asarray(labels)[order], size


def _languages():
    """Names of countries, languages, scripts and currencies that only one of eight languages has, in threes."""
    from babel import Locale

    names = []
    for code in ("da", "sv", "nl", "de", "es", "pt", "it", "fi"):
        locale = Locale(code)
        parts = locale.territories, locale.languages, locale.scripts, locale.currencies
        names.append({str(name) for part in parts for name in part.values()})
    texts, labels = [], []
    for label, known in enumerate(names):
        own = sorted(known - set().union(*names[:label], *names[label + 1 :]))
        own = [own[i] for i in np.random.default_rng(101).permutation(len(own))][:1170]
        chosen = [" ".join(own[i : i + 3]) for i in range(0, len(own), 3)]
        texts += chosen
        labels += [label] * len(chosen)
    return _text_set(texts, labels, len(texts), 1400, 61, buckets=1024)


_KIND_OF_NAME = {ast.FunctionDef: 0, ast.ClassDef: 1, ast.arg: 2, ast.Attribute: 3}


def _names():
    """Names in Python's own library: of a function, a class, an argument, an attribute."""
    folder, kinds = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if type(node) in _KIND_OF_NAME:
                name = getattr(node, "name", None) or getattr(node, "arg", None) or node.attr
                kinds.setdefault(name, set()).add(_KIND_OF_NAME[type(node)])
    clear = sorted((name, *of) for name, of in kinds.items() if len(of) == 1 and len(name) > 3)
    rng = np.random.default_rng(67)
    clear = [clear[i] for i in rng.permutation(len(clear))]
    chosen = [pair for kind in range(4) for pair in [c for c in clear if c[1] == kind][:900]]
    return _text_set([name for name, _ in chosen], [kind for _, kind in chosen], 3400, 2200, 71)


def _docstrings():
    """The first 100 characters of functions' descriptions, by package."""
    import networkx
    import scipy.stats
    import sklearn.metrics
    import sympy
    import torch

    packages = (networkx, sympy), (np, np.linalg, np.fft), (torch, torch.nn.functional), (scipy.stats, sklearn.metrics)
    texts, labels = [], []
    for label, members in enumerate(packages):
        seen = set()
        for package in members:
            for name in sorted(dir(package)):
                text = inspect.getdoc(getattr(package, name, None)) or ""
                for start in range(0, min(len(text), 1200) - 99, 100):
                    seen.add(" ".join(text[start : start + 100].split()))
        chosen = sorted(seen)
        chosen = [chosen[i] for i in np.random.default_rng(73).permutation(len(chosen))[:900]]
        texts += chosen
        labels += [label] * len(chosen)
    return _text_set(texts, labels, len(texts), 2200, 79)


def _icons():
    """Drawings in SVG, by the collection they belong to."""
    import material

    folder = Path(material.__file__).parent / "templates" / ".icons"
    texts, labels = [], []
    for label, kind in enumerate(("fontawesome", "material", "octicons", "simple")):
        paths = sorted((folder / kind).rglob("*.svg"))
        paths = [paths[i] for i in np.random.default_rng(83).permutation(len(paths))[:850]]
        for path in paths:
            text = path.read_text("utf8")
            start = text.find(' d="') + 4
            texts.append(text[start : start + 60])
            labels.append(label)
    return _text_set(texts, labels, len(texts), 2100, 89)


def _patches():
    """Pieces of 6 x 6 pixels of four pictures, less their mean brightness."""
    folder = Path(matplotlib.get_data_path()) / "sample_data"
    pictures = [np.asarray(image, float).mean(2) for image in load_sample_images().images]
    more = "grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"
    pictures += [np.asarray(Image.open(folder / name).convert("L"), float) for name in more]
    rng, x, y = np.random.default_rng(97), [], []
    for label, picture in enumerate(pictures):
        for _ in range(850):
            top, left = (int(rng.integers(0, side - 12)) for side in picture.shape)
            piece = picture[top : top + 12 : 2, left : left + 12 : 2]
            x.append(np.append(((piece - piece.mean()) / 40).ravel(), piece.mean() / 64 - 2))
            y.append(label)
    order = rng.permutation(len(y))
    return np.array(x)[order], np.array(y)[order], 2200


def _segments():
    from river.datasets import ImageSegments

    rows = list(ImageSegments())
    known = sorted({label for _, label in rows})
    return _standard(np.array([list(x.values()) for x, _ in rows], float)), [known.index(y) for _, y in rows], 1400


def _phishing():
    from river.datasets import Phishing

    rows = list(Phishing())
    return _standard(np.array([list(x.values()) for x, _ in rows], float)), [int(y) for _, y in rows], 800


_SETS = {
    "digits": _digits, "cancer": _cancer, "wine": _wine, "modules": _modules, "letters": _letters,
    "languages": _languages, "names": _names, "segments": _segments, "glyphs": _glyphs, "docstrings": _docstrings,
    "icons": _icons, "patches": _patches, "phishing": _phishing, "many": _many, "overlap": _overlap,
}  # fmt: skip


# Wrong labels ---------------------------------------------------------------------------------


def make_task(name, kind, rate, seed, *, tail=False):
    """Return a task: a set, kind and share of wrong labels; `tail`: the smallest class a fiftieth of the largest."""
    x, y, size = load(name)
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {kind} {rate} {tail}".encode())])
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(y))
    x, y = x[order], y[order]
    train, test, classes = np.arange(size), np.arange(size, len(y)), int(y.max()) + 1
    if tail:
        members = [np.flatnonzero(y[:size] == c) for c in range(classes)]
        shares = np.geomspace(1, 0.02, classes)
        train = np.concatenate([m[: max(3, int(s * len(m)))] for m, s in zip(members, shares, strict=True)])
    true = y[train]
    given = mislabel(x[train], true, classes, kind, rate, rng) if rate else true.copy()
    return Task(x[train], given, given != true, x[test], y[test], true)


def mislabel(x, true, classes, kind, rate, rng):
    """Return labels of which that share is wrong, in one of `KINDS`."""
    count, given = round(rate * len(true)), true.copy()
    if kind in ("random", "fixed", "confused"):
        if kind == "random":
            other = (true + rng.integers(1, classes, len(true))) % classes
        elif kind == "fixed":
            turn = rng.permutation(classes)  # a ring through all classes
            following = np.empty(classes, np.int64)
            following[turn] = np.roll(turn, 1)
            other = following[true]
        else:
            doubt = _doubt(x, true, classes, np.arange(len(true)))
            other = np.array([doubt[true == c].sum(0).argmax() if (true == c).any() else 0 for c in range(classes)])[
                true
            ]
        chosen = rng.permutation(len(true))[:count]
        given[chosen] = other[chosen]
        return given
    doubt = _doubt(x, true, classes, rng.permutation(len(true))[: max(len(true) // 10, 4 * classes)])
    if kind == "weak":
        chosen = np.argsort(-doubt.max(1), kind="stable")[:count]
        given[chosen] = doubt[chosen].argmax(1)
        return given
    return _vote(true, classes, doubt, count, rng)


def _doubt(x, true, classes, taught):
    """Return what a linear model, taught by some of the samples, gives each sample's other classes, `[n, classes]`."""
    inputs = np.hstack([_standard(x), np.ones((len(x), 1), np.float32)])
    weights = np.zeros((inputs.shape[1], classes))
    for _ in range(100):
        z = inputs[taught] @ weights
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(taught)), true[taught]] -= 1
        weights -= 0.1 * (inputs[taught].T @ p / len(taught) + 1e-2 * weights)
    z = inputs @ weights
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(x)), true] = 0
    return p


def _vote(true, classes, doubt, count, rng, annotators=5):
    """Return the majority's label; how careless all are is found by halving, so that `count` are wrong."""
    n = len(true)
    hard = doubt.sum(1) + 0.05
    hard /= hard.mean()
    skill = np.linspace(0.6, 1.4, annotators)[:, None]
    fate = rng.random((annotators, n))
    share = np.cumsum(doubt + 1e-9, 1)
    taken = np.array([(rng.random((n, 1)) * share[:, -1:] < share).argmax(1) for _ in range(annotators)])
    taken = np.where(taken == true, (true + 1) % classes, taken)

    def labels(careless):
        said = np.where(fate < careless * skill * hard, taken, true)
        votes = np.zeros((n, classes))
        for one in said:
            votes[np.arange(n), one] += 1
        votes[np.arange(n), said[0]] += 0.5  # the most skilled one breaks ties
        return votes.argmax(1)

    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if np.count_nonzero(labels(middle) != true) < count else (low, middle)
    return labels(high)
