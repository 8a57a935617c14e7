"""Settings from anywhere are taken or refused with a reason; none runs away with the process."""

import resource
import time
import warnings

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from deepred_pl.cli import CONFIGS, EXPECTED, LONGEST, RestorationCLI, reason
from tests.faults import processes

SECONDS = 30.0  # for one file; it takes a fraction
MOST_MEMORY = 4 * 2**30  # bytes, beside what the process has before

SHIPPED = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.rglob("*.yaml"))]


def paths_of(tree, path=()):
    """The keys that lead to each part of nested settings."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from paths_of(value, (*path, key))


KEYS = sorted({path for tree in SHIPPED for path in paths_of(tree)}, key=str)
KEYS += [("data", name) for name in ("crop", "region", "page", "intensity_range", "seed")]
KEYS += [("data", "measurement"), ("data", "metric_on"), ("data", "degrade"), ("data", "clip")]
KEYS += [("red", name) for name in ("timeout", "retries", "step_size", "inner_iterations")]
KEYS += [("model", "init_args", name) for name in ("result", "seed", "init_from", "average_decay")]
KEYS += [
    ("trainer", name) for name in ("max_time", "precision", "callbacks", "limit_train_batches")
]
CLASSES = [
    *("SkipNet", "DeepDecoder", "ImageParameter", "GaussianNoise", "PoissonNoise", "GammaNoise"),
    *("LaplaceNoise", "Blur", "deepred_pl.operators.Blur.uniform", "Downsample", "Mask", "Radon"),
    *("NonLocalMeans", "TotalVariation", "Wavelet", "Median", "torch.nn.Linear"),
    *("deepred_pl.restore.restore", "no.such.Thing", ""),
]
NAMES = ("sigma", "peak", "size", "std", "factor", "angles", "width", "scales", "mask", "fraction")

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31, 2**63, 10**9, 10**30, 1e-30, 1e30]),
    st.floats(allow_nan=True, allow_infinity=True),
)
words = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*CLASSES, "null", "sample:camera", "sample:none", "set:set5/none", "/", "."]),
    st.sampled_from(
        ["minmax", "rise", "../../etc/passwd", "16-mixed", "a: b", "{name}", "~", "1e3"]
    ),
)
plain = st.one_of(numbers, words, st.booleans(), st.none())
parts = st.fixed_dictionaries(
    {"class_path": st.sampled_from(CLASSES)},
    optional={"init_args": st.dictionaries(st.sampled_from(NAMES), plain, max_size=3)},
)
values = st.recursive(
    st.one_of(plain, parts),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw):
    """Shipped settings with a few changes, as text; some of it damaged."""
    tree = yaml.safe_load(yaml.safe_dump(draw(st.sampled_from(SHIPPED))))
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from(KEYS))
        place = tree
        for key in way:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        if draw(st.integers(0, 9)) == 0:
            place.pop(last, None)
        else:
            place[last] = draw(values)
    text = yaml.safe_dump(tree, allow_unicode=True)
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=5)) + text[at + draw(st.integers(0, 9)) :]
    return text


def what_becomes_of(path):
    """Parsing and the data stage of one file of settings: "taken", "refused", or what is wrong."""
    try:
        cli = RestorationCLI([f"--config={path}", "--trainer.logger=false"], run=False)
        cli.datamodule.setup("fit")
    except EXPECTED as error:
        told = reason(error)
        return "refused" if 0 < len(told) <= LONGEST and "\n" not in told else f"unclear: {told}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    y = cli.datamodule.problem.y
    return "taken" if y.ndim == 4 and bool(y.isfinite().all()) else "taken, with NaN"


def try_them(connection, folder, seed, examples):
    """Try so many settings; tell each text, and then what became of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @with_seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(changed())
    def try_one(text):
        path = folder / "settings.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        connection.send(("tries", text))
        connection.send((what_becomes_of(path), None))

    try_one()
    connection.send(("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_every_file_of_settings_is_taken_or_refused(tmp_path, seed, long, record_property):
    examples, ends, memory, text, slowest = 3000 if long else 60, [], 0, "", 0.0
    began = time.perf_counter()
    for what, value in processes.told_by(try_them, tmp_path, seed, examples, seconds=SECONDS):
        slowest, began = max(slowest, time.perf_counter() - began), time.perf_counter()
        if what == "memory":
            memory = value * 1024
        elif what == "tries":
            text = value
        elif what in ("ended", "hung"):
            if len(ends) < examples:
                ends.append((f"{what}: {value}", text))
        else:
            ends.append((what, text))
    good = [what for what, _ in ends if what in ("taken", "refused")]
    record_property(
        "figures",
        f"settings: {len(ends)} tried, {len(good)} survived ({good.count('taken')} taken, "
        f"{good.count('refused')} refused), {slowest:.1f} s and {memory / 2**20:.0f} MB at most, "
        f"seed {seed}",
    )
    bad = [end for end in ends if end[0] not in ("taken", "refused")]
    assert not bad, "\n\n".join(f"{what}\n{text}" for what, text in bad)
    assert len(ends) == examples
    assert min(good.count("taken"), good.count("refused")) > examples // 20  # neither is the rule
    assert memory < MOST_MEMORY
